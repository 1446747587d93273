"""Pictures with one class each, from class folders or `datasets`, with the split that each is in."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from finetune.classification.config import ClassificationData
from finetune.pixels import pixels_of, stacked
from launch.data.pictures import Picture
from launch.data.sources import HubDataset, ImageFiles, ImageSource, left_behind, load_split, picture_paths, split_names
from launch.run.randomness import seed_of
from vim_backbone.errors import UserError, nearest
from vim_backbone.preprocessing import Preprocessing
from vim_backbone.vim import Images


@dataclass(frozen=True)
class Labelled:
    """A source of pictures and the class of each."""

    source: ImageSource
    labels: list[int]
    classes: list[str]

    def pick(self, indices: list[int]) -> "Labelled":
        """Only these pictures."""
        return Labelled(Picked(self.source, indices), [self.labels[i] for i in indices], self.classes)


class Picked:
    """Some pictures of a source."""

    def __init__(self, source: ImageSource, indices: list[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Name in the source."""
        return self.source.name(self.indices[index])

    def open(self, index: int) -> Picture:
        """The picture, opened but not decoded."""
        return self.source.open(self.indices[index])


class ClassSamples:
    """Labelled pictures, transformed."""

    def __init__(
        self, data: Labelled, transform: Callable[[Tensor], Any], preprocessing: Preprocessing, max_megapixels: float
    ) -> None:
        self.data = data
        self.transform = transform
        self.preprocessing = preprocessing
        self.max_megapixels = max_megapixels

    def __len__(self) -> int:
        return len(self.data.labels)

    def name(self, index: int) -> str:
        """Name in the source."""
        return self.data.source.name(index)

    def draw(self, index: int) -> tuple[Tensor, int]:
        """(c, h, w) normalised, and the class."""
        with self.data.source.open(index) as picture:
            pixels = pixels_of(picture, self.preprocessing, self.max_megapixels)
        return self.transform(pixels), self.data.labels[index]

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Images, Tensor]:
        """(b, c, h, w), or a list where bands differ, and (b,)."""
        return stacked([picture for picture, _ in samples], self.preprocessing), torch.tensor([k for _, k in samples])


def open_labelled(data: ClassificationData, seed: int) -> tuple[Labelled, Labelled]:
    """Training and validation pictures. Raises UserError naming the folder, split or column that is wrong."""
    if data.source.startswith("hf:"):
        train, val = _from_datasets(data)
    else:
        train, val = _from_folders(data, Path(data.source).expanduser())
    if val is None:
        if not data.holdout:
            raise UserError(
                f"data.source {data.source} has no {data.val_split!r} to evaluate on: set data.val_split, or "
                "data.holdout 0.1 to keep a tenth of each class"
            )
        order = shuffled_within_classes(train.labels, seed)
        held_out = {i for members in order for i in members[: max(1, round(len(members) * data.holdout))]}
        both = [[i for i in range(len(train.labels)) if (i in held_out) == evaluated] for evaluated in (False, True)]
        train, val = train.pick(both[0]), train.pick(both[1])
    if data.shots is not None:
        order = shuffled_within_classes(train.labels, seed)
        if absent := missing_classes(train):
            raise UserError(f"class {absent[0]!r} of {data.source} has no training pictures")
        for name, members in zip(train.classes, order, strict=True):
            if len(members) < data.shots:
                raise UserError(f"data.shots is {data.shots}: class {name!r} has {len(members)} training pictures")
        train = train.pick(sorted(i for members in order for i in members[: data.shots]))
    if absent := missing_classes(train):
        raise UserError(f"class {absent[0]!r} of {data.source} has no training pictures: lower data.holdout")
    return train, val


def missing_classes(data: Labelled) -> list[str]:
    """Classes that no picture has."""
    present = set(data.labels)
    return [name for label, name in enumerate(data.classes) if label not in present]


def shuffled_within_classes(labels: list[int], seed: int) -> list[list[int]]:
    """Indices of each class, in an order of the seed."""
    order = np.random.default_rng(seed_of(seed)).permutation(len(labels)).tolist()
    members: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for index in order:
        members[labels[index]].append(index)
    return members


def _from_folders(data: ClassificationData, root: Path) -> tuple[Labelled, Labelled | None]:
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"data.source {root} {what}: give a folder with train/CLASS/*, or hf:NAME, also of a folder")
    if not (root / data.train_split).is_dir():
        return read_class_folders(root, None), None
    train = read_class_folders(root / data.train_split, None)
    names = [name for name in (data.val_split, "validation", "test") if (root / name).is_dir()]
    return train, read_class_folders(root / names[0], train.classes) if names else None


def read_class_folders(folder: Path, classes: list[str] | None) -> Labelled:
    """One folder a class, pictures at any depth below it; the order of classes is that of their names.

    Raises UserError for a class without pictures, and for classes that differ from those of training.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not left_behind(path.name))
    if not names:
        raise UserError(f"{folder} has no class folders: it needs one folder of pictures for each class")
    if classes is not None and (strange := sorted(set(names) - set(classes))):
        raise UserError(
            f"{folder} has class {strange[0]!r}, which the training folder lacks ({len(classes)} classes there, "
            f"{len(names)} here): rename or remove it"
        )
    if classes is not None and (absent := sorted(set(classes) - set(names))):
        raise UserError(
            f"{folder} has no class {absent[0]!r}, which the training folder has ({len(classes)} classes there, "
            f"{len(names)} here): add it, or evaluate on a share of each class with data.holdout"
        )
    classes = classes or names
    if len(classes) < 2:
        raise UserError(f"{folder} has one class, {classes[0]!r}: a classifier needs two or more folders")
    paths, labels = [], []
    for label, name in enumerate(classes):
        inside = picture_paths(folder / name)
        if not inside:
            raise UserError(f"class folder {folder / name} has no pictures: fill it or remove it")
        paths += inside
        labels += [label] * len(inside)
    return Labelled(ImageFiles(paths, folder.parent), labels, classes)


def _from_datasets(data: ClassificationData) -> tuple[Labelled, Labelled | None]:
    train = read_dataset(data, data.train_split)
    names = split_names(data.source[3:]) or [data.val_split]
    val = next((name for name in (data.val_split, "validation", "test") if name in names), None)
    if val is None or val == data.train_split:
        return train, None
    evaluated = read_dataset(data, val)
    if evaluated.classes != train.classes:
        both = f"{train.classes[:5]} to train on, {evaluated.classes[:5]} to evaluate on"
        raise UserError(f"the splits of {data.source} have other classes: {both}")
    return train, evaluated


def read_dataset(data: ClassificationData, split: str) -> Labelled:
    """One split of what `datasets.load_dataset` loads. Raises UserError for what cannot be loaded or has no labels."""
    name = data.source[3:]
    loaded = load_split(name, split)
    features = loaded.features
    image = _column(name, features, "image_column", data.image_column, datasets.Image)
    label = _column(name, features, "label_column", data.label_column, datasets.ClassLabel)
    labels = loaded[label]
    classes = list(features[label].names)
    wrong = next((i for i, value in enumerate(labels) if value is None or not 0 <= value < len(classes)), None)
    if wrong is not None:
        raise UserError(f"{name} {split} row {wrong} has label {labels[wrong]}: it must be 0 .. {len(classes) - 1}")
    return Labelled(HubDataset(loaded, image, f"{split} "), list(labels), classes)


def _column(name: str, features: datasets.Features, field: str, column: str | None, kind: type) -> str:
    """The column that was asked for, else the first of its type. Raises UserError where it is not there, or no such."""
    column = column or next((key for key, feature in features.items() if isinstance(feature, kind)), None)
    if column is not None and isinstance(features.get(column), kind):
        return column
    if column is not None and column not in features:
        hint = nearest(column, features)
        raise UserError(f"{name} has no column {column!r} of type {kind.__name__}: set data.{field}; {hint}")
    got = f"{column!r} is none" if column else f"none of {sorted(features)} is one"
    remedy = f"set data.{field}"
    if kind is datasets.ClassLabel:  # text or numbers, which do not say what classes there are
        remedy += ", encode one by class_encode_column of `datasets`, or use a folder for each class"
    raise UserError(f"{name} needs a column of type {kind.__name__}, {got}: {remedy}")
