"""What an objective of pretraining is; `pretrain/mae/` is one, `pretrain/config.py` names all."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from launch.planning.memory import Work
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.errors import UserError
from vim_backbone.memory import Recompute
from vim_backbone.preprocessing import RGB, Preprocessing
from vim_backbone.vim import Images


class Inputs(NamedTuple):
    """What a model takes beside the images, on its device."""

    arguments: tuple[Any, ...]
    """Of `forward`, after the images."""
    tokens: int
    """Patch tokens that the encoder scans, for `tokens_per_second`."""


def keep_from_decay(encoder: VisionMamba) -> set[str]:
    """Names of the encoder's parameters that decay would harm, in a model that has it as `encoder`."""
    return {f"encoder.{name}" for name in encoder.no_weight_decay()}


def require_no_overlap(config: VimConfig, show: str) -> None:
    """Raise UserError where patches overlap, which would show the encoder what it is not to see."""
    if config.stride != config.patch_size:
        raise UserError(
            f"stride {config.stride} differs from patch_size {config.patch_size}: patches that overlap {show}; "
            "pretrain with stride = patch_size"
        )


class Objective(Protocol):
    """What is learned from unlabelled pictures.

    Its model's `forward(images, *arguments)` gives the loss: under ZeRO-3 a model has its parameters inside `forward`
    alone. It has the backbone as `encoder`, and `no_weight_decay()`, which names those of `keep_from_decay` at least.
    Images are (b, c, h, w) normalised, or a list of (c, h, w) where their sizes differ. What is not abstract has the
    definition of an objective that takes every encoder, lets it see all patches, and draws nothing.
    """

    title: ClassVar[str]
    """Name of the method, as a sentence begins: "Masked autoencoding"."""
    picture_folder: ClassVar[str] = "predictions"
    """Folder of the run that takes what `show` draws."""
    architecture_fields: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the config's fields that a resumed run cannot change, beside "model."."""
    cost_fields: ClassVar[dict[str, str]] = {}
    """Fields of the config that change what a step costs, with an explanation: options of the planner."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """Its settings in a few words, for the model card."""
        ...

    @property
    def idle(self) -> dict[str, str]:
        """Groups of its settings that do nothing as it is set, and where that is so."""
        return {}

    def check(self, architecture: VimConfig) -> None:
        """Raise UserError for an architecture that the objective cannot train, naming the field."""

    def prepare(self, architecture: VimConfig, preprocessing: Preprocessing, *, native: bool) -> None:
        """Fetch and try what it needs, before a run has a folder. Raises UserError. For the main process.

        Args:
            preprocessing: of the pictures.
            native: views have sizes of their own.
        """

    def draw(self, grid: tuple[int, int], rng: torch.Generator) -> Tensor:
        """What is added to a view of so many rows and columns of patches, with an entry for each patch, such as its
        mask (l,) bool, True = hidden; drawn while it is read.
        """
        del rng
        return torch.zeros(grid[0] * grid[1], dtype=torch.bool)

    def draw_batch(self, grid: tuple[int, int], seeds: np.ndarray) -> Tensor:
        """As `draw`, of a batch of views (b, l) and a seed (b,) uint64 of each, where pictures are decoded before."""
        rng = torch.Generator()
        return torch.stack([self.draw(grid, rng.manual_seed(int(seed))) for seed in seeds])

    def visible(self, pixels: Tensor, extra: Tensor, patch_size: int) -> Tensor:
        """A view (3, h, w) in [0, 1] as the encoder gets it, to look at; `extra` is what `draw` added to it."""
        del extra, patch_size
        return pixels

    @property
    def visible_share(self) -> float:
        """Share of the patches that the encoder sees, which a pooled scan has to know."""
        return 1.0

    @abstractmethod
    def build(self, encoder: VisionMamba, preprocessing: Preprocessing = RGB) -> nn.Module:
        """The model, for pictures to which this was done.

        Raises UserError for an encoder that the objective cannot train.
        """
        ...

    def encoder(self, model: nn.Module) -> VisionMamba:
        """The encoder inside the model, which is what is published."""
        assert isinstance(model.encoder, VisionMamba)
        return model.encoder

    def inputs(
        self, extras: Tensor | Sequence[Tensor], device: torch.device, tokens: Sequence[int] | None = None
    ) -> Inputs:
        """What `draw` added to the views of a batch (stacked, or a list where shapes differ) -> inputs of the model.

        `tokens`: how many a patch has in each view; None for one.
        """
        del device
        counts = tokens or [1] * len(extras)
        return Inputs((), sum(len(extra) * count for extra, count in zip(extras, counts, strict=True)))

    @abstractmethod
    def show(
        self, model: nn.Module, images: Images, extras: Tensor | Sequence[Tensor], preprocessing: Preprocessing
    ) -> Callable[[str, Path], None]:
        """What was learned, as a function that draws it: (title, path of the PNG). For all processes.

        `preprocessing` is what was done to the images.
        """
        ...

    @abstractmethod
    def work(self, architecture: VimConfig, itemsize: int, recompute: Recompute) -> Work:
        """What one picture of the architecture's size costs.

        Args:
            architecture: of the encoder.
            itemsize: bytes of a number in the products, 2 or 4.
            recompute: what of a block the backward pass makes again.
        """
        ...
