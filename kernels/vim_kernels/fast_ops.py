"""A fast backend dressed as the four functions of `vim_kernels.reference`: what `ops` calls.

Calls that need neither tracing nor gradients skip the dispatcher (about 30 us a call, a tenth of a small layer).
"""

from typing import Literal

import torch
from torch import Tensor

from vim_kernels import library, library_pooled, reference
from vim_kernels.interface import FAST_MODULES, fast_module
from vim_kernels.lines import Lines
from vim_kernels.types import NormWeights, ScanWeights


class FastOps:
    """A fast backend with the signatures of `vim_kernels.reference`: what `backend.resolve` hands to `ops`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.__name__ = FAST_MODULES[name]

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot run on `device`, or None."""
        return fast_module(self.name).unavailable(device)

    def selective_scan(
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
    ) -> tuple[Tensor, Tensor]:
        """See `vim_kernels.reference.selective_scan`."""
        tensors = (x, dt, A, B, C, D, z, dt_bias)
        if _any_float64(*tensors, initial_state):
            return reference.selective_scan(
                *tensors, dt_softplus=dt_softplus, reverse=reverse, cu_seqlens=cu_seqlens, initial_state=initial_state
            )
        if _is_plain_call(*tensors, initial_state):
            y, state, _ = fast_module(self.name).selective_scan_forward(
                *tensors, dt_softplus=dt_softplus, reverse=reverse, cu_seqlens=cu_seqlens,
                initial_state=initial_state, save=False,
            )  # fmt: skip
            return y, state
        save = _saves(*tensors, initial_state)
        options = (dt_softplus, reverse, self.name, save)
        y, state, *_ = library.selective_scan(*tensors, cu_seqlens, initial_state, *options)
        return y, state

    def bidirectional_scan(
        self,
        xz: Tensor,
        forward: ScanWeights,
        backward: ScanWeights,
        *,
        gated: bool,
        cu_seqlens: Tensor | None,
        overwrite: bool = False,
    ) -> Tensor:
        """See `vim_kernels.reference.bidirectional_scan`."""
        if _any_float64(xz, *forward, *backward):
            return reference.bidirectional_scan(xz, forward, backward, gated=gated, cu_seqlens=cu_seqlens)
        if _is_plain_call(xz, *forward, *backward):
            x, z = library.halves(xz.contiguous(), gated)
            run = fast_module(self.name).bidirectional_scan_forward
            return run(x, z, forward, backward, cu_seqlens, False, overwrite)[0]
        save = _saves(xz, *forward, *backward)
        return library.bidirectional_scan(xz.contiguous(), *forward, *backward, gated, cu_seqlens, self.name, save)[0]

    def pooled_scan(
        self,
        xz: Tensor,
        forward: ScanWeights,
        backward: ScanWeights,
        lines: Lines,
        *,
        norm: NormWeights | None,
        eps: float,
    ) -> Tensor:
        """See `vim_kernels.reference.pooled_scan`."""
        given = (xz, *forward, *backward, *(norm or ()))
        if _any_float64(*given):
            return reference.pooled_scan(xz, forward, backward, lines, norm=norm, eps=eps)
        xz = xz.contiguous()
        if _is_plain_call(*given):
            return fast_module(self.name).pooled_scan_forward(xz, forward, backward, lines, norm, eps, False)[0]
        both = (*forward, *backward, *(norm or (None, None)))
        return library_pooled.pooled_scan(xz, *both, *lines, eps, self.name, _saves(*given))[0]

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: Literal["silu"] | None,
        reverse: bool,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """See `vim_kernels.reference.causal_conv1d`."""
        options = {"activation": activation, "reverse": reverse, "cu_seqlens": cu_seqlens}
        if _any_float64(x, weight, bias):
            return reference.causal_conv1d(x, weight, bias, **options)
        if _is_plain_call(x, weight, bias):
            return fast_module(self.name).causal_conv1d_forward(x, weight, bias, **options)
        return library.causal_conv1d(x, weight, bias, cu_seqlens, activation, reverse, self.name)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `vim_kernels.reference.add_rms_norm`."""
        if _any_float64(x, residual, weight):
            return reference.add_rms_norm(x, residual, weight, eps)
        if _is_plain_call(x, residual, weight):
            return fast_module(self.name).add_rms_norm_forward(x, residual, weight, eps)
        return library.add_rms_norm(x, residual, weight, eps, self.name)


def _any_float64(*tensors: Tensor | None) -> bool:
    return any([t is not None and t.dtype == torch.float64 for t in tensors])  # noqa: C419 - a list is twice as fast


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _saves(*tensors: Tensor | None) -> bool:
    """An exported program is for inference: saving would tie its graph to the number of checkpoints of one length.

    Asked under Dynamo, PyTorch 2.11 calls every compiled call exported; a training step would then scan forwards twice.
    """
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return _needs_grad(*tensors) and not exporting


def _is_plain_call(*tensors: Tensor | None) -> bool:
    """Neither traced nor differentiated: the backend may be called straight, without the dispatcher's overhead."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or _needs_grad(*tensors):
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
