"""Autoregression by clusters of patches on Vim: each is rebuilt from what was seen of the clusters before it.

Shape letters: b batch, c channels, l patches, m patches to predict, d width of the encoder, p pixels of a patch.
Pictures of different shapes come as a list and are one row: b is 1 then, and l counts the patches of all.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.ar.clusters import ARConfig, Targets
from pretrain.causal import apart, check_causal
from pretrain.objective import keep_from_decay
from pretrain.patches import normalise, patchify, unpatchify
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.errors import require
from vim_backbone.position import resize_table, sincos_table
from vim_backbone.tokens import TokenLayout
from vim_backbone.vim import Images


class Prediction(NamedTuple):
    """What `NextCluster.rebuild` gives of a direction."""

    pixels: Images
    """(b, c, h, w), or a list: with each patch's true mean and deviation put back; 0 where none was predicted."""
    predicted_at: Tensor
    """(l,) bool, row by row: which patches were predicted."""


class Mlp(nn.Module):
    """A block of the decoder: x + W2 gelu(W1 norm(x)), token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, m, width) -> the same."""
        return x + self.layers(x)


class NextCluster(nn.Module):
    """Autoregression by clusters (ARM, arXiv 2406.07537; MAP, arXiv 2410.00871) with a Vim, whose directions are two
    causal networks: see `pretrain.causal`.

    The forward direction predicts the next cluster, the backward one the one before. A patch is rebuilt from its
    position, from the output at its like in the cluster that was seen last, and from the output at which all of that
    cluster was seen, by a decoder that knows nothing else and that both directions share.
    """

    def __init__(self, encoder: VisionMamba, settings: ARConfig) -> None:
        super().__init__()
        check_ar(encoder.config)
        self.encoder = encoder
        config, width = encoder.config, settings.width
        self.decoder_near = nn.Linear(config.d_model, width)
        self.decoder_whole = nn.Linear(config.d_model, width)
        self.decoder_direction = nn.Parameter(torch.zeros(2, width))
        self.decoder_pos_embed = nn.Parameter(sincos_table(encoder.grid_size, width)[None], requires_grad=False)
        self.decoder_layers = nn.Sequential(*(Mlp(width) for _ in range(settings.depth)), nn.LayerNorm(width))
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.in_chans)
        nn.init.trunc_normal_(self.decoder_direction, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not any(module is inner for inner in encoder.modules()):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Images,
        order: Tensor,
        ahead: Targets,
        back: Targets,
        counts: list[int] | None = None,
        rebuild: bool = False,
    ) -> Tensor | list[Prediction]:
        """Loss: mean squared error on the normalised pixels of what both directions predict; or what `rebuild` gives.

        Every picture counts alike, however many patches it has.

        Args:
            images: (b, c, h, w), or a list of pictures (c, h, w).
            order, ahead, back, counts: the fields of `Plan`.
        """
        if rebuild:
            return self.rebuild(images, order, ahead, back)
        predicted = torch.cat(self.predict(images, order, ahead, back), dim=1)
        target, _, _ = normalise(patchify(images, self.encoder.config.patch_size)[:, order])
        target = target[:, torch.cat([ahead.patches, back.patches])]
        errors = (predicted.float() - target).square().mean(-1)
        if counts is None:
            return errors.mean()
        pieces = errors[0].split(counts)
        pictures = zip(pieces[: len(counts) // 2], pieces[len(counts) // 2 :], strict=True)
        return torch.stack([torch.cat(both).mean() for both in pictures]).mean()

    def predict(self, images: Images, order: Tensor, ahead: Targets, back: Targets) -> list[Tensor]:
        """Normalised pixels (b, m, p) of what each direction predicts."""
        streams = apart(self.encoder, images, order)
        positions = self._positions(images)[:, order]
        predicted = []
        for stream, targets, direction in zip(streams, (ahead, back), self.decoder_direction, strict=True):
            hidden = self.decoder_near(stream)[:, targets.near] + self.decoder_whole(stream)[:, targets.whole]
            predicted.append(self.decoder_pred(self.decoder_layers(hidden + positions[:, targets.patches] + direction)))
        return predicted

    @torch.no_grad()
    def rebuild(self, images: Images, order: Tensor, ahead: Targets, back: Targets) -> list[Prediction]:
        """The pictures that each direction predicts; arguments as `forward`."""
        side = self.encoder.config.patch_size
        patches = patchify(images, side)
        _, mean, deviation = normalise(patches)
        predictions = []
        for predicted, targets in zip(self.predict(images, order, ahead, back), (ahead, back), strict=True):
            where = order[targets.patches]
            pixels = torch.zeros_like(patches)
            pixels[:, where] = (predicted.float() * deviation[:, where] + mean[:, where]).to(pixels.dtype)
            predicted_at = torch.zeros(len(order), dtype=torch.bool, device=order.device)
            predicted_at[where] = True
            predictions.append(Prediction(self._pictures(pixels, images), predicted_at))
        return predictions

    def _pictures(self, patches: Tensor, like: Images) -> Images:
        """The inverse of `patchify` for pictures of these shapes."""
        config = self.encoder.config
        if isinstance(like, Tensor):
            return unpatchify(patches, config.patch_size, config.grid(*like.shape[-2:]))
        pieces = patches.split(self.encoder.lengths(like) or [], dim=1)
        return [self._pictures(piece, image[None])[0] for piece, image in zip(pieces, like, strict=True)]

    def _positions(self, images: Images) -> Tensor:
        """Of the decoder, (1, l, width)."""
        config, size = self.encoder.config, self.encoder.grid_size
        grids = [config.grid(*image.shape[-2:]) for image in ([images] if isinstance(images, Tensor) else images)]
        return torch.cat([resize_table(self.decoder_pos_embed, TokenLayout("none", 0), size, g) for g in grids], dim=1)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm although they have two axes or more."""
        return {"decoder_direction"} | keep_from_decay(self.encoder)


def check_ar(config: VimConfig) -> None:
    """Raise UserError for an architecture that this cannot train."""
    check_causal(config, "ar")
    remedy = "objective ar rebuilds patches of all bands; set model.channels to mixed, or take another objective"
    require(config.channels == "mixed", "model.channels", config.channels, remedy)
