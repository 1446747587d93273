"""What a downstream task is: the contract between a task's folder and the training loop, predictions and sweeps.

A new task is a folder beside `classification/` with its config, data, model, evaluation and predictions, and a line in
registry.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.backbone import Pretrained, undecayed
from finetune.config import FinetuneConfig
from launch.data.bad_pictures import Named
from launch.data.images import check_megapixels
from launch.data.pictures import Picture
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.preprocessing import RGB, Preprocessing
from vim_backbone.vim import Images

ConfigT = TypeVar("ConfigT", bound=FinetuneConfig, covariant=True)
MAX_MEGAPIXELS = 200.0
"""Largest picture that is decoded whole for a prediction, in millions of pixels."""
Prediction = dict[str, Any]
"""What a model says of one picture, as plain data: a row of predictions.json."""


class Samples(Named, Protocol):
    """Labelled pictures by index."""

    def draw(self, index: int) -> tuple[Any, Any]:
        """Picture and target; augmentations draw from the global generators, which the caller seeds.

        May raise anything for a sample that cannot be used.
        """
        ...

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Samples to the pictures and the targets of a batch."""
        ...


class BatchedSamples(ABC):
    """Labelled pictures by index that make whole batches, in the training process and on its device."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call sample `index` in messages."""

    @abstractmethod
    def batch(self, seed: int, items: Sequence[tuple[int, ...]]) -> "LabelledBatch":
        """Samples (epoch, index), or (epoch, index, counted), their randomness keyed by (seed, epoch, index)."""


class LabelledBatch(NamedTuple):
    """Samples of one forward pass."""

    images: Any
    """Pictures as `Samples.collate` gives them; None where a sample had to be given up."""
    targets: Any
    """Targets as `Samples.collate` gives them."""
    names: list[str]
    bad: list[tuple[str, str]]
    """Samples passed over, with the reason."""
    numbers: list[int]
    """Index of each sample."""
    counted: list[bool]
    """Whether an evaluation counts the sample: not one that stands in for another, or fills up a share."""


@dataclass
class EvaluationResult:
    """Scores of an evaluation, and what it writes. On the main process; the others hold an empty one."""

    metrics: dict[str, float] = field(default_factory=dict)
    write: Callable[[Path], None] = lambda folder: None  # noqa: ARG005
    """Writes tables and pictures into a folder."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Samples that could not be read and are not counted, with the reason."""


class TaskModel(nn.Module):
    """A backbone with what the task puts on it."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.backbone = VisionMamba(config)

    def feature_maps(self, images: Images, indices: Sequence[int]) -> list[Tensor]:
        """What blocks give, normed, each (b, d_model, rows, columns); images of one size, a list where bands differ."""
        options: dict[str, Any] = {"norm": True, "stop_early": True, "intermediates_only": True}
        maps = self.backbone.forward_intermediates(images, indices, **options)
        return [of_block if isinstance(of_block, Tensor) else torch.stack(of_block) for of_block in maps]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm."""
        return undecayed(self, self.backbone)


class Drawing(NamedTuple):
    """What is drawn of a prediction."""

    path: Path
    """The file; others of the prediction are beside it, with more after its stem."""
    enabled: bool = True
    """Whether it is drawn at all."""


class Predictor(ABC):
    """A trained model of one task at work on pictures."""

    def __init__(self, description: dict[str, Any], device: torch.device) -> None:
        """A model with fresh weights, as `Task.description` describes it."""
        self.description = description
        self.device = device
        self.classes: list[str] = description["classes"]
        self.config = VimConfig.from_dict(description["backbone"])
        saved = description.get("preprocessing")  # not in those of older versions
        self.preprocessing = RGB if saved is None else Preprocessing.from_dict(saved)
        self.model = self.new_model().to(device).eval()

    @abstractmethod
    def new_model(self) -> TaskModel:
        """The model with fresh weights."""

    @abstractmethod
    def predict(self, images: list[Tensor], drawings: list[Drawing]) -> list[Prediction]:
        """Predict on pictures as `pixels_of` gives them, in one batch where the task can, and draw each in its file."""

    def predict_huge(self, picture: Picture, drawing: Drawing) -> Prediction:
        """Predict on a picture that is larger than memory. Raises BadPictureError where the task has no such way."""
        del drawing
        check_megapixels(*picture.size, MAX_MEGAPIXELS)
        raise NotImplementedError

    @abstractmethod
    def in_words(self, prediction: Prediction) -> str:
        """A prediction in a few words."""

    @abstractmethod
    def columns(self) -> list[str]:
        """Of the table of predictions, behind the file."""

    @abstractmethod
    def in_rows(self, prediction: Prediction) -> list[dict[str, Any]]:
        """A prediction as rows of that table; a column that is missing is empty."""


class Task(ABC, Generic[ConfigT]):
    """One downstream task with its data: what differs between classification, segmentation and detection."""

    name: ClassVar[str]
    """First argument of finetune/main.py."""
    summary: ClassVar[str]
    """One line for --help."""
    config_class: ClassVar[type[FinetuneConfig]]
    metrics: ClassVar[tuple[str, ...]]
    """Names of the scores that an evaluation has, for sweeps to choose from."""
    predictor: ClassVar[type[Predictor]]

    config: ConfigT
    train: Samples | BatchedSamples
    val: Samples | BatchedSamples
    classes: list[str]
    pretrained: Pretrained
    notes: list[str]
    """Lines for the user about the data."""

    @abstractmethod
    def __init__(self, config: ConfigT) -> None:
        """Open the data and read the backbone. Raises UserError where something cannot be used."""

    def prepare(self, device: torch.device) -> None:
        """Bring to a process's device what stays there, before a run has a folder. Raises UserError."""

    @abstractmethod
    def new_model(self) -> TaskModel:
        """The model with fresh weights."""

    @abstractmethod
    def losses(
        self, model: nn.Module, batch: LabelledBatch, device: torch.device, key: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Named losses of one forward pass, to be added up; `key` is for what is drawn in it."""

    @abstractmethod
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> EvaluationResult:
        """Evaluate the model on the validation data. For all processes."""

    def description(self) -> dict[str, Any]:
        """What the predictor needs, as plain data; a task adds its own."""
        return {
            "classes": self.classes,
            "backbone": self.pretrained.config.to_dict(),
            "preprocessing": self.pretrained.preprocessing.to_dict(),
        }

    @property
    def evaluates_only(self) -> bool:
        """Whether the run takes no step."""
        return self.config.mode != "train"

    def eval_batch_size(self, accelerator: Accelerator) -> int:
        """Samples of a forward pass in evaluation: as in training."""
        parts = accelerator.num_processes * self.config.accumulation
        return max(1, self.config.batch_size // parts)

    @property
    def pictured(self) -> set[int]:
        """Validation samples whose predictions are drawn, spread evenly over all."""
        total, count = len(self.val), min(self.config.pictures, len(self.val))
        return {i * total // count for i in range(count)}
