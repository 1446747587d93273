"""Backbones in timm: importing this registers every size, and "vim", which takes any field of `VimConfig`."""

from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from vim_backbone.config import SIZES, VimConfig, named_config
from vim_backbone.doors import ARCHITECTURE, timm_description
from vim_backbone.errors import UserError
from vim_backbone.position import resize_table
from vim_backbone.preprocessing import RGB
from vim_backbone.vim import VisionMamba

TABLE = "pos_embed"
MAPS = 4
"""Blocks, the last ones, that features_only gives where out_indices is not set."""


def create(variant: str, sizes: dict[str, Any], pretrained: bool = False, **options: Any) -> nn.Module:
    """A backbone as `timm.create_model` makes it, or its feature extractor with features_only=True.

    Args:
        variant: name in timm.
        sizes: fields of the config that the name stands for.
        pretrained: read weights, of the folder or id that `timm.create_model` was given.
        options: fields of `VimConfig`, and what timm's builder takes.

    Raises:
        UserError: an unknown field, values that do not fit together, or weights of other positions.
    """
    if options.pop("drop_rate", 0.0):
        raise UserError("drop_rate is not 0: a Vim has no dropout, only drop_path_rate")
    fields = sizes | options
    config = VimConfig.from_dict({name: fields[name] for name in fields if name in VimConfig.__dataclass_fields__})
    options.setdefault("pretrained_cfg", None)
    options["pretrained_cfg"] = options["pretrained_cfg"] or timm_description(config, RGB)

    def build(**fields: Any) -> VisionMamba:
        return VisionMamba(VimConfig.from_dict(sizes | fields))

    features = {"out_indices": min(MAPS, config.depth), "feature_cls": "getter"}
    return build_model_with_cfg(
        build, variant, pretrained, pretrained_filter_fn=fit_positions, feature_cfg=features, **options
    )


def fit_positions(state: dict[str, Tensor], model: VisionMamba) -> dict[str, Tensor]:
    """The tensors of a folder with the position table resampled to the model's size."""
    saved_size = getattr(model, "pretrained_model_args", {}).get("img_size")
    table = state.get(TABLE)
    if table is None or saved_size is None:
        return state
    saved = VimConfig.from_dict(model.config.to_dict() | {"img_size": saved_size})
    grid = saved.grid(*saved.img_size)
    return state | {TABLE: resize_table(table, model.position_layout, grid, model.grid_size)}


def _register(name: str, sizes: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **options: Any) -> nn.Module:
        return create(name, sizes, pretrained, **options)

    entrypoint.__name__ = name
    entrypoint.__doc__ = f"{name}: {sizes or 'any fields of VimConfig'}."
    register_model(entrypoint)


def timm_name(size: str) -> str:
    """Name of a size of the papers in timm, such as vim_tiny_patch16_224."""
    config = named_config(size)
    return f"{size}_patch{config.patch_size}_{config.img_size[0]}"


for _size, _fields in SIZES.items():
    _register(timm_name(_size), _fields)
_register(ARCHITECTURE, {})
