"""The published backbone that a run starts from: found, read whole, and put into a model on any strategy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from finetune.config import BackboneConfig, FinetuneOptim, LabelledData
from launch.data.statistics import channels_of_bands, preprocessing_of
from launch.run.randomness import seed_of
from launch.state.sharding import fill
from vim_backbone import UserError, VimConfig, VisionMamba, from_pretrained
from vim_backbone.folder import read_config
from vim_backbone.preprocessing import PREPROCESSOR, RGB, Preprocessing, read_preprocessing


@dataclass(frozen=True)
class Pretrained:
    """A backbone as the run wants it: config and every tensor."""

    config: VimConfig
    tensors: dict[str, Tensor]
    preprocessing: Preprocessing = RGB
    """What is done to pictures for it."""

    def put_into(self, backbone: VisionMamba) -> None:
        """Fill the model, or its shards. For all processes."""
        fill(backbone, self.tensors.__getitem__)


def read_preprocessing_of(folder: Path, data: LabelledData) -> Preprocessing:
    """What is done to pictures for the backbone in a folder, or what `data.statistics` says in its place.

    Raises UserError for a file that is damaged or missing.
    """
    if data.statistics is not None:
        return preprocessing_of(data.statistics, None, None, None)
    preprocessing = read_preprocessing(folder)
    if (folder / "config.json").exists() and (channels := read_config(folder).in_chans) != preprocessing.in_chans:
        raise UserError(
            f"{folder} takes {channels} bands, but its {PREPROCESSOR} is missing or of {preprocessing.in_chans}: say "
            "which with data.statistics"
        )
    if preprocessing.bands is None and preprocessing.in_chans != 3:
        raise UserError(
            f"{folder} takes {preprocessing.in_chans} channels, but its {PREPROCESSOR} does not say which bands they "
            "are: say so with data.statistics"
        )
    return preprocessing


def read_backbone(
    folder: Path, config: BackboneConfig, seed: int, num_classes: int, preprocessing: Preprocessing = RGB, **more: Any
) -> Pretrained:
    """Read a backbone, its positions resampled to the run's size; a head of another size is fresh, keyed by the seed.

    Where `preprocessing` has another number of bands than the backbone was trained on, its first convolution is
    adapted; where its channels are tokens, those of the same bands are kept. `more` are further fields of the config to
    override, such as `img_size`.

    Raises UserError naming the file or tensor that is missing or does not fit, and bands that have no embedding.
    """
    saved = read_config(folder)
    drop_path_rate = 0.0 if config.freeze else config.drop_path_rate
    changes: dict[str, Any] = {
        "drop_path_rate": drop_path_rate,
        "num_classes": num_classes,
        "in_chans": preprocessing.in_chans,
        "channel_sets": preprocessing.channel_sets,
    } | more
    for name in ("img_size", "stride", "global_pool"):
        if (value := getattr(config, name)) is not None:
            changes[name] = value
    torch.manual_seed(seed_of(seed))
    if config.from_scratch:
        model = VisionMamba(VimConfig.from_dict(saved.to_dict() | changes))
    elif saved.channels == "tokens":
        model = from_pretrained(folder, chosen_channels=channels_of_bands(folder, preprocessing), **changes)
    else:
        model = from_pretrained(folder, **changes)
    return Pretrained(model.config, model.state_dict(), preprocessing)


def layer_scales(model: nn.Module, backbone: VisionMamba, optim: FinetuneOptim) -> dict[str, float]:
    """Parameter of the model -> factor on its learning rate; outside of the backbone, and on its classifier, 1."""
    depth = len(backbone.layers)
    layers: Any = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    of_parameter = {id(p): layers[name] for name, p in backbone.named_parameters()}
    # timm sorts norm_f to the last block; it comes after it, and MAE lets it learn at the full rate
    of_parameter[id(backbone.norm_f.weight)] = depth + 1
    return {
        name: optim.layer_scale(min(of_parameter.get(id(p), depth + 1), depth + 1), depth)
        for name, p in model.named_parameters()
    }


def undecayed(model: nn.Module, backbone: VisionMamba) -> set[str]:
    """Names in the model of the backbone's parameters that take no weight decay."""
    names = backbone.no_weight_decay()
    parameters = {id(p) for name, p in backbone.named_parameters() if name in names}
    return {name for name, p in model.named_parameters() if id(p) in parameters}
