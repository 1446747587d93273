"""Loading a backbone from its folder, with every tensor accounted for."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError
from vim_backbone.folder import WEIGHTS, read_config
from vim_backbone.position import resize_table
from vim_backbone.vim import VisionMamba


def from_pretrained(folder: str | Path, **overrides: Any) -> VisionMamba:
    """Read a backbone from a folder that `save_pretrained` wrote, in evaluation mode.

    Args:
        overrides: fields of the config to change. Another `img_size` resamples the position table, another
            `num_classes` puts on a fresh head; `drop_path_rate` and `global_pool` are free to change too.

    Raises:
        UserError: a file is missing, damaged, or does not fit; names the file or the tensor.
    """
    folder = Path(folder)
    saved = read_config(folder)
    config = VimConfig.from_dict(saved.to_dict() | overrides)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / 'model.safetensors'}: {error}") from error
    model = VisionMamba(config)
    load_state(model, state, saved, folder / WEIGHTS)
    return model.eval()


def load_state(model: VisionMamba, state: dict[str, Tensor], saved: VimConfig, source: Path) -> None:
    """Put tensors of a model with config `saved` into `model`: positions resampled, a head of another size left fresh.

    Raises UserError naming a tensor that is missing, unknown or of the wrong shape.
    """
    state = dict(state)
    if "pos_embed" in state and saved.grid(*saved.img_size) != model.grid_size:
        state["pos_embed"] = resize_table(
            state["pos_embed"], model.position_layout, saved.grid(*saved.img_size), model.grid_size
        )
    expected = model.state_dict()
    if saved.num_classes != model.num_classes:
        for name in ("head.weight", "head.bias"):
            state.pop(name, None)
            if name in expected:
                state[name] = expected[name]
    check_names(expected, state, source)
    model.load_state_dict(state)


def check_names(expected: dict[str, Tensor], state: dict[str, Tensor], source: Path) -> None:
    """Raise UserError naming the first tensors of `state` that are missing, unknown or of another shape."""
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(f"{source} {problem} {len(names)} tensor(s): {some}; is it of another architecture?")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the model wants {tuple(expected[name].shape)}"
            )
