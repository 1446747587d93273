"""What is kept of a picture: pooled features, class token, patches, streams of chosen blocks.

Shape letters: d d_model, rows and columns of patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vim_backbone.errors import UserError, nearest
from vim_backbone.vim import VisionMamba

KINDS = ("pooled", "class", "patches")


@dataclass(frozen=True)
class Selection:
    """The features to keep."""

    kinds: tuple[str, ...] = ("pooled",)
    """Of KINDS: what the classifier reads (d,), the class token (d,), the last normed patches (rows, columns, d)."""
    layers: tuple[int, ...] = ()
    """Blocks, counted from 0, whose stream is kept: its mean over the patches (d,), with "patches" its patches too."""

    @classmethod
    def of(cls, model: VisionMamba, kinds: Sequence[str], layers: Sequence[int]) -> "Selection":
        """Checked against the model; layers may be counted from the end. Raises UserError for what it has not."""
        for kind in kinds:
            if kind not in KINDS:
                raise UserError(f"--features has {kind!r}: {nearest(kind, KINDS)}")
        if not kinds and not layers:
            raise UserError(f"nothing is wanted: give --features, of {', '.join(KINDS)}, or --layers")
        if "class" in kinds and model.config.class_token == "none":
            raise UserError("--features has class, but the backbone has no class token: take pooled")
        depth = len(model.layers)
        for layer in layers:
            if not -depth <= layer < depth:
                raise UserError(f"--layers has {layer}: the backbone has {depth} blocks, counted from 0")
        return cls(tuple(dict.fromkeys(kinds)), tuple(dict.fromkeys(layer % depth for layer in layers)))

    @property
    def vectors(self) -> list[str]:
        """Names of what has one vector a picture."""
        return [kind for kind in self.kinds if kind != "patches"] + [f"layer_{layer}" for layer in self.layers]

    @property
    def maps(self) -> list[str]:
        """Names of what has one vector a patch."""
        return ["patches", *(f"layer_{layer}_patches" for layer in self.layers)] if "patches" in self.kinds else []


@torch.inference_mode()
def compute(model: VisionMamba, images: list[Tensor], selection: Selection) -> list[dict[str, Tensor]]:
    """Pictures (c, h, w) of any sizes, packed into one row -> what is wanted of each by name, and always "pooled".

    Maps are (rows, columns, d), all float32 on CPU.
    """
    if selection.layers:
        tokens, streams = model.forward_intermediates(images, selection.layers, output_fmt="NLC")
    else:
        tokens, streams = model.forward_features(images), []
    pooled = model.forward_head(tokens, pre_logits=True).float().cpu()  # once for all: each copy waits for a GPU
    rows = []
    for number, image in enumerate(images):
        grid = model.config.grid(*image.shape[-2:])
        features = {"pooled": pooled[number]}
        if "class" in selection.kinds:
            features["class"] = tokens[number][0]
        if "patches" in selection.kinds:
            # where channels are tokens, a place has the mean over them, as in `forward_intermediates`
            features["patches"] = tokens[number][model.num_prefix_tokens :].unflatten(0, (*grid, -1)).mean(2)
        for layer, stream in zip(selection.layers, streams, strict=True):
            features[f"layer_{layer}"] = stream[number].mean(0)
            if selection.maps:
                features[f"layer_{layer}_patches"] = stream[number].unflatten(0, grid)
        rows.append({name: feature.float().cpu() for name, feature in features.items()})
    return rows
