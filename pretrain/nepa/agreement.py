"""The picture of what next embedding prediction learned: where a patch could be predicted, and from where."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.strips import by_patch
from vim_backbone import VimConfig
from vim_backbone.preprocessing import Preprocessing, as_rgb, to_pixels
from vim_backbone.vim import Images

COLUMNS = ("input", "predicted from before it", "predicted from after it")


def agreement_strips(
    images: Images, agreements: Sequence[tuple[Tensor, Tensor]], config: VimConfig, preprocessing: Preprocessing
) -> list[np.ndarray]:
    """(3 columns, h, w, 3) in [0, 1] for each image (c, h, w), normalised, and its cosines (1, l - t) twice.

    Cosines up to 0 are black, 1 is white; the patch that has none, the first or the last, is grey. Where channels are
    tokens a patch has their mean; of more than three bands the first three are drawn.
    """
    strips = []
    for image, (ahead, back) in zip(images, agreements, strict=True):
        tokens = config.tokens_a_patch(len(image))
        panes = [as_rgb(to_pixels(image, preprocessing))]
        for cosines, nothing in ((ahead, (tokens, 0)), (back, (0, tokens))):
            values = F.pad(cosines[0].clamp(min=0), nothing, value=0.35).unflatten(0, (-1, tokens)).mean(1)
            patches = values.unflatten(0, config.grid(*image.shape[-2:]))
            panes.append(by_patch(patches, config.patch_size).to(panes[0].dtype).expand_as(panes[0]))
        strips.append(torch.stack(panes).permute(0, 2, 3, 1).cpu().numpy())
    return strips
