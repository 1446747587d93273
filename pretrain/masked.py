"""What objectives share whose encoder sees a part of the patches: masks, and a shallow Vim decoder over all patches.

Shape letters: b batch, l patches, v visible patches, m hidden patches, s special tokens, d encoder width. Pictures of
different shapes come as a list and are one row: b is 1 then, and l, v and m count the patches of all. Where channels
are tokens, each counts as a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from launch.data.loading import to_device
from pretrain.masking import MaskConfig, draw_mask, draw_masks
from pretrain.objective import Inputs, Objective, keep_from_decay, require_no_overlap
from pretrain.patches import without_hidden
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.block import Block, RMSNorm, run_blocks
from vim_backbone.errors import require
from vim_backbone.gaps import scan_gaps
from vim_backbone.mixer import ScanMetadata
from vim_backbone.packing import layout_of
from vim_backbone.position import resize_table, sincos_table, with_channels
from vim_backbone.sequence_parallel import Rows
from vim_backbone.tokens import TokenLayout
from vim_backbone.vim import Images, lines_of


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The decoder, thrown away after pretraining."""

    width: int = 512
    """Channels."""
    depth: int = 2
    """Vim blocks."""

    def __post_init__(self) -> None:
        require(self.width >= 4 and self.width % 4 == 0, "decoder.width", self.width, "it must be a multiple of 4")
        require(self.depth >= 1, "decoder.depth", self.depth, "it must be at least 1")

    def blocks(self, encoder: VimConfig) -> VimConfig:
        """The decoder's blocks, which scan as the encoder's do."""
        shared = {name: getattr(encoder, name) for name in ("norm_eps", "scan", "img_size", "patch_size", "stride")}
        if encoder.scan == "pooled":
            shared |= {"class_token": "none", "global_pool": "avg", "mixer_norm": encoder.mixer_norm}
        return VimConfig(d_model=self.width, depth=self.depth, **shared)


COST_FIELDS = {
    "mask.ratio": "share of the patches that the encoder skips",
    "decoder.width": "channels of the decoder, which sees all patches",
    "decoder.depth": "its blocks",
}
"""Settings of masks and decoder that change what a step costs."""


class Split(NamedTuple):
    """A mask as indices of patches, each in scan order."""

    visible: Tensor
    """(b, v)"""
    hidden: Tensor
    """(b, m)"""
    lengths: list[int] | None = None
    """Visible patches of each picture, where they are packed."""


def split_patches(mask: Tensor | Sequence[Tensor]) -> Split:
    """Masks (b, l) bool, True = hidden, as many in every row, or a list of masks (l,) -> which patches are which.

    On a GPU this waits for the device.
    """
    if not isinstance(mask, Tensor):
        row = torch.cat(list(mask))
        visible, hidden = (torch.nonzero(chosen).transpose(0, 1) for chosen in (~row, row))
        return Split(visible, hidden, [int((~picture).sum()) for picture in mask])
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    visible, hidden = order.tensor_split([mask.shape[1] - int(mask[0].sum())], dim=1)
    return Split(visible, hidden)


def select(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens (b, l, d) at indices (b, n) -> (b, n, d)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def encode_visible(
    encoder: VisionMamba, images: Images, visible: Tensor, lengths: list[int] | None, gap_aware: bool = False
) -> tuple[Tensor, Tensor]:
    """What the encoder makes of the visible patches alone: special tokens (b, s, d) and patches (b, v, d).

    Args:
        images: (b, c, h, w), or a list of pictures (c, h, w).
        visible, lengths: fields of `Split`.
        gap_aware: dt covers the hidden patches, see `vim_backbone.gaps`.
    """
    patches, gaps = encoder.embed(images), None
    if gap_aware:
        gaps = scan_gaps(visible, encoder.lengths(images) or patches.shape[1], lengths)
    return encoder.encode(select(patches, visible), lengths, encoder.lines(images, visible), gaps=gaps)


@dataclass(frozen=True, kw_only=True)
class MaskedObjective(Objective):
    """What is alike in objectives that hide patches from the encoder."""

    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def draw(self, grid: tuple[int, int], rng: torch.Generator) -> Tensor:
        """A mask (l,) bool, True = hidden."""
        return draw_mask(grid, self.mask, rng)

    def draw_batch(self, grid: tuple[int, int], seeds: np.ndarray) -> Tensor:
        """Masks (b, l), all at once."""
        return draw_masks(grid, self.mask, seeds)

    def visible(self, pixels: Tensor, extra: Tensor, patch_size: int) -> Tensor:
        """Hidden patches in grey."""
        return without_hidden(pixels, extra, patch_size)

    @property
    def visible_share(self) -> float:
        """What masks leave."""
        return 1.0 - self.mask.ratio

    def inputs(
        self, extras: Tensor | Sequence[Tensor], device: torch.device, tokens: Sequence[int] | None = None
    ) -> Inputs:
        """Which tokens are visible and which hidden; split on the CPU, where counting waits for nothing.

        A hidden patch is hidden in all channels: beside its copy in another one there would be little to learn.
        """
        if tokens and max(tokens) > 1:
            repeated = [mask.repeat_interleave(count) for mask, count in zip(extras, tokens, strict=True)]
            extras = torch.stack(repeated) if isinstance(extras, Tensor) else repeated
        visible, hidden, lengths = split_patches(extras)
        return Inputs((to_device(visible, device), to_device(hidden, device), lengths), visible.numel())


class MaskedModel(nn.Module):
    """An encoder of the visible patches, and a Vim decoder whose last layer says something of every patch.

    Class token and registers sit where `TokenLayout` puts them, in the visible sequence, in the decoder's and in the
    published backbone alike. Visible tokens stay in scan order.
    """

    def __init__(self, encoder: VisionMamba, decoder: DecoderConfig, outputs: int, gap_aware: bool = False) -> None:
        super().__init__()
        config = encoder.config
        require_no_overlap(config, "would show hidden pixels")
        self.gap_aware = gap_aware
        self.encoder = encoder
        self.patch_size = config.patch_size
        self.layout = encoder.layout
        blocks = decoder.blocks(config)
        self.decoder_embed = nn.Linear(config.d_model, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(sincos_table(encoder.grid_size, decoder.width)[None], requires_grad=False)
        self.decoder_channel_embed = (
            nn.Parameter(torch.zeros(1, config.in_chans, decoder.width)) if config.channels == "tokens" else None
        )
        self.decoder_layers = nn.ModuleList(Block(blocks, drop_path=0.0) for _ in range(decoder.depth))
        self.decoder_norm = RMSNorm(decoder.width, config.norm_eps)
        self.decoder_pred = nn.Linear(decoder.width, outputs)
        self._init_decoder()

    def _init_decoder(self) -> None:
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.decoder_channel_embed is not None:
            nn.init.trunc_normal_(self.decoder_channel_embed, std=0.02)
        for linear in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def decode(self, images: Images, visible: Tensor, lengths: list[int] | None) -> Tensor:
        """(b, l, decoder width) for all patches; `visible` and `lengths` are fields of `Split`."""
        special, encoded = encode_visible(self.encoder, images, visible, lengths, self.gap_aware)
        special, encoded = self.decoder_embed(special), self.decoder_embed(encoded)
        tokens = self.placed(encoded, visible, self._positions(images))
        layout, cu_seqlens = layout_of(self.layout, self.encoder.lengths(images), tokens.device)
        pooled = self.encoder.config.scan == "pooled"
        lines = lines_of(images, self.encoder.config, None, 1.0) if pooled else None
        h = layout.join(special.to(tokens.dtype), tokens)
        h, residual = run_blocks(self.decoder_layers, h, ScanMetadata(cu_seqlens), lines)
        return layout.split(self.decoder_norm(h, residual)[0])[1]

    def placed(self, encoded: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """The decoder's input (b, l, decoder width): visible tokens in their places, else the mask token."""
        tokens = self.mask_token.to(encoded.dtype).expand(len(encoded), positions.shape[1], -1)
        return tokens.scatter(1, visible[..., None].expand_as(encoded), encoded) + positions

    def _positions(self, images: Images) -> Tensor:
        """Of the decoder, (1, l, decoder width)."""
        every = [images] if isinstance(images, Tensor) else images
        return torch.cat([self.positions_of(image) for image in every], dim=1)

    def positions_of(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        """Of the decoder, (1, l, decoder width), for pictures (..., c, h, w) of one shape, or for `rows` of theirs."""
        table, layout, size = self.decoder_pos_embed, TokenLayout("none", 0), self.encoder.grid_size
        if rows is None:
            table = resize_table(table, layout, size, self.grid(images))
        else:
            table = rows.of_table(table, layout, size)
        if self.decoder_channel_embed is None:
            return table
        return with_channels(table, self.decoder_channel_embed, self.encoder.config.channels_of(images.shape[-3]))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of pictures (..., c, h, w)."""
        return self.encoder.config.grid(*images.shape[-2:])

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm although they have two axes or more."""
        ends = (".A_log", ".A_b_log", "decoder_channel_embed")
        return (
            keep_from_decay(self.encoder)
            | {"mask_token"}
            | {name for name, _ in self.named_parameters() if name.endswith(ends)}
        )
