"""One Vim block: add to the residual stream, RMS norm, mixer; with stochastic depth."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vim_backbone.config import VimConfig
from vim_backbone.errors import require
from vim_backbone.hand_over import Handed, hand_over, take
from vim_backbone.lines import GridLines
from vim_backbone.memory import Recompute
from vim_backbone.mixer import AGAIN, PLAIN, Mixer, ScanMetadata
from vim_backbone.weights import init_mixer
from vim_kernels import add_rms_norm


class RMSNorm(nn.Module):
    """The residual add and RMS norm (arXiv 1910.07467) as one step; the stream is float32."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(batch, length, d_model) twice -> normed, new residual stream."""
        return add_rms_norm(h, residual, self.weight, self.eps)


class Block(nn.Module):
    """residual += drop_path(h); h = mixer(norm(residual)). The first block starts the stream with h itself.

    A block draws its own weights, so that a large model can be spread over processes block by block as it is built.
    """

    def __init__(self, config: VimConfig, drop_path: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)
        self.drop_path = drop_path
        init_mixer(self.mixer, config.depth)

    def forward(
        self, h: Handed[Tensor], residual: Handed[Tensor | None], metadata: ScanMetadata = PLAIN
    ) -> tuple[Tensor, Tensor]:
        """(batch, length, d_model) twice -> output of the mixer, residual stream."""
        h, residual = take(h), take(residual)
        if residual is not None:
            h = drop_path(h, self.drop_path, self.training, metadata.cu_seqlens)
        normed, stream = self.norm(h, residual)
        if self.mixer.recompute == "products" and torch.is_grad_enabled():
            return checkpoint(self.mixer, normed, metadata, **AGAIN), stream
        normed_or_list = hand_over(normed, self.mixer)
        del h, residual, normed
        return self.mixer(normed_or_list, metadata), stream


def run_blocks(
    blocks: Iterable[nn.Module], tokens: Handed[Tensor], metadata: ScanMetadata = PLAIN, lines: GridLines | None = None
) -> tuple[Tensor, Tensor | None]:
    """Tokens (batch, length, d_model) through a stack of blocks -> output of the last mixer, residual stream.

    `lines` of pooled scans: the blocks take rows and columns in turn.
    """
    of_blocks = [metadata if lines is None else metadata._replace(lines=each) for each in lines or [None]]
    h: Tensor = take(tokens)
    residual: Tensor | None = None
    for index, block in enumerate(blocks):
        handed: tuple[Handed[Tensor], Handed[Tensor | None]] = hand_over(h, block), hand_over(residual, block)
        del h, residual
        h, residual = block(*handed, of_blocks[index % len(of_blocks)])
    return h, residual


def set_recompute(model: nn.Module, level: Recompute) -> None:
    """Choose what the backward pass of all blocks of a model makes again: see `vim_backbone.memory.Recompute`."""
    for module in model.modules():
        if isinstance(module, Mixer):
            module.recompute = level


def set_slices(model: nn.Module, tokens: int | None) -> None:
    """Let all mixers take long sequences in slices of so many tokens, where no gradients are wanted; None: whole.

    Less memory at more time: of a block's inner channels a sequence has one tensor in place of seven. Values are the
    same to rounding. What is packed, pooled, apart, with gaps, or over several processes is taken whole, and so is what
    is no longer than a slice. Raises UserError for slices of less than one token.
    """
    require(tokens is None or tokens >= 1, "tokens", tokens, "it must be at least 1, or None")
    for module in model.modules():
        if isinstance(module, Mixer):
            module.slice_tokens = tokens


def drop_path(h: Tensor, rate: float, training: bool, cu_seqlens: Tensor | None = None) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): zero whole pictures with probability `rate`, scale up the others."""
    if rate == 0.0 or not training:
        return h
    pictures = len(h) if cu_seqlens is None else len(cu_seqlens) - 1
    keep = torch.rand(pictures, 1, 1, device=h.device) >= rate
    if cu_seqlens is not None:
        keep = keep.repeat_interleave(cu_seqlens.diff(), dim=0, output_size=h.shape[1]).transpose(0, 1)
    return h * keep.to(h.dtype) / (1.0 - rate)
