"""Distillation on Vim: what is made of each patch is compared with a frozen teacher's features of it.

Shape letters: b batch, l patches, v visible patches, m patches that are compared, d width of the teacher. Pictures of
different shapes come as a list and are one row: b is 1 then, and l, v and m count the patches of all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.distill.teacher import Teacher
from pretrain.masked import DecoderConfig, MaskedModel, encode_visible, select
from pretrain.objective import keep_from_decay, require_no_overlap
from vim_backbone import VisionMamba
from vim_backbone.vim import Images

BETA = 2.0
"""Where the smooth L1 loss turns from squares to absolute values (arXiv 2205.14141, section 3)."""


class Comparison(NamedTuple):
    """What `compare` gives."""

    predicted: Tensor
    """(b, m, d)"""
    target: Tensor
    """(b, m, d), the teacher's features, normalised."""


class Distillation(nn.Module):
    """The encoder, and one linear layer to the teacher's features of the patches that it sees: all, or what a mask
    leaves (MaskAlign, arXiv 2211.08887). The teacher sees the whole picture.
    """

    def __init__(self, encoder: VisionMamba, teacher: Teacher) -> None:
        super().__init__()
        require_no_overlap(encoder.config, "would show hidden pixels")
        self.encoder = encoder
        self.teacher = teacher
        self.decoder_pred = nn.Linear(encoder.config.d_model, teacher.description.width)
        nn.init.xavier_uniform_(self.decoder_pred.weight)
        nn.init.zeros_(self.decoder_pred.bias)

    def forward(
        self, images: Images, visible: Tensor, hidden: Tensor, lengths: list[int] | None = None, compare: bool = False
    ) -> Tensor | Comparison:
        """Loss, in which every picture counts alike; or what is compared, and with what.

        Args:
            images: (b, c, h, w), or a list of pictures (c, h, w).
            visible, hidden, lengths: the fields of `pretrain.masked.Split`.
        """
        features = self.teacher.features(images, self.encoder.config)  # before the encoder's activations are there
        del hidden
        visible_patches = encode_visible(self.encoder, images, visible, lengths)[1]
        compared = Comparison(self.decoder_pred(visible_patches).float(), select(features, visible))
        return compared if compare else loss_of(compared, self.teacher.settings.loss, lengths)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm although they have two axes or more."""
        return keep_from_decay(self.encoder)


class MaskedDistillation(MaskedModel):
    """As MAE, with the teacher's features of the hidden patches in place of their pixels (MVP, arXiv 2203.05175)."""

    def __init__(self, encoder: VisionMamba, decoder: DecoderConfig, teacher: Teacher) -> None:
        super().__init__(encoder, decoder, teacher.description.width)
        self.teacher = teacher

    def forward(
        self, images: Images, visible: Tensor, hidden: Tensor, lengths: list[int] | None = None, compare: bool = False
    ) -> Tensor | Comparison:
        """As `Distillation.forward`."""
        features = self.teacher.features(images, self.encoder.config)
        predicted = self.decoder_pred(select(self.decode(images, visible, lengths), hidden)).float()
        compared = Comparison(predicted, select(features, hidden))
        counts = None
        if lengths is not None:
            every = self.encoder.lengths(images) or []
            counts = [patches - count for patches, count in zip(every, lengths, strict=True)]
        return compared if compare else loss_of(compared, self.teacher.settings.loss, counts)


def loss_of(compared: Comparison, kind: str, counts: list[int] | None) -> Tensor:
    """Mean over pictures of the mean over their patches; `counts`: those of each picture of a row.

    cosine: 1 - cosine (EVA, arXiv 2211.07636, and MVP). smooth_l1: the mean over features.
    """
    if kind == "cosine":
        errors = 1 - F.cosine_similarity(*compared, dim=-1)
    else:
        errors = F.smooth_l1_loss(*compared, beta=BETA, reduction="none").mean(-1)
    if counts is None:
        return errors.mean()
    return torch.stack([picture.mean() for picture in errors[0].split(counts)]).mean()
