"""Pictures with one class each, from class folders or `datasets`, with the split that each is in."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from launch.data.data_sets import (
    BUILDERS,
    DataSet,
    HubDataset,
    column_of,
    data_set_of,
    first_split,
    holds_classes,
    holds_pictures,
    holds_text,
    is_image,
)
from launch.data.folders import ImageFiles, picture_paths
from launch.data.sources import ImageSource, Picked
from launch.run.randomness import seed_of
from vim_backbone.errors import UserError
from vim_backbone.listing import left_behind

NO_CLASSES = " (text will do), encode one by class_encode_column of `datasets`, or use a folder for each class"
"""What else to do about a data set without a column of classes: numbers do not say which classes there are."""


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """Where labelled pictures are."""

    source: str = ""
    """Folder with train/CLASS/* and val/CLASS/* (ImageNet's layout), or CLASS/* alone with `holdout`; or a data set:
    .parquet, .arrow, .tar or .zip file(s) by path, glob or URL, with {split} where splits have files of their own, a
    folder of `save_to_disk`, or hf:NAME."""
    train_split: str = "train"
    """Folder or split to train on."""
    val_split: str = "val"
    """Folder or split to evaluate on; hf:NAME data sets often call it validation or test."""
    holdout: float = 0.0
    """Share of each class that is kept for evaluation, where there is no validation set."""
    image_column: str | None = None
    """Image column of a data set, or one of bytes or paths; the first of type Image when not given."""
    label_column: str | None = None
    """Label column of a data set; the first one of type ClassLabel when not given. A column of text can be named: its
    different texts, sorted, are the classes."""
    shots: int | None = None
    """Train on so many pictures of each class, chosen by the seed."""


@dataclass(frozen=True)
class Labelled:
    """A source of pictures and the class of each."""

    source: ImageSource
    labels: list[int]
    classes: list[str]

    def pick(self, indices: list[int]) -> "Labelled":
        """Only these pictures."""
        return Labelled(Picked(self.source, indices), [self.labels[i] for i in indices], self.classes)


def open_labelled(data: LabelledSource, seed: int) -> tuple[Labelled, Labelled]:
    """Training and validation pictures. Raises UserError naming the folder, split or column that is wrong."""
    place = data_set_of(data.source, data.train_split)
    if place is not None:
        train, val = _from_data_set(data, place)
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


def _from_folders(data: LabelledSource, root: Path) -> tuple[Labelled, Labelled | None]:
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise UserError(
            f"data.source {root} {what}: give a folder with train/CLASS/*, {', '.join(BUILDERS)} files, or hf:NAME"
        )
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


def _from_data_set(data: LabelledSource, place: DataSet) -> tuple[Labelled, Labelled | None]:
    train = read_data_set(data, place)
    name = first_split(data.source, [data.val_split, "validation", "test"])
    evaluated = None if name in (None, data.train_split) else data_set_of(data.source, str(name))
    return train, evaluated and read_data_set(data, evaluated, train.classes)


def read_data_set(data: LabelledSource, place: DataSet, classes: list[str] | None = None) -> Labelled:
    """One split of a data set, of which `classes` are those of training, where they are known.

    Raises UserError for what cannot be loaded, has no labels, or has other classes.
    """
    loaded = place.load()
    features = loaded.features
    fits = holds_pictures if data.image_column else is_image
    image = column_of(features, place.title, "image_column", data.image_column, "Image", fits)
    pictures = HubDataset(loaded, image, f"{place.split} ")
    if place.archive and data.label_column is None:
        paths = [cell["path"].split("::")[0].split("://")[-1] for cell in pictures.data[image]]
        folders = [PurePosixPath(path).parent.name for path in paths]
        return Labelled(pictures, *_classes_of_text(folders, "its folders", place, classes))
    text = data.label_column is not None and holds_text(features.get(data.label_column))
    is_label = holds_text if text else holds_classes
    label = column_of(features, place.title, "label_column", data.label_column, "ClassLabel", is_label, NO_CLASSES)
    if text:
        labels, classes = _classes_of_text(loaded[label][:], f"column {label!r}", place, classes)
    else:
        labels, names = loaded[label][:], list(features[label].names)
        wrong = next((i for i, value in enumerate(labels) if value is None or not 0 <= value < len(names)), None)
        if wrong is not None:
            where = f"{place.title} {place.split} row {wrong} has label {labels[wrong]}"
            raise UserError(f"{where}: it must be 0 .. {len(names) - 1}")
        if classes not in (None, names):
            both = f"{(classes or [])[:5]} to train on, {names[:5]} to evaluate on"
            raise UserError(f"the splits of {data.source} have other classes: {both}")
        classes = names
    return Labelled(pictures, labels, classes)


def _classes_of_text(
    column: Iterable[str | None], words: str, place: DataSet, classes: list[str] | None
) -> tuple[list[int], list[str]]:
    """The class of each row, and the classes: the texts of training, sorted. Raises UserError."""
    texts = [(text or "").strip() for text in column]
    where = f"{place.title} {place.split}"
    if "" in texts:
        raise UserError(f"{where} row {texts.index('')} has no text in {words}: give it a class, or remove it")
    present = sorted(set(texts))
    if classes is None and not 1 < len(present) < max(3, len(texts)):
        kind = "one text" if len(present) == 1 else "another text in every row"
        raise UserError(f"{where} has {kind} in {words}, such as {present[0][:40]!r}: set data.label_column")
    numbers = {text: number for number, text in enumerate(classes or present)}
    if strange := [text for text in present if text not in numbers]:
        raise UserError(
            f"{where} row {texts.index(strange[0])} has class {strange[0]!r}, which the training split lacks "
            f"({len(numbers)} classes there): rename or remove it"
        )
    return [numbers[text] for text in texts], list(numbers)
