"""Loading a backbone from its folder or the Hub, with every tensor accounted for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vim_backbone.channels import check_sets
from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError, escaped, first_line
from vim_backbone.files import refuse_what_is_no_file
from vim_backbone.folder import WEIGHTS, read_config
from vim_backbone.hub import find_backbone
from vim_backbone.position import resize_table
from vim_backbone.preprocessing import read_preprocessing
from vim_backbone.transform import Transform
from vim_backbone.vim import VisionMamba

PATCH_WEIGHT = "patch_embed.proj.weight"
QUOTED = 100
"""Characters of a tensor's name that are shown, at most."""


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    size: int | tuple[int, int] | None = None,
    pad: bool = True,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> tuple[VisionMamba, Transform]:
    """A backbone for features, without its classifier, and what makes its input of pictures of any kind and size.

    Args:
        name: folder of a backbone, or its id on the Hub, "owner/name".
        revision: branch, tag or commit on the Hub.
        size: side, or (height, width) in pixels, that pictures are resized to; None: each keeps its size.
        pad: fill pictures up to what the stride divides; else the model refuses those that it does not divide.
        device: of the model and its input.
        overrides: as for `from_pretrained`, but for its channels; `num_classes` is 0 unless given.

    Raises:
        UserError: as `from_pretrained`, or preprocessor_config.json is damaged or of other channels.
    """
    if some := {"chosen_channels", "channel_sets"} & overrides.keys():
        raise UserError(f"load takes no {min(some)}: take from_pretrained, and give the model its input")
    folder = find_backbone(name, revision)
    changes: dict[str, Any] = {"num_classes": 0} | overrides
    model = from_pretrained(folder, **changes).to(device)
    return model, Transform(read_preprocessing(folder), model.config, size=size, pad=pad, device=device)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    chosen_channels: Sequence[int] | None = None,
    **overrides: Any,
) -> VisionMamba:
    """Read a backbone that `save_pretrained` wrote from a folder or the Hub, in evaluation mode.

    Args:
        name: the folder, or an id on the Hub, "owner/name".
        revision: branch, tag or commit on the Hub.
        chosen_channels: where channels are tokens, which of them the model keeps, in this order; all when None.
        overrides: fields of the config to change. Another `img_size` resamples the position table, another
            `patch_size` the first convolution, with the stride where it was a patch; another `in_chans` adapts that
            convolution, another `num_classes` puts on a fresh head; `drop_path_rate`, `global_pool` and `channel_sets`
            are free to change too.

    Raises:
        UserError: a file is missing, damaged, or does not fit; names the file or the tensor.
    """
    folder = find_backbone(name, revision)
    saved = read_config(folder)
    if chosen_channels is not None:
        check_sets([chosen_channels], range(saved.in_chans), "chosen_channels")
        overrides = {"in_chans": len(chosen_channels), "channel_sets": None} | overrides
    stride = {"stride": 0} if saved.stride == saved.patch_size else {}
    config = VimConfig.from_dict(saved.to_dict() | stride | overrides)
    refuse_what_is_no_file(folder / WEIGHTS)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / 'model.safetensors'}: {error}") from error
    check_sizes(saved, state, folder / WEIGHTS)
    check_channels(saved, config, folder, chosen_channels)
    if chosen_channels is not None:
        state["channel_embed"] = state["channel_embed"][:, list(chosen_channels)]
    fresh_head = config.num_classes not in (0, saved.num_classes)
    with torch.device("cpu" if fresh_head else "meta"):  # drawing what is then read takes ten times as long as reading
        model = VisionMamba(config)
    load_state(model, state, saved, folder / WEIGHTS)
    return model.eval()


def check_sizes(config: VimConfig, state: dict[str, Tensor], source: Path) -> None:
    """Raise UserError where the sizes of a config are not those of the weights, before a model of them takes memory."""
    depth = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    if depth != config.depth:
        raise UserError(f"{source} has {depth} blocks but depth is {config.depth} in config.json: one of them is wrong")
    mixer, d = "layers.0.mixer", config.d_inner
    inputs = 1 if config.channels == "tokens" else config.in_chans
    expected = {
        PATCH_WEIGHT: (config.d_model, inputs, config.patch_size, config.patch_size),
        f"{mixer}.A_log": (d, config.d_state),
        f"{mixer}.conv1d.weight": (d, 1, config.d_conv),
        f"{mixer}.dt_proj.weight": (d, config.dt_rank),
    }
    if config.channels == "tokens":
        expected["channel_embed"] = (1, config.in_chans, config.d_model)
    if config.num_classes:
        expected["head.weight"] = (config.num_classes, config.d_model)
    rows, columns = config.grid(*config.img_size)
    if "pos_embed" in state:
        tokens = state["pos_embed"].shape[1] if state["pos_embed"].dim() == 3 else 0
        extra = min(max(0, tokens - rows * columns), config.num_special)
        expected["pos_embed"] = (1, rows * columns + extra, config.d_model)
    for name, shape in expected.items():
        actual = tuple(state[name].shape) if name in state else "missing"
        if actual != shape:
            raise UserError(f"{source}: {name} is {actual}, config.json wants {shape}: one of them is wrong")


def check_channels(saved: VimConfig, config: VimConfig, source: Path, chosen: Sequence[int] | None) -> None:
    """Raise UserError where weights of mixed channels would have to become those of tokens, or for other channels."""
    if saved.channels == "mixed" and chosen is not None:
        raise UserError(f"{source} has channels 'mixed', of which none can be chosen: leave chosen_channels out")
    if saved.channels != config.channels:
        raise UserError(
            f"{source} has channels {saved.channels!r}, which cannot become {config.channels!r}: pretrain with "
            f"model.channels {config.channels}"
        )
    count = saved.in_chans if chosen is None else len(chosen)
    if saved.channels == "tokens" and config.in_chans != count:
        raise UserError(
            f"in_chans is {config.in_chans}: {source} has embeddings of {count} channels, choose of them with "
            "chosen_channels"
        )


def load_state(model: VisionMamba, state: dict[str, Tensor], saved: VimConfig, source: Path) -> None:
    """Put tensors of a model with config `saved` into `model`.

    Positions are resampled, the first convolution is adapted to other channels and patches, a head of another size is
    left fresh.
    Raises UserError naming a tensor that is missing, unknown or of the wrong shape.
    """
    state = dict(state)
    if saved.channels == "mixed" and saved.in_chans != model.config.in_chans and PATCH_WEIGHT in state:
        state[PATCH_WEIGHT] = adapt_input_conv(state[PATCH_WEIGHT], model.config.in_chans)
    if saved.patch_size != model.config.patch_size and PATCH_WEIGHT in state:
        state[PATCH_WEIGHT] = resample_patches(state[PATCH_WEIGHT], model.config.patch_size)
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
    meta = model.pos_embed.is_meta
    if meta:  # copies, because a file that is mapped into memory may change or be replaced
        state = {name: tensor.to(expected[name].dtype, copy=True) for name, tensor in state.items()}
    model.load_state_dict(state, assign=meta)


def adapt_input_conv(weight: Tensor, in_chans: int) -> Tensor:
    """The first convolution's weight (d_model, c, side, side) for other channels (d_model, in_chans, side, side).

    As timm has it for c = 3: the sum for one channel, else the channels again and again, times c / in_chans, so that
    the same value in all channels gives the same tokens.
    """
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-in_chans // channels), 1, 1)[:, :in_chans] * (channels / in_chans)


def resample_patches(weight: Tensor, side: int) -> Tensor:
    """The first convolution's weight (d_model, c, p, p) for patches of another side (d_model, c, side, side).

    By the pseudo-inverse of bicubic resizing (FlexiViT, arXiv 2212.08013, equation 4): larger patches that are resized
    smaller ones give the same tokens, smaller ones the nearest tokens that there are.
    """
    old = weight.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).reshape(-1, 1, old, old)
    resize = F.interpolate(basis, size=(side, side), mode="bicubic", antialias=True).flatten(1)  # (old^2, side^2)
    resampled = weight.flatten(2).double() @ torch.linalg.pinv(resize).mT
    return resampled.reshape(*weight.shape[:2], side, side).to(weight.dtype)


def check_names(expected: dict[str, Tensor], state: dict[str, Tensor], source: Path) -> None:
    """Raise UserError naming the first tensors of `state` that are missing, unknown or of another type or shape."""
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            some = ", ".join(escaped(name)[:QUOTED] for name in sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(f"{source} {problem} {len(names)} tensor(s): {some}; is it of another architecture?")
    for name, tensor in state.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():  # a head may have counters
            kind = "floating-point" if expected[name].is_floating_point() else "whole"
            raise UserError(f"{source}: {name} is {tensor.dtype}, wanted {kind} numbers")
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the model wants {tuple(expected[name].shape)}"
            )


def device_of(name: str) -> torch.device:
    """The device that a user names, cuda or cpu. Raises UserError where it cannot be used."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise UserError(f"--device {name} cannot be used ({first_line(error)}): give cuda or cpu") from error
    return device
