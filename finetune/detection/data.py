"""COCO files: read, checked annotation by annotation, and turned into training and evaluation samples."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from finetune.detection.config import DetectionData, JitterConfig
from finetune.detection.tta import GREY, Sizes, TestTimeAugmentation
from launch.data.images import BadPictureError, open_picture, to_rgb
from vim_backbone.errors import UserError


@dataclass
class CocoSplit:
    """A checked COCO file with its folder of pictures."""

    folder: Path
    images: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    """Image id -> its usable annotations, crowds among them."""
    categories: list[dict[str, Any]]
    """In the order of their ids; class k of the model is the k-th, counted from 1."""
    max_megapixels: float
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """File name."""
        return self.images[index]["file_name"]

    def picture(self, index: int) -> Image.Image:
        """RGB. Raises BadPictureError where the file is not of the size that the annotations are for."""
        entry = self.images[index]
        with open_picture(self.folder / entry["file_name"]) as opened:
            image = to_rgb(opened, self.max_megapixels)
        if image.size != (entry["width"], entry["height"]):
            raise BadPictureError(
                f"it is {image.size} pixels, its annotations are for {entry['width'], entry['height']}"
            )
        return image

    def labels(self) -> dict[int, int]:
        """Category id -> class, counted from 1."""
        return {category["id"]: k + 1 for k, category in enumerate(self.categories)}

    def ground_truth(self) -> dict[str, Any]:
        """What the evaluator wants: the file without what cannot be used."""
        annotations = [dict(entry) for entries in self.annotations.values() for entry in entries]
        for number, entry in enumerate(annotations, start=1):
            entry["id"] = number
        return {"images": self.images, "annotations": annotations, "categories": self.categories}


def open_coco(data: DetectionData, split: str, masks: bool) -> CocoSplit:
    """Read one split. Single annotations that cannot be used are left out and named in `notes`.

    Raises UserError where the file or the folder is missing or is not in COCO's format.
    """
    root = Path(data.source).expanduser()
    path, folder = root / f"annotations/instances_{split}.json", root / split
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: set data.source, or the split ({split!r})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} is no COCO file: it has no list {key!r}")
    if not content["images"] or not content["categories"]:
        raise UserError(f"{path} has {len(content['images'])} images and {len(content['categories'])} categories")
    for entry in content["images"]:
        if any(key not in entry for key in ("id", "file_name", "height", "width")):
            raise UserError(f"{path}: image {entry.get('id')} lacks id, file_name, height or width")
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: it must hold the pictures that {path} names")
    images = {entry["id"]: entry for entry in content["images"]}
    categories = sorted(content["categories"], key=lambda category: category["id"])
    category_ids = {category["id"] for category in categories}
    usable: dict[int, list[dict[str, Any]]] = {key: [] for key in images}
    bad: list[tuple[str, str]] = []
    for entry in content["annotations"]:
        wrong = what_is_wrong(entry, images, category_ids, masks)
        if wrong is None:
            usable[entry["image_id"]].append(completed(entry))
        else:
            bad.append((wrong, f"annotation {entry.get('id')}"))
    if bad and len(bad) == len(content["annotations"]):
        raise UserError(f"no annotation of {path} can be used: {bad[0][1]} has {bad[0][0]}; see head.masks")
    notes = []
    if bad:
        first = dict(reversed(bad))
        causes = ", ".join(f"{count} with {why} ({first[why]})" for why, count in Counter(w for w, _ in bad).items())
        notes.append(f"{len(bad)} of {len(content['annotations'])} annotations of {path} skipped: {causes}")
    return CocoSplit(folder, content["images"], usable, categories, data.max_megapixels, notes)


def what_is_wrong(entry: dict[str, Any], images: dict[int, Any], categories: set[int], masks: bool) -> str | None:
    """Why an annotation cannot be used, None for a good one."""
    image = images.get(entry.get("image_id", -1))
    if image is None:
        return "an image_id that no image has"
    if entry.get("category_id") not in categories:
        return "a category_id that no category has"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_finite(value) for value in box):
        return "no bbox of four numbers"
    x, y, width, height = box
    inside = min(x + width, image["width"]) - max(x, 0), min(y + height, image["height"]) - max(y, 0)
    if min(width, height, *inside) <= 0:
        return "a box without area in the picture"
    if not masks or entry.get("iscrowd"):
        return None
    mask = entry.get("segmentation")
    if isinstance(mask, dict):
        if list(mask.get("size", [])) != [image["height"], image["width"]]:
            return "a mask of another size than the image"
        counts = mask.get("counts")
        if isinstance(counts, list) and sum(counts) != image["height"] * image["width"]:
            return "a mask of another size than the image"
        return None if counts else "an empty mask"
    if not isinstance(mask, list) or not mask:
        return "no segmentation"
    return None if all(len(part) >= 6 and len(part) % 2 == 0 for part in mask) else "a polygon of under three corners"


def completed(entry: dict[str, Any]) -> dict[str, Any]:
    """With area and iscrowd, which files made by hand often lack."""
    _, _, width, height = entry["bbox"]
    return {"area": float(width * height), "iscrowd": 0} | entry


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Polygons or RLE, compressed or not -> (h, w) uint8."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (str, bytes)):
        return coco_mask.decode(segmentation)
    rle: Any = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(segmentation, list) else rle)


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
            raise UserError(f"no picture of {split.folder} has an object to train on")
        if empty := len(objects) - len(self.used):
            split.notes.append(f"{empty} of {len(objects)} pictures of {split.folder} have no object: not trained on")
        self.transform = v2.Compose([
            v2.RandomHorizontalFlip(jitter.flip),
            v2.ScaleJitter(size, jitter.scale),
            v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: GREY, "others": 0}),
            v2.ClampBoundingBoxes(),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.used)

    def name(self, index: int) -> str:
        """File name."""
        return self.split.name(self.used[index])

    def draw(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(3, h, w) uint8, and boxes (n, 4), labels (n,), masks (n, h, w) uint8 where the config wants them."""
        image = self.split.picture(self.used[index])
        objects, (width, height) = self.objects[self.used[index]], image.size
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in objects)]
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width), dtype=torch.float32)  # pyright: ignore
        labels = torch.tensor([self.labels[entry["category_id"]] for entry in objects])
        target: dict[str, Any] = {"boxes": boxes}
        if self.masks:
            decoded = np.stack([decode_mask(entry["segmentation"], height, width) for entry in objects])
            target["masks"] = tv_tensors.Mask(torch.from_numpy(decoded))
        picture, target = self.transform(tv_tensors.Image(transforms.pil_to_tensor(image)), target)
        boxes = target["boxes"].as_subclass(Tensor)
        visible = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        instances: dict[str, Tensor] = {"boxes": boxes[visible], "labels": labels[visible]}
        if self.masks:
            masks = target["masks"].as_subclass(Tensor)[visible]
            instances = with_boxes_of_masks(masks, instances["labels"])
        return picture.as_subclass(Tensor), instances

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """(b, 3, h, w), and a list of targets."""
        return torch.stack([image for image, _ in samples]), [target for _, target in samples]


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
        """For each square (3, h, w) uint8, and the sizes."""
        squares = self.tta.fit(self.split.picture(index))
        return [pixels for pixels, _ in squares], [sizes for _, sizes in squares]

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[list[Tensor], list[list[Sizes]]]:
        """For each square (b, 3, h, w), and the sizes of the b pictures."""
        images, sizes = (
            [list(of_square) for of_square in zip(*part, strict=True)] for part in zip(*samples, strict=True)
        )
        return [torch.stack(of_square) for of_square in images], sizes
