"""Small data sets in the real formats, drawn on the spot: `python -m finetune.sample_data KIND FOLDER`.

Shapes over photographs stand for objects: each kind has its own hue, so that a small model learns them in minutes.
"""

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import argparse
import colorsys
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from launch.data.images import open_picture, to_rgb
from launch.data.sources import photograph_paths
from launch.run.cli import run
from vim_backbone.errors import UserError, require

SHAPES = ("circle", "square", "triangle")
CATEGORY_IDS = (1, 4, 9)
"""Ids in the COCO file: with gaps, as COCO's own."""
BACKGROUND, FIRST_SHAPE = 1, 2
"""Labels of the segmentation maps; 0 is unlabelled, as in ADE20K."""


@dataclass(frozen=True)
class Shape:
    """One shape in a picture."""

    kind: int
    """Index into SHAPES."""
    polygon: list[tuple[float, float]]
    """Corners (x, y) in pixels; of a circle, points on it."""
    mask: np.ndarray
    """(h, w) bool."""


@dataclass(frozen=True)
class Sizes:
    """How much is drawn."""

    train: int
    val: int
    size: int
    seed: int


class Scenes:
    """Photographs with shapes drawn over them; scene (split, index) is the same for one seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.photographs: list[Image.Image] = []
        for path in photograph_paths():
            with open_picture(path) as image:
                self.photographs.append(to_rgb(image, max_megapixels=200))

    def draw(self, split: int, index: int, kinds: list[int] | None = None) -> tuple[Image.Image, list[Shape]]:
        """A picture and its shapes, none over another: one to four of random kinds, or one of each of `kinds`."""
        rng = np.random.default_rng((self.seed, split, index))
        image = self._background(rng)
        of_kinds = kinds if kinds is not None else rng.integers(len(SHAPES), size=rng.integers(1, 5)).tolist()
        shapes: list[Shape] = []
        for kind in of_kinds:
            for _ in range(20):
                shape = self._shape(rng, kind)
                if not any((grown(shape.mask) & other.mask).any() for other in shapes):
                    shapes.append(shape)
                    hue = (kind / len(SHAPES) + rng.uniform(-0.06, 0.06)) % 1
                    colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1), 0.95))
                    ImageDraw.Draw(image).polygon(shape.polygon, fill=colour)
                    break
        return image, shapes

    def _background(self, rng: np.random.Generator) -> Image.Image:
        photograph = self.photographs[rng.integers(len(self.photographs))]
        side = int(rng.uniform(0.4, 1.0) * min(photograph.size))
        left, top = (int(rng.integers(full - side + 1)) for full in photograph.size)
        return photograph.resize(
            (self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )

    def _shape(self, rng: np.random.Generator, kind: int) -> Shape:
        radius = rng.uniform(0.1, 0.24) * self.size
        x, y = rng.uniform(radius + 1, self.size - radius - 1, 2)
        corners = (32, 4, 3)[kind]
        turn = rng.uniform(-0.3, 0.3) + (np.pi / 4 if kind == 1 else -np.pi / 2)
        angles = turn + np.arange(corners) * 2 * np.pi / corners
        polygon = [(float(x + radius * np.cos(a)), float(y + radius * np.sin(a))) for a in angles]
        canvas = Image.new("1", (self.size, self.size))
        ImageDraw.Draw(canvas).polygon(polygon, fill=1)
        return Shape(kind, polygon, np.asarray(canvas))


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels next to it."""
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.logical_or.reduce([padded[dy : dy + h, dx : dx + w] for dy in range(3) for dx in range(3)])


def classification(folder: Path, sizes: Sizes) -> None:
    """Class folders: train/CLASS/N.jpg and val/CLASS/N.jpg, one shape a picture."""
    scenes = Scenes(sizes.size, sizes.seed)
    for split, (name, count) in enumerate((("train", sizes.train), ("val", sizes.val))):
        for index in range(count):
            kind = index % len(SHAPES)
            where = folder / name / SHAPES[kind]
            where.mkdir(parents=True, exist_ok=True)
            scenes.draw(split, index, [kind])[0].save(where / f"{index:05d}.jpg", quality=90)


def digits(folder: Path, sizes: Sizes) -> None:
    """Scikit-learn's handwritten digits as class folders, enlarged; 1797 in all, shared out by the seed."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(sizes.seed).permutation(len(data.images))
    require(sizes.train + sizes.val <= len(order), "--train + --val", sizes.train + sizes.val, "there are 1797 digits")
    for name, part in (("train", order[: sizes.train]), ("val", order[sizes.train :][: sizes.val])):
        for index in part.tolist():
            where = folder / name / str(data.target[index])
            where.mkdir(parents=True, exist_ok=True)
            pixels = (255 - data.images[index] * 255 / 16).astype(np.uint8)
            image = Image.fromarray(pixels).resize((sizes.size, sizes.size), Image.Resampling.BICUBIC)
            image.save(where / f"{index:05d}.png")


def detection(folder: Path, sizes: Sizes) -> None:
    """COCO: annotations/instances_{train,val}.json beside train/ and val/; circles as RLE, the rest as polygons."""
    scenes = Scenes(sizes.size, sizes.seed)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, (name, count) in enumerate((("train", sizes.train), ("val", sizes.val))):
        (folder / name).mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            picture, shapes = scenes.draw(split, index)
            file = f"{index:06d}.jpg"
            picture.save(folder / name / file, quality=90)
            images.append({"id": index + 1, "file_name": file, "height": sizes.size, "width": sizes.size})
            for shape in shapes:
                annotations.append(coco_annotation(shape, index + 1, len(annotations) + 1))
        categories = [{"id": i, "name": s, "supercategory": "shape"} for i, s in zip(CATEGORY_IDS, SHAPES, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"annotations/instances_{name}.json").write_text(json.dumps(content), encoding="utf-8")


def coco_annotation(shape: Shape, image_id: int, number: int) -> dict[str, Any]:
    """One annotation of a COCO file."""
    rows, columns = np.nonzero(shape.mask)
    x, y = int(columns.min()), int(rows.min())
    box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
    points = [round(value, 2) for corner in shape.polygon for value in corner]
    mask: Any = {"size": list(shape.mask.shape), "counts": run_lengths(shape.mask)} if shape.kind == 0 else [points]
    return {
        "id": number, "image_id": image_id, "category_id": CATEGORY_IDS[shape.kind], "iscrowd": 0,
        "bbox": box, "area": int(shape.mask.sum()), "segmentation": mask,
    }  # fmt: skip


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs down the columns, zeros first."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], borders, [mask.size]])).tolist()


def segmentation(folder: Path, sizes: Sizes) -> None:
    """ADE20K's layout: images/{training,validation}/N.jpg, annotations/.../N.png (0 = unlabelled), objectInfo."""
    scenes = Scenes(sizes.size, sizes.seed)
    for split, (name, count) in enumerate((("training", sizes.train), ("validation", sizes.val))):
        images, maps = folder / "images" / name, folder / "annotations" / name
        for where in (images, maps):
            where.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture, shapes = scenes.draw(split, index)
            labels = np.full((sizes.size, sizes.size), BACKGROUND, np.uint8)
            for shape in shapes:
                labels[grown(shape.mask) & ~shape.mask] = 0  # a rim that counts for nothing
                labels[shape.mask] = FIRST_SHAPE + shape.kind
            picture.save(images / f"{index:06d}.jpg", quality=90)
            Image.fromarray(labels).save(maps / f"{index:06d}.png")
    names = ["background", *SHAPES]
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i + 1}\t0\t0\t0\t{name}" for i, name in enumerate(names))]
    (folder / f"objectInfo{len(names)}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


KINDS: dict[str, tuple[Callable[[Path, Sizes], None], int, int, int]] = {
    "classification": (classification, 300, 90, 64),
    "digits": (digits, 1297, 500, 32),
    "detection": (detection, 400, 100, 128),
    "segmentation": (segmentation, 300, 60, 128),
}
"""Kind -> (what draws it, pictures for training, pictures for validation, side in pixels)."""


def main(argv: list[str]) -> None:
    """Draw what was asked for, and print the folder."""
    parser = argparse.ArgumentParser(
        "finetune.sample_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, help="which data set")
    parser.add_argument("folder", type=Path, help="where it goes; must not exist, or be empty")
    parser.add_argument("--train", type=int, help="pictures for training")
    parser.add_argument("--val", type=int, help="pictures for validation")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn")
    arguments = parser.parse_args(argv)
    draw, train, val, size = KINDS[arguments.kind]
    sizes = Sizes(arguments.train or train, arguments.val or val, arguments.size or size, arguments.seed)
    require(sizes.seed >= 0, "--seed", sizes.seed, "it cannot be negative")
    require(sizes.size >= 16, "--size", sizes.size, "shapes need 16 pixels or more")
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise UserError(f"{arguments.folder} is not empty: choose another folder")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    draw(arguments.folder, sizes)
    print(arguments.folder)  # noqa: T201 - the command's result


if __name__ == "__main__":
    sys.exit(run(main))
