"""A split of COCO's format as training and evaluation samples."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from finetune.config import place_of
from finetune.detection.coco import CocoFile, check_coco, read_coco
from finetune.detection.config import DetectionData, JitterConfig
from finetune.detection.rows import read_rows
from finetune.detection.tta import Sizes, TestTimeAugmentation
from finetune.memory_cache import TensorCache
from finetune.pixels import read_file, stacked
from launch.data.data_sets import Cell, Cells, data_set_of
from launch.data.folders import ImageFiles
from launch.data.images import BadPictureError
from launch.data.sources import ImageSource
from vim_backbone.errors import UserError, escaped
from vim_backbone.preprocessing import RGB, Preprocessing
from vim_backbone.vim import Images


@dataclass
class CocoSplit(CocoFile):
    """A checked COCO file or data set with its pictures; class k of the model is the k-th category, counted from 1."""

    folder: Path = Path()
    cells: Cells | None = None
    """The pictures, where they are in the rows of a data set."""
    max_megapixels: float = math.inf
    preprocessing: Preprocessing = RGB

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """File name, or row."""
        return escaped(self.images[index]["file_name"])

    def place(self, index: int) -> Path | Cell:
        """Where the picture is."""
        entry = self.images[index]
        return self.folder / entry["file_name"] if self.cells is None else self.cells[entry["id"]]

    @property
    def source(self) -> ImageSource:
        """The pictures alone."""
        if self.cells is not None:
            return self.cells.source
        return ImageFiles([self.folder / entry["file_name"] for entry in self.images])

    @property
    def title(self) -> str:
        """Where the pictures are, in messages."""
        return str(self.folder) if self.cells is None else self.cells.title

    def picture(self, index: int) -> Tensor:
        """(c, h, w) uint8 or float32. Raises BadPictureError where the file has not the size of the annotations."""
        entry = self.images[index]
        pixels = read_file(self.place(index), self.preprocessing, self.max_megapixels)
        if (size := tuple(pixels.shape[:0:-1])) != (entry["width"], entry["height"]):
            raise BadPictureError(f"it is {size} pixels, its annotations are for {entry['width'], entry['height']}")
        return pixels

    def labels(self) -> dict[int, int]:
        """Category id -> class, counted from 1."""
        return {category["id"]: k + 1 for k, category in enumerate(self.categories)}

    def ground_truth(self) -> dict[str, Any]:
        """What the evaluator wants: the file without what cannot be used."""
        annotations = [dict(entry) for entries in self.annotations.values() for entry in entries]
        for number, entry in enumerate(annotations, start=1):
            entry["id"] = number
        return {"images": self.images, "annotations": annotations, "categories": self.categories}


def open_coco(
    data: DetectionData, split: str, masks: bool, preprocessing: Preprocessing = RGB, classes: list[str] | None = None
) -> CocoSplit:
    """Read one split; `classes` are those of training, where they are known.

    What cannot be used is left out and named in `notes`. Raises UserError where the file or the folder is missing or is
    not in COCO's format, and for a data set without objects.
    """
    if data.source and (place := data_set_of(data.source, split)):
        content, cells = read_rows(data, place, classes)
        file = check_coco(content, f"{place.title} {split}", masks)
        read = (file.images, file.annotations, file.categories, file.notes)
        return CocoSplit(*read, Path(), cells, data.max_megapixels, preprocessing)
    root = Path(data.source).expanduser()
    path, folder = (
        place_of(data.source, places, split, data.train_split) for places in (data.annotations, data.images)
    )
    if data.source and root.is_dir() and not path.exists() and (others := sorted(root.glob("*.json"))):
        raise UserError(
            f"{path} does not exist, but {others[0].name} does: make it a file for each split, such as train.json and "
            "val.json, and set data.annotations to {split}.json, data.images to the folder of the pictures"
        )
    file = read_coco(path, masks)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: it must hold the pictures that {path} names")
    read = (file.images, file.annotations, file.categories, file.notes)
    return CocoSplit(*read, folder, None, data.max_megapixels, preprocessing)


class TrainPictures:
    """Pictures with boxes and masks, jittered; pictures without an object are left out."""

    def __init__(self, split: CocoSplit, size: tuple[int, int], jitter: JitterConfig, masks: bool) -> None:
        self.split = split
        self.size = size
        self.masks = masks
        self.labels = split.labels()
        objects = [[a for a in split.annotations[entry["id"]] if not a["iscrowd"]] for entry in split.images]
        self.used = [index for index, entries in enumerate(objects) if entries]
        self.objects = objects
        if not self.used:
            raise UserError(f"no picture of {split.title} has an object to train on")
        if empty := len(objects) - len(self.used):
            split.notes.append(f"{empty} of {len(objects)} pictures of {split.title} have no object: not trained on")
        self.jitter = jitter
        self._cache: TensorCache | None = None

    def __len__(self) -> int:
        return len(self.used)

    def name(self, index: int) -> str:
        """File name."""
        return self.split.name(self.used[index])

    def fill_cache(self, workers: int | None) -> None:
        """Decode all pictures and hold them in memory. Raises UserError where they do not fit."""
        self._cache = TensorCache(lambda index: (self.split.picture(self.used[index]),), len(self), workers)

    def draw(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(c, h, w) uint8 or float32, boxes (n, 4), labels (n,), masks (n, h, w) uint8 where the config wants them."""
        image = self.split.picture(self.used[index]) if self._cache is None else self._cache[index][0]
        objects, (height, width) = self.objects[self.used[index]], image.shape[1:]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in objects)]
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width), dtype=torch.float32)  # pyright: ignore
        labels = torch.tensor([self.labels[entry["category_id"]] for entry in objects])
        target: dict[str, Any] = {"boxes": boxes}
        if self.masks:
            decoded = np.stack([coco_mask.decode(entry["segmentation"]) for entry in objects])
            target["masks"] = tv_tensors.Mask(torch.from_numpy(decoded))
        picture, target = self._transform(len(image))(tv_tensors.Image(image), target)
        boxes = target["boxes"].as_subclass(Tensor)
        visible = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        instances: dict[str, Tensor] = {"boxes": boxes[visible], "labels": labels[visible]}
        if self.masks:
            masks = target["masks"].as_subclass(Tensor)[visible]
            instances = with_boxes_of_masks(masks, instances["labels"])
        return picture.as_subclass(Tensor), instances

    def _transform(self, channels: int) -> v2.Transform:
        """The augmentation of pictures with so many channels, whose means fill up the crop."""
        preprocessing = self.split.preprocessing.of_channels(channels)
        fill = preprocessing.fill
        grey: Any = list(fill) if preprocessing.bands is not None else [round(value) for value in fill]
        return v2.Compose([
            v2.RandomHorizontalFlip(self.jitter.flip),
            v2.ScaleJitter(self.size, self.jitter.scale),
            v2.RandomCrop(self.size, pad_if_needed=True, fill={tv_tensors.Image: grey, "others": 0}),
            v2.ClampBoundingBoxes(),
        ])  # fmt: skip

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Images, list[dict[str, Tensor]]]:
        """(b, c, h, w), or a list where bands differ, and a list of targets."""
        images = stacked([image for image, _ in samples], self.split.preprocessing)
        return images, [target for _, target in samples]


def with_boxes_of_masks(masks: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a crop left of each instance, with the box of that; gone ones dropped."""
    visible = (masks > 0).flatten(1).any(1)
    masks, labels = masks[visible], labels[visible]
    boxes = masks_to_boxes(masks) if len(masks) else masks.new_zeros((0, 4), dtype=torch.float32)
    return {"boxes": boxes + torch.tensor([0.0, 0.0, 1.0, 1.0]), "labels": labels, "masks": masks}


class WholePictures:
    """Pictures in the squares that they are evaluated in."""

    def __init__(self, split: CocoSplit, tta: TestTimeAugmentation) -> None:
        self.split = split
        self.tta = tta

    def __len__(self) -> int:
        return len(self.split)

    def name(self, index: int) -> str:
        """File name."""
        return self.split.name(index)

    def draw(self, index: int) -> tuple[list[Tensor], list[Sizes]]:
        """For each square (c, h, w), and the sizes."""
        squares = self.tta.fit(self.split.picture(index))
        return [pixels for pixels, _ in squares], [sizes for _, sizes in squares]

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[list[Images], list[list[Sizes]]]:
        """For each square (b, c, h, w), or a list where bands differ, and the sizes of the b pictures."""
        images, sizes = (
            [list(of_square) for of_square in zip(*part, strict=True)] for part in zip(*samples, strict=True)
        )
        return [stacked(of_square, self.split.preprocessing) for of_square in images], sizes
