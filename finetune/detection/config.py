"""Fields of a detection run."""

from dataclasses import dataclass, field
from typing import Literal

from finetune.config import FinetuneConfig, FinetuneOptim, LabelledData, Places
from finetune.memory_cache import Cache
from vim_backbone.errors import require


@dataclass(frozen=True, kw_only=True)
class DetectionData(LabelledData):
    """Pictures with a COCO file for each split."""

    source: str = ""
    """Folder with SPLIT/* and annotations/instances_SPLIT.json, as COCO has them; any category ids will do. Or a data
    set with a column of objects: .parquet, .arrow or .tar file(s) by path, glob or URL, with {split} where splits have
    files of their own, a folder of `save_to_disk`, or hf:NAME. Not needed where `images` and `annotations` say all."""
    annotations: Places = "annotations/instances_{split}.json"
    """COCO file of a split, below the source or anywhere, such as {split}.json; or [of training, of evaluation]."""
    images: Places = "{split}"
    """Folder of the pictures of a split, below the source or anywhere, such as images where all splits share one; or
    [of training, of evaluation]."""
    image_column: str | None = None
    """Column of the pictures in a data set; the first of type Image when not given."""
    objects_column: str | None = None
    """Column of the objects in a data set, each with bbox and category; the first such when not given."""
    boxes: Literal["xywh", "xyxy"] = "xywh"
    """What bbox is in a data set: left, upper, width, height as COCO has it, or left, upper, right, lower."""
    train_split: str = "train"
    """Split to train on; train2017 for COCO."""
    val_split: str = "val"
    """Split to evaluate on; val2017 for COCO."""
    cache: Cache = "none"
    """memory: training pictures are decoded once, before the run, and held in the host's memory, where all reading
    processes share them; for a small set of large pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        anywhere = self.images != DetectionData.images and self.annotations != DetectionData.annotations
        remedy = "give a folder with annotations/instances_train.json, or data.images and data.annotations"
        require(bool(self.source) or anywhere, "data.source", self.source, remedy)

    @property
    def one_for_all(self) -> bool:
        """Whether training and evaluation have the same annotations."""
        places, train_split = self.annotations, self.train_split
        if isinstance(places, tuple):
            return places[0] == places[1]
        return train_split == self.val_split or ("{split}" not in places)


@dataclass(frozen=True, kw_only=True)
class JitterConfig:
    """Large-scale jitter: a picture is rescaled, then cropped or padded to the square of model.img_size."""

    scale: tuple[float, float] = (0.1, 2.0)
    """Range of the factor on a picture that was fitted into the square; [1, 1] for none."""
    flip: float = 0.5
    """Share of the pictures that are mirrored left to right."""

    def __post_init__(self) -> None:
        require(0 < self.scale[0] <= self.scale[1], "jitter.scale", self.scale, "give [lowest, highest], both positive")
        require(0 <= self.flip <= 1, "jitter.flip", self.flip, "it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class DetectionHead:
    """ViTDet's (arXiv 2203.16527) pyramid and heads."""

    cascade: bool = False
    """Cascade Mask R-CNN: three box heads, for IoU 0.5, 0.6 and 0.7; false: Mask R-CNN."""
    masks: bool = True
    """Segment the instances too; false where the data has boxes alone."""
    channels: int = 256
    """Width of the pyramid and of the convolutions of all heads."""
    box_width: int = 1024
    """Width of the box heads' linear layer."""
    anchor_scale: float = 8.0
    """Side of an anchor, in strides of its level."""
    proposals: int = 1000
    """Proposals of a picture that reach the box heads."""
    samples: int = 512
    """Proposals of a picture that a training step samples."""
    detections: int = 100
    """Most detections in a picture."""
    min_score: float = 0.05
    """Detections below it are dropped."""

    def __post_init__(self) -> None:
        for name in ("channels", "box_width", "proposals", "samples", "detections"):
            require(getattr(self, name) >= 1, f"head.{name}", getattr(self, name), "it must be at least 1")
        require(self.anchor_scale > 0, "head.anchor_scale", self.anchor_scale, "it must be positive")


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """How a whole picture is evaluated."""

    __test__ = False  # no test case, whatever pytest makes of its name

    scales: list[float] = field(default_factory=lambda: [1.0])
    """Sides of the squares that a picture is fitted into, as factors on model.img_size; several: multi-scale testing,
    the best of the detections that overlap."""
    flip: bool = False
    """Detect in the mirror image too."""

    def __post_init__(self) -> None:
        good = bool(self.scales) and all(0.1 <= scale <= 10 for scale in self.scales)
        require(good, "test.scales", self.scales, "give one factor or more, each in [0.1, 10]")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(FinetuneConfig):
    """Detection. For COCO: ViTDet's recipe with model.img_size 1024, batch_size 64, steps 184375, warm-up 250."""

    name: str = "detection"
    """Name of the run; its folder is OUT/NAME."""
    mode: Literal["train", "evaluate"] = "train"
    """train: fine-tune and evaluate; evaluate: score a trained run, with --resume."""
    data: DetectionData
    jitter: JitterConfig = field(default_factory=JitterConfig)
    head: DetectionHead = field(default_factory=DetectionHead)
    test: TestConfig = field(default_factory=TestConfig)
    optim: FinetuneOptim = field(
        default_factory=lambda: FinetuneOptim(base_lr=4e-4, weight_decay=0.1, layer_decay=0.7, schedule="steps")
    )
