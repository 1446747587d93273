"""Masked autoencoding on Vim: the encoder scans the visible patches, a shallow Vim decoder rebuilds the hidden ones.

Shape letters: b batch, c channels, l patches, v visible patches, m hidden patches, s special tokens, d encoder width,
p pixels of a patch (side * side * channels). Pictures of different shapes come as a list and are one row: b is 1 then,
and l, v and m count the patches of all. Where channels are tokens, each counts as a patch, and p is side * side.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.masked import DecoderConfig, MaskedModel, select
from pretrain.patches import normalise, patchify, unpatchify
from vim_backbone import VisionMamba
from vim_backbone.block import run_blocks
from vim_backbone.errors import UserError
from vim_backbone.mixer import ScanMetadata
from vim_backbone.sequence_parallel import Rows, embed_rows, encode_stretch
from vim_backbone.stretch import StretchLayout
from vim_backbone.vim import Images


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """How the encoder scans what it sees."""

    gap_aware: bool = False
    """dt of a visible patch covers the hidden ones before it, in either direction, so that as much time passes in the
    encoder's scan as over the whole picture; with scan=full."""


PLAIN_DEVIATION = 0.5
"""Of predicted patches that are drawn without their true mean and deviation, where that of the data is 1."""


class Reconstruction(NamedTuple):
    """What `MaskedAutoencoder.reconstruct` gives."""

    predicted: Tensor
    """(b, l, p) normalised pixels predicted for every patch."""
    pixels: Images
    """(b, c, h, w), or a list: the prediction with each patch's true mean and deviation put back, visible patches as
    they were."""
    plain: Images
    """The same with a mean of 0 and a deviation of PLAIN_DEVIATION in each hidden patch: the prediction alone."""


class MaskedAutoencoder(MaskedModel):
    """MAE (arXiv 2111.06377) with a Vim encoder and decoder, which says the pixels of every patch."""

    def __init__(self, encoder: VisionMamba, decoder: DecoderConfig, settings: MAEConfig | None = None) -> None:
        config = encoder.config
        pixels = config.patch_size**2 * config.in_chans // config.tokens_a_patch(config.in_chans)
        super().__init__(encoder, decoder, pixels, settings is not None and settings.gap_aware)

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
        if rows is not None and reconstruct:
            raise UserError("pictures over several processes cannot be reconstructed: give no rows")
        if rows is not None:
            return self._part_of_loss(images, visible, hidden, rows)
        if reconstruct:
            return self.reconstruct(images, visible, hidden, lengths)
        predicted = self.decoder_pred(select(self.decode(images, visible, lengths), hidden))
        target, _, _ = normalise(select(self._patchify(images), hidden))
        errors = (predicted.float() - target).square()
        if lengths is None:
            return errors.mean()
        counts = [patches - count for patches, count in zip(self.encoder.lengths(images) or [], lengths, strict=True)]
        return torch.stack([picture.mean() for picture in errors.split(counts, dim=1)]).mean()

    @torch.no_grad()
    def reconstruct(
        self, images: Images, visible: Tensor, hidden: Tensor, lengths: list[int] | None = None
    ) -> Reconstruction:
        """Predictions for every patch, and the pictures they make; arguments as `forward`."""
        predicted = self.decoder_pred(self.decode(images, visible, lengths)).float()
        patches = self._patchify(images)
        _, mean, deviation = normalise(patches)
        hidden = hidden[..., None].expand(-1, -1, patches.shape[-1])

        def pictured(values: Tensor) -> Images:
            pixels = patches.scatter(1, hidden, values.gather(1, hidden).to(patches.dtype))
            if isinstance(images, Tensor):
                return self._unpatchify(pixels, images)
            pieces = pixels.split(self.encoder.lengths(images) or [], dim=1)
            return [self._unpatchify(piece, image)[0] for piece, image in zip(pieces, images, strict=True)]

        return Reconstruction(predicted, pictured(predicted * deviation + mean), pictured(predicted * PLAIN_DEVIATION))

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
        return unpatchify(patches, self.patch_size, self.grid(like))

    def _part_of_loss(self, images: Images, visible: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
        """Squared errors of the rows' hidden patches, over the number of those of the whole pictures."""
        if not isinstance(images, Tensor):
            raise UserError("pictures over several processes cannot be packed: give a batch of one size")
        if self.gap_aware:
            raise UserError("mae.gap_aware does not work on pictures over several processes: set it to false")
        patches = select(embed_rows(self.encoder, images, rows), visible)
        visible_stretch = rows.stretch(patches.shape[1], images.device)
        special, encoded = map(self.decoder_embed, encode_stretch(self.encoder, patches, visible_stretch))
        tokens = self.placed(encoded, visible, self.positions_of(images, rows))
        here = rows.stretch(tokens.shape[1], images.device)
        layout = StretchLayout(self.layout, here)
        h = layout.join(special.to(tokens.dtype), tokens)
        h, residual = run_blocks(self.decoder_layers, h, ScanMetadata(stretch=here))
        decoded = layout.split(self.decoder_norm(h, residual)[0])[1]
        target, _, _ = normalise(select(self._patchify(images), hidden))
        errors = (self.decoder_pred(select(decoded, hidden)).float() - target).square()
        count = sum(here.lengths) - sum(visible_stretch.lengths)
        return errors.mean(-1).sum() / (len(images) * count)
