"""The frozen teacher: a model of timm whose patch features are what is learned.

It is no module of the model that is trained: no checkpoint holds it, no strategy spreads or averages it, no optimizer
sees it. Every process has one, which is read when it is first used.

Shape letters: b batch, c channels, l patches, d width of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim_backbone.timm  # noqa: F401 - a backbone of ours can teach
from vim_backbone import VimConfig
from vim_backbone.errors import UserError, first_line, require
from vim_backbone.preprocessing import PREPROCESSOR, Preprocessing, read_preprocessing
from vim_backbone.vim import Images, VisionMamba

Method = TypeVar("Method")
FOLDER = "local-dir:"
"""Begins the name of a folder, as in timm."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What is learned from a teacher."""

    teacher: str = ""
    """A model of timm: local-dir:FOLDER, with config.json and model.safetensors, or a name, such as
    vit_base_patch14_dinov2.lvd142m, or hf-hub:OWNER/NAME, with pretrained. A published backbone can teach, too."""
    pretrained: bool = False
    """Fetch the weights of a named teacher, where they are not in the Hub's cache."""
    at: Literal["visible", "hidden", "whole"] = "visible"
    """visible: the encoder sees what the mask leaves, and learns the teacher's features there; fastest. hidden: it
    learns them at the hidden patches, through a decoder. whole: it sees and learns all."""
    loss: Literal["cosine", "smooth_l1"] = "cosine"
    """Between prediction and the teacher's features, normalised patch by patch (LayerNorm)."""


def untraced(method: Method) -> Method:
    """`torch.compile` calls it as it is."""
    return cast(Method, torch.compiler.disable(method))


class Description(NamedTuple):
    """What is known of a teacher without its weights."""

    width: int
    stride: int
    """Pixels from one patch to the next."""
    parameters: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: nn.Module
    """On the meta device."""


class Teacher:
    """The frozen model. It sees the views that the encoder is trained on, whole and resized to as many patches."""

    def __init__(self, settings: DistillConfig, preprocessing: Preprocessing) -> None:
        """`preprocessing` is what was done to the images.

        Raises UserError where a published backbone takes other bands, or values of another range.
        """
        self.settings = settings
        folder = Path(settings.teacher.removeprefix(FOLDER))
        if settings.teacher.startswith(FOLDER) and is_published(folder):
            other = read_preprocessing(folder)
            if (other.bands, other.scale) != (preprocessing.bands, preprocessing.scale):
                raise UserError(
                    f"distill.teacher is {settings.teacher!r}: it takes bands {other.bands or 'RGB'} of {other.scale}, "
                    f"and the pictures are {preprocessing.bands or 'RGB'} of {preprocessing.scale}; take another"
                )
        self.description = describe(settings.teacher)
        """What is known of it."""
        self._model: nn.Module | None = None
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        its_mean, its_std = (torch.tensor(v).view(-1, 1, 1) for v in (self.description.mean, self.description.std))
        self._scale, self._shift = std / its_std, (mean - its_mean) / its_std

    @untraced
    @torch.no_grad()
    def features(self, images: Images, config: VimConfig) -> Tensor:
        """Features (b, l, d) of all patches, normalised each, float32; of a list one row (1, l, d).

        Args:
            images: normalised pictures (b, c, h, w), or a list of pictures (c, h, w).
            config: of the encoder, whose patches they are.

        Raises:
            UserError: weights that cannot be read.
        """
        if not isinstance(images, Tensor):
            return torch.cat([self.features(image[None], config) for image in images], dim=1)
        grid = config.grid(*images.shape[-2:])
        model = self._on(images.device)
        size = tuple(side * self.description.stride for side in grid)
        pixels = images.float()
        if size != tuple(images.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        features = last_features(model, pixels * self._scale + self._shift).flatten(2).transpose(1, 2).float()
        return F.layer_norm(features, features.shape[-1:])

    def _on(self, device: torch.device) -> nn.Module:
        """The model on a device, read at the first call."""
        if self._model is None:
            with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read; the run's draws stay
                self._model = read(self.settings.teacher)
            self._model.requires_grad_(False).eval()
        if self._scale.device != device:
            self._model.to(device)
            self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self._model


def is_published(folder: Path) -> bool:
    """Whether a folder has a backbone of ours, with what is done to its pictures."""
    return (folder / PREPROCESSOR).is_file() and isinstance(describe(f"{FOLDER}{folder}").model, VisionMamba)


def last_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Maps (b, d, rows, columns) after the last block, normed."""
    options: dict[str, Any] = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
    forward: Any = model.forward_intermediates
    return forward(pixels, **options)[-1]


def create(name: str, *, pretrained: bool) -> nn.Module:
    """The model without a head, which takes pictures of any size where its kind can."""
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except (TypeError, UserError):  # an unknown option: convolutions need none
        return timm.create_model(name, **options)


def read(name: str) -> nn.Module:
    """The model with its weights. Raises UserError where they cannot be read."""
    try:
        return create(name, pretrained=True)
    except Exception as error:  # of timm and of the Hub: anything
        wrong = f"its weights cannot be read ({first_line(error)})"
        raise UserError(f"distill.teacher is {name!r}: {wrong}") from error


@lru_cache(maxsize=8)
def describe(name: str) -> Description:
    """What is known of a teacher. Raises UserError where there is none of this name, or it gives no maps."""
    try:
        with torch.device("meta"):
            model = create(name, pretrained=False)
    except Exception as error:  # of timm: anything
        raise UserError(f"distill.teacher is {name!r}: timm does not know it ({first_line(error)})") from error
    about, info = getattr(model, "pretrained_cfg", {}), getattr(model, "feature_info", None)
    remedy = "it gives no maps of features (timm's forward_intermediates); take another"
    require(bool(info) and hasattr(model, "forward_intermediates"), "distill.teacher", name, remedy)
    assert info is not None
    last = info[-1]
    return Description(
        width=last["num_chs"],
        stride=last["reduction"],
        parameters=sum(p.numel() for p in model.parameters()),
        in_chans=about["input_size"][0],
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        model=model,
    )


def check_teacher(settings: DistillConfig, config: VimConfig) -> None:
    """Raise UserError for a teacher that is not there, or does not see the pictures of an encoder patch by patch."""
    name = settings.teacher
    remedy = "objective distill learns the features of a model of timm; give local-dir:FOLDER, or a name and pretrained"
    require(bool(name), "distill.teacher", name, remedy)
    if name.startswith(FOLDER):
        folder = Path(name.removeprefix(FOLDER))
        for file in ("config.json", "model.safetensors"):
            require((folder / file).is_file(), "distill.teacher", name, f"the folder has no {file}")
    else:
        remedy = "its weights may have to be fetched; set distill.pretrained to true, or give local-dir:FOLDER"
        require(settings.pretrained, "distill.teacher", name, remedy)
    teacher = describe(name)
    remedy = "a teacher has features of all bands together; set model.channels to mixed"
    require(config.channels == "mixed", "model.channels", config.channels, remedy)
    if teacher.in_chans != config.in_chans:
        raise UserError(
            f"distill.teacher is {name!r}: it takes {teacher.in_chans} bands, and the pictures have {config.in_chans}"
        )
    check_grid(name, config.grid(*config.img_size))


@lru_cache(maxsize=64)
def check_grid(name: str, grid: Sequence[int]) -> None:
    """Raise UserError where a teacher does not make a grid of so many rows and columns."""
    teacher = describe(name)
    size = tuple(side * teacher.stride for side in grid)
    if isinstance(teacher.model, VisionMamba):  # its kernels do not run without weights
        its_grid = teacher.model.config.grid(*size)
    else:
        try:
            its_grid = tuple(
                last_features(teacher.model, torch.empty(1, teacher.in_chans, *size, device="meta")).shape[-2:]
            )
        except Exception as error:  # of timm: anything, mostly assertions on sizes
            raise UserError(
                f"distill.teacher is {name!r}: it does not take pictures of {size[0]} x {size[1]} pixels, which have "
                f"as many of its patches as the encoder has, {grid[0]} x {grid[1]} ({first_line(error)}); take another"
            ) from error
    if its_grid != tuple(grid):
        raise UserError(
            f"distill.teacher is {name!r}: it has {its_grid[0]} x {its_grid[1]} patches where the encoder has "
            f"{grid[0]} x {grid[1]}; take another"
        )
