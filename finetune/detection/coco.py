"""The checker of COCO files: what cannot be used is left out, counted and named before training."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from faster_coco_eval.core import mask as coco_mask

from vim_backbone.errors import UserError, escaped

MOST_PIXELS = 10**6
"""Largest height or width of a picture."""
HIGHEST = 1e300
BELIEVABLE = 10
"""Boxes and polygons lie within so many sides of the picture; what reaches further is a mistake, and costs memory."""


@dataclass
class CocoFile:
    """What can be used of a COCO file; every value has the type that COCO's format gives it."""

    images: list[dict[str, Any]]
    """id, file_name, height, width of each picture."""
    annotations: dict[int, list[dict[str, Any]]]
    """Image id -> annotations, crowds among them: image_id, category_id, bbox, area, iscrowd, and segmentation
    (compressed RLE) where masks are wanted."""
    categories: list[dict[str, Any]]
    """id and name, in the order of the ids."""
    notes: list[str] = field(default_factory=list)
    """Lines on what was left out."""


class UnusableError(Exception):
    """An entry that cannot be used; the message says what it has or lacks."""


def read_coco(path: Path, masks: bool) -> CocoFile:
    """Read and check a file.

    Raises UserError where it is missing or no COCO file, and where no picture or annotation of it can be used.
    """
    return check_coco(_load(path), str(path), masks)


def check_coco(content: dict[str, list[Any]], path: str, masks: bool) -> CocoFile:
    """Check what a COCO file holds; `path` is its name in messages. Raises as `read_coco`."""
    categories, notes = _categories(content["categories"], path)
    images, bad = _images(content["images"])
    if not images:
        raise UserError(f"no image of {path} can be used: {bad[0][1]} has {bad[0][0]}")
    notes += _summary(bad, len(content["images"]), "images", path)
    usable: dict[int, list[dict[str, Any]]] = {key: [] for key in images}
    bad, parts, ids = [], [], set()
    for position, entry in enumerate(content["annotations"]):
        name = f"annotation {_id(entry, position)}"
        try:
            annotation, bad_parts = check_annotation(entry, images, categories, masks)
            # a number for each, because a set of the texts would be as large as the file
            key = hash((_id(entry, position), json.dumps(annotation)))
            if key in ids:
                raise UnusableError("the id and the content of an earlier one")
        except UnusableError as error:
            bad.append((str(error), name))
            continue
        ids.add(key)
        usable[annotation["image_id"]].append(annotation)
        parts += [(why, name) for why in bad_parts]
    total = len(content["annotations"])
    if bad and len(bad) == total:
        raise UserError(f"no annotation of {path} can be used: {bad[0][1]} has {bad[0][0]}; see head.masks")
    notes += _summary(bad, total, "annotations", path)
    if parts:
        notes.append(f"{len(parts)} parts of masks of {path} skipped, the rest of each is used: {_causes(parts)}")
    return CocoFile(list(images.values()), usable, list(categories.values()), notes)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: set data.source, or the split") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} is no COCO file: it has no list {key!r}")
    if not content["images"] or not content["categories"]:
        raise UserError(f"{path} has {len(content['images'])} images and {len(content['categories'])} categories")
    return content


def _categories(entries: list[Any], path: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Id -> category. Classes are what a model has for good: one that is in doubt is an error."""
    categories: dict[int, dict[str, Any]] = {}
    nameless = []
    for position, entry in enumerate(entries):
        key = whole(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            raise UserError(f"{path}: category {position + 1} of {len(entries)} has no whole number as its id")
        name = entry.get("name")
        if isinstance(name, (int, float)) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not name.strip():
            nameless.append(key)
            name = str(key)
        category = {"id": key, "name": escaped(name)}
        if categories.setdefault(key, category) != category:
            raise UserError(f"{path}: categories {categories[key]['name']!r} and {name!r} both have the id {key}")
    line = f"categories of {path} without a name are called by their ids: {', '.join(map(str, nameless))}"
    return dict(sorted(categories.items())), [line] if nameless else []


def _images(entries: list[Any]) -> tuple[dict[int, dict[str, Any]], list[tuple[str, str]]]:
    """Id -> picture, and those left out."""
    images: dict[int, dict[str, Any]] = {}
    bad, doubtful = [], set()
    for position, entry in enumerate(entries):
        name = f"image {_id(entry, position)}"
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        key, file = whole(fields.get("id")), fields.get("file_name")
        height, width = (whole(fields.get(side)) or 0 for side in ("height", "width"))
        image = {"id": key, "file_name": file, "height": height, "width": width}
        if key is None:
            bad.append(("no whole number as its id", name))
        elif not isinstance(file, str) or not file.strip("\0"):
            bad.append(("no file_name", name))
        elif not (0 < height <= MOST_PIXELS and 0 < width <= MOST_PIXELS):
            bad.append(("no height or width in pixels", name))
        elif images.setdefault(key, image) is not image:
            if images[key] != image:
                doubtful.add(key)
            bad.append(("the id of an earlier one", name))
    for key in doubtful:  # whose annotations are whose cannot be known
        del images[key]
        bad.append(("the id of another picture", f"image {key}"))
    return images, bad


def check_annotation(
    entry: Any, images: dict[int, dict[str, Any]], categories: dict[int, Any], masks: bool
) -> tuple[dict[str, Any], list[str]]:
    """The fields that are used of an annotation, and why parts of its mask are left out. Raises UnusableError."""
    if not isinstance(entry, dict):
        raise UnusableError("no fields")
    image, category = images.get(whole(entry.get("image_id"))), whole(entry.get("category_id"))  # pyright: ignore
    if image is None:
        raise UnusableError("an image_id that no image has")
    if category not in categories:
        raise UnusableError("a category_id that no category has")
    crowd = entry.get("iscrowd") or 0  # also null and false
    crowd = 1 if crowd is True else whole(crowd)
    if crowd not in (0, 1):
        raise UnusableError("an iscrowd that is neither 0 nor 1")
    height, width = image["height"], image["width"]
    box = check_box(entry.get("bbox"), height, width)
    annotation = {"image_id": image["id"], "category_id": category, "bbox": box, "iscrowd": crowd}
    bad_parts: list[str] = []
    if masks:
        annotation["segmentation"], bad_parts = check_mask(entry.get("segmentation"), height, width)
    stated = entry.get("area")
    if number(stated) and stated >= 0:
        annotation["area"] = float(stated)
    else:
        annotation["area"] = float(coco_mask.area(annotation["segmentation"])) if masks else box[2] * box[3]
    return annotation, bad_parts


def check_box(box: Any, height: int, width: int) -> list[float]:
    """X, y, width, height of a box that has area in the picture. Raises UnusableError."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(number, box)):
        raise UnusableError("no bbox of four numbers")
    x, y, w, h = map(float, box)
    if max(map(abs, (x, y, w, h))) > BELIEVABLE * max(height, width):
        raise UnusableError("a box that reaches far beyond the picture")
    if min(w, h, min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)) <= 0:
        raise UnusableError("a box without area in the picture")
    return [x, y, w, h]


def check_mask(mask: Any, height: int, width: int) -> tuple[Any, list[str]]:
    """A mask of any of COCO's kinds as compressed RLE, and why parts are left out. Raises UnusableError."""
    if isinstance(mask, dict):
        return _compressed(check_rle(mask, height, width), height, width), []
    if not isinstance(mask, list) or not mask:
        raise UnusableError("no segmentation")
    parts = mask if any(isinstance(part, (list, dict)) for part in mask) else [mask]
    whys = [_polygon_fault(part, BELIEVABLE * max(height, width)) for part in parts]
    good = [list(map(float, part)) for part, why in zip(parts, whys, strict=True) if why is None]
    if not good:
        raise UnusableError(str(whys[0]))
    return _compressed(good, height, width), [why for why in whys if why]


def _compressed(mask: Any, height: int, width: int) -> dict[str, Any]:
    rle: Any = coco_mask.frPyObjects(mask, height, width)
    if isinstance(rle, list):  # of polygons
        rle = coco_mask.merge(rle) if len(rle) > 1 else rle[0]
    if not coco_mask.area(rle):
        raise UnusableError("a mask without a pixel in the picture")
    return {"size": [height, width], "counts": rle["counts"].decode()}


def _polygon_fault(part: Any, limit: float) -> str | None:
    if not isinstance(part, list) or not all(map(number, part)):
        return "a polygon with something else than numbers"
    if len(part) < 6 or len(part) % 2:
        return "a polygon of under three corners"
    return "a polygon that reaches far beyond the picture" if max(map(abs, part)) > limit else None


def check_rle(mask: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """An RLE, of a list or of COCO's string, as a list. Raises UnusableError."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or [whole(side) for side in size] != [height, width]:
        raise UnusableError("a mask of another size than the image")
    if not counts or not isinstance(counts, (list, str)):
        raise UnusableError("an empty mask")
    runs = [whole(run) for run in counts] if isinstance(counts, list) else runs_of(counts)
    if runs is None or any(run is None or run < 0 for run in runs):
        raise UnusableError("a damaged mask")
    if sum(run or 0 for run in runs) != height * width:
        raise UnusableError("a mask of another size than the image")
    return {"size": [height, width], "counts": runs}


def runs_of(text: str) -> list[int] | None:
    """Lengths of the runs in COCO's compressed RLE, None where it is damaged (cocoapi, maskApi.c, rleFrString)."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:  # more of this number follows
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs


def whole(value: Any) -> int | None:
    """A whole number, also where a file has it as 48.0 or "48"; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,15}(\.0*)?\s*", value, re.ASCII):
        return int(float(value))
    if not number(value) or value != int(value) or abs(value) >= 2**53:
        return None
    return int(value)


def number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return type(value) in (int, float) and -HIGHEST < value < HIGHEST  # no bool; NaN compares with nothing


def _id(entry: Any, position: int) -> str:
    """What to call an entry."""
    key = entry.get("id") if isinstance(entry, dict) else None
    return escaped(str(key))[:40] if isinstance(key, (int, float, str)) else f"at place {position + 1}"


def _summary(bad: list[tuple[str, str]], total: int, what: str, path: str) -> list[str]:
    return [f"{len(bad)} of {total} {what} of {path} skipped: {_causes(bad)}"] if bad else []


def _causes(bad: list[tuple[str, str]]) -> str:
    first = dict(reversed(bad))
    return ", ".join(f"{count} with {why} ({first[why]})" for why, count in Counter(w for w, _ in bad).items())
