"""Official hustvl/Vim checkpoints to the folder format: `python -m vim_backbone.convert CHECKPOINT.pth OUT_DIR`."""

import argparse
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError, first_line
from vim_backbone.files import refuse_what_is_no_file
from vim_backbone.pretrained import check_sizes, load_state
from vim_backbone.vim import VisionMamba

SHARED = 8
"""How often tensors may share the bytes of a file, such as tied weights."""


def convert(checkpoint: str | Path, out_dir: str | Path, *, ema: bool = False, img_size: int | None = None) -> Path:
    """Convert an official checkpoint, or a raw state dict, into a backbone folder.

    The file is read with `weights_only` and argparse.Namespace as the only class allowed besides tensors.

    Args:
        ema: take the averaged weights ("model_ema") instead of "model".
        img_size: side in pixels of the pictures it was trained on; found from the file when None.

    Raises:
        UserError: no such file, no Vim checkpoint, or a tensor that is missing, unknown or misshapen, by name.
    """
    path = Path(checkpoint)
    state, trained_side = read_checkpoint(path, ema)
    config = infer_config(state, path, img_size or trained_side)
    check_sizes(config, state, path)
    model = VisionMamba(config)
    load_state(model, {name: tensor.float() for name, tensor in state.items()}, config, path)
    return model.save_pretrained(out_dir)


def read_checkpoint(path: Path, ema: bool) -> tuple[dict[str, Tensor], int | None]:
    """The state dict, and the picture side that the training arguments in the file name, if any."""
    refuse_what_is_no_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is no checkpoint that can be read safely: {first_line(error)}") from error
    except Exception as error:  # the reader of a damaged file may raise anything
        raise UserError(f"{path} is damaged or no PyTorch checkpoint: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, wanted a dict of tensors or a training checkpoint")
    side = None
    if "model" in data or "model_ema" in data:
        part = "model_ema" if ema else "model"
        if not isinstance(data.get(part), dict):
            raise UserError(f"{path} has no {part!r} part; it has {', '.join(map(str, data))}")
        side = getattr(data.get("args"), "input_size", None)
        data = data[part]
    elif ema:
        raise UserError(f"{path} is a raw state dict without averaged weights: leave out --ema")
    for name, tensor in data.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(tensor).__name__}, wanted a tensor")
        if not isinstance(name, str):
            raise UserError(f"{path}: a tensor is called {name!r}, wanted a text")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path}: {name!r} is {tensor.dtype}, {tensor.layout}, wanted plain floating-point numbers")
    if sum(tensor.nbytes for tensor in data.values()) > SHARED * path.stat().st_size:
        raise UserError(f"{path}: its tensors are larger than the file: it is no checkpoint that training wrote")
    if side is not None and (type(side) is not int or side < 1):
        raise UserError(f"{path}: the training arguments have input_size {side!r}, wanted a side in pixels")
    return data, side


def infer_config(state: dict[str, Tensor], path: Path, img_size: int | None) -> VimConfig:
    """The architecture behind an official state dict, from the shapes of its tensors."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state:
            raise UserError(f"{path} lacks the tensor {name!r}: it is no official Vim checkpoint")
        if state[name].dim() != dimensions or 0 in state[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(state[name].shape)}, wanted {dimensions} dimensions")
        return state[name].shape

    mixer = "layers.0.mixer"
    d_model, in_chans, patch_size, _ = shape("patch_embed.proj.weight", 4)
    d_inner, d_state = shape(f"{mixer}.A_log", 2)
    shape("cls_token", 3)
    num_patches = shape("pos_embed", 3)[1] - 1
    side = math.isqrt(num_patches)
    if side < 1 or side * side != num_patches:
        raise UserError(f"{path}: pos_embed has {num_patches} patches, which is no square grid")
    stride, img_size = _stride_and_size(side, patch_size, img_size, path)
    return VimConfig(
        d_model=d_model,
        depth=len({name.split(".")[1] for name in state if name.startswith("layers.")}),
        img_size=(img_size, img_size),
        patch_size=patch_size,
        stride=stride,
        in_chans=in_chans,
        num_classes=shape("head.weight", 2)[0] if "head.weight" in state else 0,
        d_state=d_state,
        d_conv=shape(f"{mixer}.conv1d.weight", 3)[-1],
        expand=max(1, d_inner // d_model),
        dt_rank=shape(f"{mixer}.dt_proj.weight", 2)[1],
    )


def _stride_and_size(side: int, patch_size: int, img_size: int | None, path: Path) -> tuple[int, int]:
    """Stride and picture side behind a grid of `side` patches: half-overlapping patches give odd grids of 224."""
    if img_size is None:
        half = patch_size // 2
        img_size = (side - 1) * half + patch_size if side == 27 else side * patch_size
    if side == 1:
        return patch_size, img_size
    stride, rest = divmod(img_size - patch_size, side - 1)
    if rest or not 1 <= stride <= patch_size or img_size % stride:
        raise UserError(
            f"{path}: {side} x {side} patches of {patch_size} pixels fit no stride at {img_size} pixels; "
            "give the right --img-size"
        )
    return stride, img_size


def main(argv: list[str] | None = None) -> Any:
    """Command line; prints one line on an error and returns 2."""
    parser = argparse.ArgumentParser(prog="python -m vim_backbone.convert", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="official .pth file, or a raw state dict")
    parser.add_argument("out_dir", type=Path, help="folder to write the backbone into")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    parser.add_argument("--img-size", type=int, help="side of the training pictures in pixels (found from the file)")
    arguments = parser.parse_args(argv)
    try:
        folder = convert(arguments.checkpoint, arguments.out_dir, ema=arguments.ema, img_size=arguments.img_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - command line
        return 2
    print(folder)  # noqa: T201 - command line
    return 0


if __name__ == "__main__":
    sys.exit(main())
