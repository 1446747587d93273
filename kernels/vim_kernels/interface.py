"""What a fast backend is: a module of plain tensor functions without autograd, and where to find each."""

import functools
import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from vim_kernels.lines import Lines
from vim_kernels.types import NormWeights, ScanWeights

FAST_MODULES: dict[str, str] = {
    "triton": "vim_kernels.triton_backend",
    "cpu": "vim_kernels.cpu_backend",
    "torch": "vim_kernels.torch_backend",
}
"""Fast backend name -> module that implements `FastBackend`."""


class FastBackend(Protocol):
    """Plain tensor functions, no autograd. All scratch is allocated inside; inputs are never written,
    but for the x of `bidirectional_scan_forward` where that is allowed.

    Tensors may differ in float dtype (no float64); incoming gradients are contiguous and like the outputs. Gradients
    come back contiguous, unaliased, in the shape and dtype of their inputs, None where the input is None.
    `*_saved` allocates what the forward fills for the backward; fake kernels call it too, so its shapes depend on
    the shapes of its arguments only. A forward that does not save returns [].
    """

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot run on `device`, or None."""
        ...

    def bidirectional_scan_saved(
        self, x: Tensor, z: Tensor | None, forward: ScanWeights, backward: ScanWeights, cu_seqlens: Tensor | None
    ) -> list[Tensor]:
        """Empty tensors that the forward fills for the backward."""
        ...

    def bidirectional_scan_forward(
        self,
        x: Tensor,  # (b, l, d), row stride 2 d when z is given: halves of one contiguous tensor
        z: Tensor | None,
        forward: ScanWeights,
        backward: ScanWeights,
        cu_seqlens: Tensor | None,
        save: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Output (b, l, d) in the dtype of x, and what was saved.

        Where `overwrite`, x may be written, and the output may be x itself.
        """
        ...

    def bidirectional_scan_backward(
        self,
        dout: Tensor,
        x: Tensor,
        z: Tensor | None,
        forward: ScanWeights,
        backward: ScanWeights,
        cu_seqlens: Tensor | None,
        saved: list[Tensor],
    ) -> tuple[Tensor, Tensor | None, ScanWeights, ScanWeights]:
        """Gradients (dx, dz, forward, backward); dx and dz as halves of one (b, l, 2 d) buffer save a copy."""
        ...

    def pooled_scan_saved(
        self, xz: Tensor, forward: ScanWeights, backward: ScanWeights, lines: Lines, norm: NormWeights | None
    ) -> list[Tensor]:
        """Empty tensors that the forward fills for the backward."""
        ...

    def pooled_scan_forward(
        self,
        xz: Tensor,  # (b, l, 2 d), contiguous
        forward: ScanWeights,
        backward: ScanWeights,
        lines: Lines,
        norm: NormWeights | None,
        eps: float,
        save: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Output (b, l, d) in the dtype of xz, and what was saved."""
        ...

    def pooled_scan_backward(
        self,
        dout: Tensor,
        xz: Tensor,
        forward: ScanWeights,
        backward: ScanWeights,
        lines: Lines,
        norm: NormWeights | None,
        eps: float,
        saved: list[Tensor],
    ) -> tuple[Tensor, ScanWeights, ScanWeights, NormWeights | None]:
        """Gradients (dxz, forward, backward, norm)."""
        ...

    def selective_scan_saved(
        self, x: Tensor, A: Tensor, cu_seqlens: Tensor | None, initial_state: Tensor | None
    ) -> list[Tensor]:
        """Empty tensors that the forward fills for the backward."""
        ...

    def selective_scan_forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        *,
        dt_softplus: bool,
        reverse: bool,
        cu_seqlens: Tensor | None,
        initial_state: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output like x, final state (s, d, n) float32, and what was saved."""
        ...

    def selective_scan_backward(
        self,
        dy: Tensor,
        dfinal_state: Tensor | None,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        *,
        dt_softplus: bool,
        reverse: bool,
        cu_seqlens: Tensor | None,
        initial_state: Tensor | None,
        saved: list[Tensor],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state."""
        ...

    def causal_conv1d_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str | None,
        reverse: bool,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """(b, l, d) like x."""
        ...

    def causal_conv1d_backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str | None,
        reverse: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of x, weight, bias."""
        ...

    def add_rms_norm_forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Normed like x; residual + x, float32, never an alias of x. Leading shape is free."""
        ...

    def add_rms_norm_backward(
        self, dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sum (float32; of x and of residual alike) and of weight."""
        ...


@functools.cache
def fast_module(name: str) -> FastBackend:
    """The plain functions of fast backend `name`."""
    return cast(FastBackend, importlib.import_module(FAST_MODULES[name]))
