"""timm's ViT blocks in the place of Vim's: all around the blocks, and the engines that train them, stay the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from vim_backbone import VimConfig
from vim_backbone.hand_over import Handed, take
from vim_backbone.mixer import ScanMetadata

HEAD_WIDTH = 64


class ViTBlock(nn.Module):
    """A ViT's attention (SDPA) and MLP behind the interface of a Vim block, initialised as MAE's."""

    def __init__(self, config: VimConfig, drop_path: float) -> None:
        super().__init__()
        assert drop_path == 0.0
        self.block = TimmBlock(config.d_model, max(1, config.d_model // HEAD_WIDTH), qkv_bias=True)
        for module in self.block.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, h: Handed[Tensor], residual: Handed[Tensor | None], metadata: ScanMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, length, d_model) -> the same: a ViT block adds to the stream by itself, and knows no lines or gaps.

        It takes no packed pictures. With `apart` a token of the first half of the batch attends to itself and those
        before it, of the second half to itself and those after it.
        """
        assert metadata.gaps is None
        assert take(residual) is None
        assert metadata.cu_seqlens is None
        h = take(h)
        if metadata.apart:
            ahead, back = h.chunk(2)
            ahead, back = (self.block(half, is_causal=True) for half in (ahead, back.flip(1)))
            return torch.cat([ahead, back.flip(1)]), None
        return self.block(h), None


@contextmanager
def blocks_of(net: str) -> Iterator[None]:
    """Backbones and decoders that are made inside have the blocks of `net`, "vim" or "vit"."""
    if net == "vim":
        yield
        return
    blocks = patch("vim_backbone.vim.Block", ViTBlock), patch("pretrain.masked.Block", ViTBlock)
    # config.json gives the sizes of a Vim's blocks; `load_state` looks at every tensor all the same
    with blocks[0], blocks[1], patch("vim_backbone.pretrained.check_sizes"):
        yield
