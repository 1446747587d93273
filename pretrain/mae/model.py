"""Masked autoencoding on Vim: the encoder scans the visible patches, a shallow Vim decoder rebuilds the hidden ones.

Shape letters: b batch, c channels, l patches, v visible patches, m hidden patches, s special tokens, d encoder width,
p pixels of a patch (side * side * channels). Pictures of different shapes come as a list and are one row: b is 1 then,
and l, v and m count the patches of all. Where channels are tokens, each counts as a patch, and p is side * side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.patches import normalise, patchify, unpatchify
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.block import Block, RMSNorm
from vim_backbone.errors import UserError, require
from vim_backbone.packing import layout_of
from vim_backbone.position import resize_table, sincos_table, with_channels
from vim_backbone.sequence_parallel import Rows, embed_rows, encode_stretch
from vim_backbone.stretch import StretchLayout
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


class Reconstruction(NamedTuple):
    """What `MaskedAutoencoder.reconstruct` gives."""

    predicted: Tensor
    """(b, l, p) normalised pixels predicted for every patch."""
    pixels: Images
    """(b, c, h, w), or a list: the prediction with each patch's true mean and deviation put back, visible patches as
    they were."""


class Split(NamedTuple):
    """A mask as indices of patches, each in scan order."""

    visible: Tensor
    """(b, v)"""
    hidden: Tensor
    """(b, m)"""
    lengths: list[int] | None = None
    """Visible patches of each picture, where they are packed."""


class MaskedAutoencoder(nn.Module):
    """MAE (arXiv 2111.06377) with a Vim encoder and decoder; visible tokens stay in scan order.

    Class token and registers sit where `TokenLayout` puts them, in the visible sequence, in the decoder's and in the
    published backbone alike.
    """

    def __init__(self, encoder: VisionMamba, decoder: DecoderConfig) -> None:
        super().__init__()
        config = encoder.config
        if config.stride != config.patch_size:
            raise UserError(
                f"stride {config.stride} differs from patch_size {config.patch_size}: patches that overlap would show "
                "hidden pixels; pretrain with stride = patch_size"
            )
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
        pixels = self.patch_size**2 * config.in_chans // config.tokens_a_patch(config.in_chans)
        self.decoder_pred = nn.Linear(decoder.width, pixels)
        self._init_decoder()

    def _init_decoder(self) -> None:
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.decoder_channel_embed is not None:
            nn.init.trunc_normal_(self.decoder_channel_embed, std=0.02)
        for linear in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        images: Images,
        visible: Tensor,
        hidden: Tensor,
        lengths: list[int] | None = None,
        reconstruct: bool = False,
        rows: Rows | None = None,
    ) -> Tensor | Reconstruction:
        """Loss: mean squared error on the normalised pixels of hidden patches; or what `reconstruct` gives.

        Every picture counts alike, however many patches it has. ZeRO-3 collects parameters for `forward` alone, so that
        all that a run does with a model goes through it.

        Args:
            images: (b, c, h, w), or a list of pictures (c, h, w).
            visible, hidden, lengths: the fields of `split_patches`.
            rows: the pictures (b, c, h, w) are these rows of patches of larger ones, whose other rows other processes
                have, and so are the masks; of the loss this process has its part, and the sum of all is the whole.
        """
        if rows is not None:
            return self._part_of_loss(images, visible, hidden, rows)
        if reconstruct:
            return self.reconstruct(images, visible, hidden, lengths)
        predicted = self.decoder_pred(select(self._decode(images, visible, lengths), hidden))
        target, _, _ = normalise(select(self._patchify(images), hidden))
        errors = (predicted.float() - target).square()
        if lengths is None:
            return errors.mean()
        counts = [patches - seen for patches, seen in zip(self.encoder.lengths(images) or [], lengths, strict=True)]
        return torch.stack([picture.mean() for picture in errors.split(counts, dim=1)]).mean()

    @torch.no_grad()
    def reconstruct(
        self, images: Images, visible: Tensor, hidden: Tensor, lengths: list[int] | None = None
    ) -> Reconstruction:
        """Predictions for every patch, and the pictures they make; arguments as `forward`."""
        predicted = self.decoder_pred(self._decode(images, visible, lengths)).float()
        patches = self._patchify(images)
        _, mean, deviation = normalise(patches)
        hidden = hidden[..., None].expand(-1, -1, patches.shape[-1])
        pixels = patches.scatter(1, hidden, (predicted * deviation + mean).gather(1, hidden).to(patches.dtype))
        if isinstance(images, Tensor):
            return Reconstruction(predicted, self._unpatchify(pixels, images))
        pieces = pixels.split(self.encoder.lengths(images) or [], dim=1)
        unpacked = [self._unpatchify(piece, image)[0] for piece, image in zip(pieces, images, strict=True)]
        return Reconstruction(predicted, unpacked)

    def _patchify(self, images: Images) -> Tensor:
        """(b, l, p), the tokens' order."""
        if self.decoder_channel_embed is None:
            return patchify(images, self.patch_size)
        if not isinstance(images, Tensor):
            return torch.cat([self._patchify(image[None]) for image in images], dim=1)
        by_channel = patchify(images, self.patch_size).unflatten(2, (self.patch_size**2, -1))
        return by_channel.transpose(2, 3).flatten(1, 2)

    def _unpatchify(self, patches: Tensor, like: Tensor) -> Tensor:
        """The inverse for one shape: (b, l, p) of pictures (..., c, h, w) -> (b, c, h, w)."""
        if self.decoder_channel_embed is not None:
            patches = patches.unflatten(1, (-1, like.shape[-3])).transpose(2, 3).flatten(2)
        return unpatchify(patches, self.patch_size, self._grid(like))

    def _decode(self, images: Images, visible: Tensor, lengths: list[int] | None) -> Tensor:
        """(b, l, decoder width) for all patches."""
        special, seen = self.encoder.encode(
            select(self.encoder.embed(images), visible), lengths, self.encoder.lines(images, visible)
        )
        special, seen = self.decoder_embed(special), self.decoder_embed(seen)
        positions = self._positions(images)
        tokens = self._placed(seen, visible, positions)
        layout, cu_seqlens = layout_of(self.layout, self.encoder.lengths(images), tokens.device)
        h, residual = layout.join(special.to(tokens.dtype), tokens), None
        lines = None
        if self.encoder.config.scan == "pooled":
            lines = lines_of(images, self.encoder.config, None, 1.0)
        for index, block in enumerate(self.decoder_layers):
            h, residual = block(h, residual, cu_seqlens, lines and lines[index % 2])
        return layout.split(self.decoder_norm(h, residual)[0])[1]

    def _placed(self, seen: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """The decoder's input (b, l, decoder width): visible tokens in their places, else the mask token."""
        tokens = self.mask_token.to(seen.dtype).expand(len(seen), positions.shape[1], -1)
        return tokens.scatter(1, visible[..., None].expand_as(seen), seen) + positions

    def _part_of_loss(self, images: Images, visible: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
        """Squared errors of the rows' hidden patches, over the number of those of the whole pictures."""
        if not isinstance(images, Tensor):
            raise UserError("pictures over several processes cannot be packed: give a batch of one size")
        patches = select(embed_rows(self.encoder, images, rows), visible)
        seen_here = rows.stretch(patches.shape[1], images.device)
        special, seen = map(self.decoder_embed, encode_stretch(self.encoder, patches, seen_here))
        positions = rows.of_table(self.decoder_pos_embed, TokenLayout("none", 0), self.encoder.grid_size)
        if self.decoder_channel_embed is not None:
            channels = self.encoder.config.channels_of(images.shape[1])
            positions = with_channels(positions, self.decoder_channel_embed, channels)
        tokens = self._placed(seen, visible, positions)
        here = rows.stretch(tokens.shape[1], images.device)
        layout = StretchLayout(self.layout, here)
        h, residual = layout.join(special.to(tokens.dtype), tokens), None
        for block in self.decoder_layers:
            h, residual = block(h, residual, stretch=here)
        decoded = layout.split(self.decoder_norm(h, residual)[0])[1]
        target, _, _ = normalise(select(self._patchify(images), hidden))
        errors = (self.decoder_pred(select(decoded, hidden)).float() - target).square()
        count = sum(here.lengths) - sum(seen_here.lengths)
        return errors.mean(-1).sum() / (len(images) * count)

    def _positions(self, images: Images) -> Tensor:
        """Of the decoder, (1, l, decoder width)."""
        layout, size = TokenLayout("none", 0), self.encoder.grid_size
        positions = []
        for image in [images] if isinstance(images, Tensor) else images:
            table = resize_table(self.decoder_pos_embed, layout, size, self._grid(image))
            if self.decoder_channel_embed is not None:
                channels = self.encoder.config.channels_of(image.shape[-3])
                table = with_channels(table, self.decoder_channel_embed, channels)
            positions.append(table)
        return torch.cat(positions, dim=1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return self.encoder.config.grid(*images.shape[-2:])

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm although they have two axes or more."""
        ends = (".A_log", ".A_b_log", "decoder_channel_embed")
        inner = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return inner | {"mask_token"} | {name for name, _ in self.named_parameters() if name.endswith(ends)}


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
