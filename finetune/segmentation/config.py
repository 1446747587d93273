"""Fields of a segmentation run."""

from dataclasses import dataclass, field
from typing import Literal

from finetune.config import FinetuneConfig, FinetuneOptim, LabelledData, Places
from finetune.memory_cache import Cache
from vim_backbone.errors import require


@dataclass(frozen=True, kw_only=True)
class SegmentationData(LabelledData):
    """Pictures, and a map of labels for each."""

    source: str = ""
    """Folder with images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png, as ADE20K (ADEChallengeData2016) has them; or a
    data set with columns of both: .parquet, .arrow or .tar file(s) by path, glob or URL, with {split} where splits have
    files of their own, a folder of `save_to_disk`, or hf:NAME. Not needed where `images` and `maps` say all."""
    images: Places = "images"
    """Folder of the pictures, below the source or anywhere: with a folder for each split in it, or with {split} in its
    place, or [of training, of evaluation]."""
    maps: Places = "annotations"
    """Folder of the maps, given as `images`: one channel, the value of a pixel is its label."""
    image_column: str | None = None
    """Column of the pictures in a data set; the first of type Image when not given."""
    map_column: str | None = None
    """Column of the maps in a data set; the next of type Image when not given."""
    train_split: str = "training"
    """Folder below both, or split of a data set, to train on."""
    val_split: str = "validation"
    """Folder below both, or split of a data set, to evaluate on."""
    cache: Cache = "none"
    """memory: training pictures and maps are decoded once, before the run, and held in the host's memory, where all
    reading processes share them; for a small set of large pictures."""
    num_classes: int | None = None
    """Number of classes; null: as many as objectInfo*.txt (ADE20K) or classes.txt (a name a line) in the source has."""
    zero_is_ignored: bool = True
    """Label 0 counts for nothing and class k has label k + 1, as in ADE20K; false: class k has label k."""
    values: list[int] | None = None
    """Value in the maps of each class, such as [0, 255] for masks in black and white; null: the labels above. Without
    a place in it 255 counts for nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        anywhere = self.images != "images" and self.maps != "annotations"
        remedy = "give a folder with images/ and annotations/, or data.images and data.maps"
        require(bool(self.source) or anywhere, "data.source", self.source, remedy)
        few = self.num_classes is not None and not 2 <= self.num_classes <= 254
        require(not few, "data.num_classes", self.num_classes, "it must be 2 to 254")
        values = self.values or [0, 1]
        good = 2 <= len(values) <= 254 and len(set(values)) == len(values) and all(0 <= v < 65536 for v in values)
        require(good and self.values != [], "data.values", self.values, "give 2 to 254 different numbers below 65536")
        same = self.values is None or self.num_classes in (None, len(self.values))
        require(same, "data.num_classes", self.num_classes, f"data.values has {len(values)}; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How a training crop of model.img_size is cut, after mmsegmentation."""

    ratio: tuple[float, float] = (0.5, 2.0)
    """Range of the factor on a picture that was scaled to cover the crop: of a square one, to its side."""
    category_max: float = 0.75
    """Largest share of the labelled pixels that one class may have; tried ten times."""
    flip: float = 0.5
    """Share of the crops that are mirrored left to right."""
    photometric: bool = True
    """Distort brightness, contrast, saturation and hue."""

    def __post_init__(self) -> None:
        require(0 < self.ratio[0] <= self.ratio[1], "crop.ratio", self.ratio, "give [lowest, highest], both positive")
        require(0 < self.category_max <= 1, "crop.category_max", self.category_max, "it must lie in (0, 1]")
        require(0 <= self.flip <= 1, "crop.flip", self.flip, "it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class SegmentationHead:
    """UperNet (arXiv 1807.10221) and its auxiliary head."""

    channels: int = 192
    """Width of UperNet: 192 for a Tiny backbone, 384 for a Small."""
    layers: list[int] | None = None
    """Four blocks, counted from 1, whose features are used; null: a quarter, half, three quarters, all of them."""
    auxiliary_channels: int = 256
    """Width of the auxiliary head on the third of the four."""
    auxiliary_weight: float = 0.4
    """Factor on its loss; 0 leaves it out."""
    dropout: float = 0.1
    """Share of the channels dropped before the classifiers."""
    loss: Literal["cross_entropy", "dice_ce"] = "cross_entropy"
    """Of both heads; dice_ce adds soft Dice, which counts a class of few pixels as much as one of many."""

    def __post_init__(self) -> None:
        require(self.channels >= 1, "head.channels", self.channels, "it must be at least 1")
        require(self.layers is None or len(self.layers) == 4, "head.layers", self.layers, "give four blocks")
        require(self.auxiliary_weight >= 0, "head.auxiliary_weight", self.auxiliary_weight, "it cannot be negative")


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """How a whole picture is segmented."""

    __test__ = False  # no test case, whatever pytest makes of its name

    mode: Literal["slide", "whole"] = "slide"
    """slide: overlapping windows of model.img_size, averaged; whole: the picture as one scan."""
    stride: float = 2 / 3
    """From one window to the next, as a share of its side."""
    flip: bool = False
    """Average with the prediction for the mirror image."""

    def __post_init__(self) -> None:
        require(0 < self.stride <= 1, "test.stride", self.stride, "it must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(FinetuneConfig):
    """Segmentation. For ADE20K: Vim's recipe with model.img_size 512, batch_size 16, steps 160000."""

    name: str = "segmentation"
    """Name of the run; its folder is OUT/NAME."""
    mode: Literal["train", "evaluate"] = "train"
    """train: fine-tune and evaluate; evaluate: score a trained run, with --resume."""
    data: SegmentationData
    crop: CropConfig = field(default_factory=CropConfig)
    head: SegmentationHead = field(default_factory=SegmentationHead)
    test: TestConfig = field(default_factory=TestConfig)
    optim: FinetuneOptim = field(
        default_factory=lambda: FinetuneOptim(base_lr=1e-3, weight_decay=0.01, layer_decay=0.92, schedule="linear")
    )
