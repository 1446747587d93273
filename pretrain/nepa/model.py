"""Next embedding prediction on Vim: the output at a patch is compared with the embedding of the next one.

Shape letters: b batch, l patches, d width of the encoder, t tokens of a place (channels, where each is a token).
Pictures of different shapes come as a list and are one row: b is 1 then, and l counts the patches of all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.causal import apart, check_causal
from pretrain.objective import keep_from_decay
from vim_backbone import VisionMamba
from vim_backbone.vim import Images


class NextEmbedding(nn.Module):
    """NEPA (arXiv 2512.16922) with a Vim, whose directions are two causal networks: see `pretrain.causal`.

    The forward one predicts the embedding of the next place, the backward one that of the place before; where
    channels are tokens, of the same channel, because the others of a place are alike. The encoder has all parameters.
    """

    def __init__(self, encoder: VisionMamba) -> None:
        super().__init__()
        check_causal(encoder.config, "nepa")
        self.encoder = encoder

    def forward(self, images: Images, agree: bool = False) -> Tensor | list[tuple[Tensor, Tensor]]:
        """Loss: minus the cosine of output and embedding, of both directions; or what `agreements` gives.

        Every picture counts alike, however many patches it has.

        Args:
            images: (b, c, h, w), or a list of pictures (c, h, w).
        """
        agreements = self.agreements(images)
        if agree:
            return agreements
        return -torch.stack([torch.cat(both, dim=1).mean() for both in agreements]).mean()

    def agreements(self, images: Images) -> list[tuple[Tensor, Tensor]]:
        """Cosines of a batch, or of each picture of a list, (b, l - t) twice.

        The forward direction predicts all places but the first, the backward one all but the last.
        """
        targets, (forward, backward) = self.targets(images), apart(self.encoder, images)
        lengths = self.encoder.lengths(images) or [targets.shape[1]]
        steps = self.encoder.config.tokens_of(images if not isinstance(images, Tensor) else images[:1])
        pieces = (tokens.split(lengths, dim=1) for tokens in (forward, backward, targets))
        return [
            (cosines(ahead[:, :-step], target[:, step:]), cosines(back[:, step:], target[:, :-step]))
            for ahead, back, target, step in zip(*pieces, steps, strict=True)
        ]

    @torch.no_grad()
    def targets(self, images: Images) -> Tensor:
        """Embeddings of the patches alone (b, l, d).

        Without positions: these are fixed, and known of every place without looking at a picture.
        """
        if isinstance(images, Tensor):
            return self.encoder.patch_embed(images.to(self.encoder.patch_embed.proj.weight.dtype))
        return torch.cat([self.targets(image[None]) for image in images], dim=1)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm although they have two axes or more."""
        return keep_from_decay(self.encoder)


def cosines(predicted: Tensor, targets: Tensor) -> Tensor:
    """(b, l, d) twice -> (b, l), in float32 or better."""
    precise = torch.promote_types(predicted.dtype, torch.float32)
    return F.cosine_similarity(predicted.to(precise), targets.to(precise), dim=-1)
