"""A run that starts from a published backbone (`--init`): the fields its architecture sets, and its weights."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from launch.data.statistics import channels_of_bands
from launch.run.cli import argument_value, parse
from vim_backbone import SIZES, UserError, VimConfig, from_pretrained
from vim_backbone.folder import read_config
from vim_backbone.hub import find_backbone
from vim_backbone.preprocessing import Preprocessing

Config = TypeVar("Config")
TRANSFERRED = ("depth", "patch_size", "img_size", "scan", "class_token", "num_registers", "mixer_norm", "position",
            "channels")  # fmt: skip
"""Fields of the backbone's config that are fields of `ModelConfig`, too."""
RESAMPLED = ("patch_size", "img_size")
"""Those that a run may set otherwise: the weights are resampled."""
RUN_FIELDS = ("d_model", "stride", "in_chans", "channel_sets", "num_classes", "global_pool", "visible_share",
           "drop_path_rate")  # fmt: skip
"""Fields that a run decides, or that its size's name says; all others must be as in every named size."""


def backbone_folder(init: str) -> Path:
    """The folder of the backbone that `--init` names: its own, that of a run, or one of the Hub's cache.

    Raises UserError where there is none.
    """
    folder = Path(init).expanduser()
    if (folder / "backbone" / "config.json").is_file():
        return folder / "backbone"
    if (folder / "state.json").is_file():
        raise UserError(f"init {init} is a checkpoint: its run goes on with --resume, and publishes what --init takes")
    return find_backbone(init)


def model_arguments(init: str) -> list[str]:
    """Arguments that give a run the architecture of the backbone in a folder; those that the user gives come after.

    Raises UserError for a folder that has none, or one that no named size describes.
    """
    folder = backbone_folder(init)
    config = read_config(folder)
    names = [name for name, size in SIZES.items() if size["d_model"] == config.d_model]
    if not names:
        widths = ", ".join(f"{size['d_model']} ({name})" for name, size in SIZES.items())
        raise UserError(f"init {folder} has d_model {config.d_model}, which no size has: pretraining knows {widths}")
    usual = VimConfig(d_model=config.d_model, depth=config.depth)
    for field in fields(VimConfig):
        value, must = getattr(config, field.name), getattr(usual, field.name)
        if field.name not in (*TRANSFERRED, *RUN_FIELDS) and value != must:
            raise UserError(f"init {folder} has {field.name} {value}: pretraining knows {must} alone")
    return [f"--model.name={names[0]}", *(f"--model.{name}={_written(getattr(config, name))}" for name in TRANSFERRED)]


def parse_run(config_class: type[Config], argv: list[str], prog: str, description: str) -> Config:
    """As `parse`; what of `model` is not given is that of the weights that `--init` names.

    A resumed run needs its weights no more: where they are gone, its config.yaml says what they set.
    """
    init = argument_value(argv, "init")
    try:
        implied = model_arguments(init) if init else []
    except UserError:
        if not any(word.partition("=")[0] == "--resume" for word in argv):
            raise
        implied = []
    return parse(config_class, [*implied, *argv], prog, description)


def initial_weights(
    init: str, architecture: VimConfig, preprocessing: Preprocessing
) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor of an encoder of this architecture, from the backbone in a folder, and lines on how they came there.

    Raises UserError where the architectures differ in more than can be resampled, or in their bands where each is a
    token.
    """
    folder = backbone_folder(init)
    saved = read_config(folder)
    for name in ("d_model", *TRANSFERRED):
        before, now = getattr(saved, name), getattr(architecture, name)
        if before != now and name not in RESAMPLED:
            field = "model.name" if name == "d_model" else f"model.{name}"
            raise UserError(f"init {folder} has {name} {before}, and the run {now}: leave {field} out")
    changes: dict[str, Any] = {
        name: getattr(architecture, name) for name in (*RESAMPLED, *RUN_FIELDS) if name != "d_model"
    }
    if saved.channels == "tokens":
        changes["chosen_channels"] = channels_of_bands(folder, preprocessing)
    return from_pretrained(folder, **changes).state_dict(), [f"starts from {folder}: {_changes(saved, architecture)}"]


def _changes(saved: VimConfig, now: VimConfig) -> str:
    """What of the weights is not as it was, in words."""
    before, after = saved.grid(*saved.img_size), now.grid(*now.img_size)
    lines = ["all blocks as they are"]
    if saved.patch_size != now.patch_size:
        lines.append(f"patches resampled from {saved.patch_size} to {now.patch_size} pixels")
    elif saved.stride != now.stride:
        lines.append(f"stride {saved.stride} becomes {now.stride}")
    if before != after:
        lines.append(f"positions resampled from {before[0]} x {before[1]} to {after[0]} x {after[1]} patches")
    if saved.in_chans != now.in_chans and saved.channels == "tokens":
        lines.append(f"embeddings of {now.in_chans} of {saved.in_chans} bands")
    elif saved.in_chans != now.in_chans:
        lines.append(f"first convolution adapted from {saved.in_chans} to {now.in_chans} bands")
    if saved.num_classes:
        lines.append("classifier left out")
    return ", ".join([*lines, "what is not published (a decoder) fresh"])


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
