"""Data sets with a column of objects, as the content of a COCO file, which the checker of COCO files then reads."""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from finetune.detection.config import DetectionData
from launch.data.data_sets import (
    Cells,
    DataSet,
    HubDataset,
    column_of,
    holds_classes,
    holds_pictures,
    holds_text,
    is_image,
)  # fmt: skip
from vim_backbone.errors import UserError

CATEGORY = ("category", "category_id", "label")
CROWD = ("iscrowd", "is_crowd")
"""Names that a field of the objects may have."""


def read_rows(data: DetectionData, place: DataSet, classes: list[str] | None) -> tuple[dict[str, list[Any]], Cells]:
    """The split as the content of a COCO file, in which the id of a picture is its row, and the pictures.

    `classes`: those of training, where they are known. Raises UserError for what cannot be loaded, or has no objects.
    """
    loaded, title = place.load(), place.title
    features: Mapping[str, Any] = loaded.features
    fits = holds_pictures if data.image_column else is_image
    image = column_of(features, title, "image_column", data.image_column, "Image", fits)
    objects = column_of(features, title, "objects_column", data.objects_column, "objects with a bbox", holds_objects)
    fields = fields_of(features[objects])
    category = next((name for name in CATEGORY if name in fields), None)
    if category is None:
        raise UserError(f"{title} has no category in column {objects}, one of {', '.join(CATEGORY)}: {sorted(fields)}")
    pictures = HubDataset(loaded, image, f"{place.split} ")
    rows = [list(objects_of(row)) for row in loaded.select_columns([objects])[objects]]
    names = names_of(fields[category], rows, category, f"{title} {objects}.{category}", classes)
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    annotations = []
    for row, entries in enumerate(rows):
        for entry in entries:
            value = entry.get(category)
            crowd = next((entry[name] for name in CROWD if name in entry), None)
            more = {"image_id": row, "category_id": numbers.get(value, value), "id": len(annotations) + 1}
            box = corners_to_sides(entry.get("bbox")) if data.boxes == "xyxy" else entry.get("bbox")
            annotations.append(entry | more | {"iscrowd": crowd, "bbox": box})
    sizes = sizes_of(loaded, pictures)
    images = [
        {"id": row, "file_name": pictures.name(row), "height": height, "width": width}
        for row, (height, width) in enumerate(sizes)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}, Cells(pictures, title)


def holds_objects(feature: Any) -> bool:
    """Whether a column has, for each picture, objects with a box each."""
    return "bbox" in fields_of(feature)


def fields_of(feature: Any) -> dict[str, Any]:
    """Fields of the objects of a column: a list of structs, or a struct of lists; none for other columns."""
    if isinstance(feature, dict):
        return {name: getattr(inner, "feature", inner) for name, inner in feature.items()}
    inner = getattr(feature, "feature", None)
    return dict(inner) if isinstance(inner, dict) else {}


def objects_of(row: Any) -> Iterator[dict[str, Any]]:
    """The objects of a row, whether it is a list of structs or a struct of lists."""
    if isinstance(row, dict):
        columns = {name: values for name, values in row.items() if isinstance(values, list)}
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
    else:
        yield from (entry for entry in row or [] if entry is not None)


def names_of(
    feature: Any, rows: list[list[dict[str, Any]]], category: str, where: str, classes: list[str] | None
) -> list[str]:
    """Names of the categories: of their type, or the texts of training, sorted. Raises UserError."""
    if holds_classes(feature):
        return list(feature.names)
    if not holds_text(feature):
        raise UserError(f"{where} holds numbers, which do not say what classes there are: make it ClassLabel, or text")
    texts = sorted({text for entries in rows for entry in entries if (text := entry.get(category))})
    if classes is not None and (strange := sorted(set(texts) - set(classes))):
        raise UserError(f"{where} has {strange[0]!r}, which the training split lacks ({len(classes)} classes there)")
    return classes or texts


def corners_to_sides(box: Any) -> Any:
    """Left, upper, right, lower -> left, upper, width, height; what is no box is left to the checker."""
    try:
        left, upper, right, lower = box
        return [left, upper, right - left, lower - upper]
    except (TypeError, ValueError):
        return box


def sizes_of(loaded: datasets.Dataset, pictures: HubDataset) -> Iterator[tuple[int, int] | tuple[None, None]]:
    """Height and width of each picture: of the columns of these names, else as the files have it."""
    if {"height", "width"} <= set(loaded.column_names):
        yield from zip(loaded["height"], loaded["width"], strict=True)
        return
    for row in range(len(pictures)):
        try:
            with pictures.open(row) as picture:
                yield picture.size
        except Exception:  # a decoder may raise anything on damaged data; the checker leaves the picture out
            yield None, None
