"""Pictures with maps of labels, from two folders; checked before training, augmented after mmsegmentation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.transforms import v2

from finetune.config import Places, place_of
from finetune.memory_cache import TensorCache
from finetune.pixels import fill_of, open_place, read_file, resize_pixels, stacked
from finetune.segmentation.config import CropConfig, SegmentationData
from launch.data.data_sets import Cell, Cells, DataSet, HubDataset, column_of, data_set_of, holds_pictures, is_image
from launch.data.folders import ImageFiles, files_below
from launch.data.images import BadPictureError, check_size, open_picture, upright
from launch.data.reading import open_file
from launch.data.sources import ImageSource
from vim_backbone.errors import UserError, escaped
from vim_backbone.preprocessing import RGB, Preprocessing
from vim_backbone.vim import Images

IGNORED = 255
WRONG = 254
"""Stands for values that no class has, where classes are looked up."""
MOST_NAMED = 10
MAPS_CHECKED = 200
"""Maps of each split whose labels are looked at before training; sizes are compared for all."""
CROP_TRIES = 10


@dataclass(frozen=True)
class Pairs:
    """Pictures and their maps, in files or in the rows of a data set."""

    images: Sequence[Path | Cell]
    maps: Sequence[Path | Cell]
    data: SegmentationData
    classes: int
    preprocessing: Preprocessing = RGB

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """File name of the picture, or its row."""
        return escaped(self.images[index].name)

    @property
    def source(self) -> ImageSource:
        """The pictures alone."""
        if isinstance(self.images, Cells):
            return self.images.source
        return ImageFiles([path for path in self.images if isinstance(path, Path)])

    def image(self, index: int) -> Tensor:
        """The picture (c, h, w), uint8 or float32."""
        return read_file(self.images[index], self.preprocessing, self.data.max_megapixels)

    @cached_property
    def table(self) -> np.ndarray:
        """(65536,) uint8: the class of each value in a map, IGNORED, or WRONG."""
        table = np.full(1 << 16, WRONG, np.uint8)
        table[IGNORED] = IGNORED
        first = int(self.data.zero_is_ignored)
        if first:
            table[0] = IGNORED
        table[self.data.values or range(first, first + self.classes)] = np.arange(self.classes)
        return table

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(h, w) uint16 or uint8, the map as its file has it, and (h, w) uint8, the class of each pixel, or IGNORED.

        Raises BadPictureError where it is no map, or has a label that no class has.
        """
        raw = values = read_map(self.maps[index], self.data.max_megapixels)
        if raw.ndim != 2:
            raise BadPictureError(f"{self.maps[index]} has {raw.shape[-1]} channels: a map has one, of labels")
        outside = np.False_
        if raw.dtype not in (np.uint8, np.uint16):
            outside = (raw < 0) | (raw >= len(self.table)) | (raw != np.floor(raw))
            values = np.where(outside, 0, raw).astype(np.uint16)
        labels = self.table[values]
        wrong = (labels == WRONG) | outside
        if wrong.any():
            first = int(self.data.zero_is_ignored)
            right = self.data.values or f"{first} .. {self.classes + first - 1}"
            raise BadPictureError(f"{self.maps[index]} has label {raw[wrong][0]}: it must be {right}, or ignored")
        return values, labels

    def labels(self, index: int) -> np.ndarray:
        """(h, w) uint8: the class of each pixel, or IGNORED. Raises BadPictureError as `read`."""
        return self.read(index)[1]

    def pair(self, index: int) -> tuple[Tensor, np.ndarray]:
        """Picture and labels. Raises BadPictureError also where these differ in size."""
        picture, labels = self.image(index), self.labels(index)
        if (size := labels.shape[::-1]) != (full := tuple(picture.shape[:0:-1])):
            raise BadPictureError(f"{self.maps[index]} is {size} pixels, its picture {full}")
        return picture, labels


def read_map(place: Path | Cell, max_megapixels: float) -> np.ndarray:
    """The values of a map as its file has them, (h, w), or (h, w, channels) where it is none."""
    if isinstance(place, Path) and place.suffix.lower() == ".npy":
        with open_file(place) as array:
            bands, _ = array.values(max_megapixels)
            return bands[0] if len(bands) == 1 else np.moveaxis(bands, 0, -1)
    with open_picture(place if isinstance(place, Path) else place.file) as image:
        check_size(image, max_megapixels)
        step = level_step(image)
        raw = np.asarray(upright(image))
        return raw if step == 1 else raw // step


def level_step(image: Image.Image) -> int:
    """How far apart Pillow puts the levels of an opened map of 2 or 4 bits, which it spreads over 8."""
    decoding = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    raw_mode = decoding[0] if isinstance(decoding, tuple) and decoding else decoding
    return {"L;2": 85, "L;4": 17}.get(str(raw_mode), 1)


def class_names(data: SegmentationData) -> list[str]:
    """Names of the classes. Raises UserError where nothing says how many there are, or the sources differ."""
    root = Path(data.source).expanduser()
    files = bool(data.source) and data_set_of(data.source, data.train_split) is None
    if files and not root.is_dir():
        raise UserError(f"data.source {root} does not exist: give a folder with {data.images}/ and {data.maps}/")
    names: list[str] = []
    lists = [*sorted(root.glob("objectInfo*.txt")), *root.glob("classes.txt")] if files else []
    if lists:
        try:
            text = lists[0].read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {lists[0]}: {error}") from error
        lines = [line for line in text.splitlines() if line.strip()]
        table = lists[0].name.startswith("objectInfo")
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines[int(table) :]]
        for setting, value in (("num_classes", data.num_classes), ("values", data.values)):
            if value is not None and len(names) != (len(value) if isinstance(value, list) else value):
                raise UserError(f"data.{setting} is {value}, but {lists[0]} names {len(names)} classes")
        if not 2 <= len(names) <= 254:
            raise UserError(f"{lists[0]} names {len(names)} classes: it must be 2 to 254")
    elif number := data.num_classes or len(data.values or []):
        names = [f"class {k}" for k in range(number)]
    if not names:
        more = f", or put classes.txt into {root}, a name a line" if files else " or data.values"
        raise UserError(f"how many classes? set data.num_classes{more}")
    return names


def open_pairs(
    data: SegmentationData, split: str, classes: list[str], preprocessing: Preprocessing = RGB
) -> tuple[Pairs, list[str]]:
    """The pairs of a split that fit together, and lines on those that do not, and on what the maps hold.

    Raises UserError for a folder or map that is missing, and for labels out of range.
    """
    if data.source and (place := data_set_of(data.source, split)):
        return open_rows(data, place, classes, preprocessing)
    images, maps = (_folder(data, places, split) for places in (data.images, data.maps))
    for folder, setting in ((images, "data.images"), (maps, "data.maps")):
        if not folder.is_dir() and folder.name == split and any(path.is_file() for path in folder.parent.glob("*")):
            raise UserError(
                f"{folder} does not exist, but files in {folder.parent} do: move them into {data.train_split}/ and "
                f"{data.val_split}/ there, pictures and maps alike"
            )
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: set {setting}, or the split ({split!r})")
    files = [Path(path) for path in files_below(images)]
    by_name = {path.relative_to(maps).with_suffix(""): path for path in map(Path, files_below(maps))}
    keys = [path.relative_to(images).with_suffix("") for path in files]
    if missing := [key for key in keys if key not in by_name]:
        raise UserError(f"{len(missing)} pictures of {images} have no map in {maps}: the first is {missing[0]}.png")
    pairs, unlike = [], []
    for file, key in zip(files, keys, strict=True):
        sizes = _size(file), _size(by_name[key])
        (unlike if None not in sizes and sizes[0] != sizes[1] else pairs).append((file, by_name[key], sizes))
    if len(unlike) > len(pairs):
        file, path, sizes = unlike[0]
        raise UserError(f"{path} is {sizes[1]} pixels, its picture {file.name} {sizes[0]}; {len(unlike)} maps are so")
    usable = Pairs([a for a, _, _ in pairs], [b for _, b, _ in pairs], data, len(classes), preprocessing)
    more = _check_labels(usable, split, classes)
    names = ", ".join(escaped(file.name) for file, _, _ in unlike[:5])
    notes = [f"{len(unlike)} pairs of {split} skipped, picture and map differ in size: {names}"] if unlike else []
    return usable, [*notes, *more]


def _folder(data: SegmentationData, places: Places, split: str) -> Path:
    """The folder of the pictures or maps of a split."""
    whole = isinstance(places, str) and "{split}" not in places
    return place_of(data.source, f"{places}/{{split}}" if whole else places, split, data.train_split)


def open_rows(
    data: SegmentationData, place: DataSet, classes: list[str], preprocessing: Preprocessing
) -> tuple[Pairs, list[str]]:
    """As `open_pairs`, of a data set. A map of another size than its picture is named when it is read."""
    loaded = place.load()
    columns: list[str] = []
    for field, column in (("image_column", data.image_column), ("map_column", data.map_column)):
        others = {*columns, data.map_column if field == "image_column" else None}
        left = {key: feature for key, feature in loaded.features.items() if key not in others}
        columns.append(column_of(left, place.title, field, column, "Image", holds_pictures if column else is_image))
    images, maps = (Cells(HubDataset(loaded, column, f"{place.split} "), place.title) for column in columns)
    pairs = Pairs(images, maps, data, len(classes), preprocessing)
    sizes = [(_size(images[index]), _size(maps[index]), index) for index in checked(pairs)]
    unlike = [each for each in sizes if None not in each and each[0] != each[1]]
    if len(unlike) > len(sizes) / 2:
        of_picture, of_map, index = unlike[0]
        raise UserError(f"{maps[index]} is {of_map} pixels, its picture {of_picture}; {len(unlike)} maps are so")
    return pairs, _check_labels(pairs, place.split, classes)


def checked(pairs: Pairs) -> range:
    """Pairs that are looked at before training."""
    return range(0, len(pairs), max(1, len(pairs) // MAPS_CHECKED))


def _size(place: Path | Cell) -> tuple[int, int] | None:
    try:
        with open_place(place) as picture:
            return picture.size[1], picture.size[0]
    except Exception:  # it is named when it is read
        return None


def _check_labels(pairs: Pairs, split: str, classes: list[str]) -> list[str]:
    """What the maps hold: the share that counts for nothing, and classes that occur nowhere.

    Raises UserError where they cannot be what was meant.
    """
    counts, read = np.zeros(len(pairs.table), np.int64), 0
    for index in checked(pairs):
        try:
            counts += np.bincount(pairs.read(index)[0].ravel(), minlength=len(counts))
            read += 1
        except BadPictureError as error:
            raise UserError(
                f"{error}; see data.num_classes ({pairs.classes}) and data.zero_is_ignored, or set data.values"
            ) from error
        except Exception:  # a damaged file is one bad picture, named when it is read
            continue
    of_classes = np.bincount(pairs.table, counts, minlength=256)
    values = np.flatnonzero(counts).tolist()
    folder = pairs.maps[0].parent
    if read and not of_classes[: pairs.classes].any():
        raise UserError(
            f"no pixel of the maps in {folder} counts, all have the values {values}: see data.zero_is_ignored, or set "
            "data.values to the value of each class, such as [0, 255]"
        )
    if values == [0, IGNORED] and split == pairs.data.train_split and not pairs.data.values:
        raise UserError(
            f"the maps in {folder} have the values 0 and 255 alone, and 255 counts for nothing: set data.values "
            "[0, 255] where it is a class"
        )
    absent = [classes[k] for k in np.flatnonzero(of_classes[: pairs.classes] == 0)]
    line = f"{of_classes[IGNORED] / counts.sum():.1%} of the pixels count for nothing" if of_classes[IGNORED] else ""
    if absent:
        more = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
        line += f"{'; ' * bool(line)}no pixel is of {', '.join(absent[:MOST_NAMED])}{more}"
    return [f"in {read} maps of {split} {line}"] if read and line else []


class PhotometricDistort(v2.RandomPhotometricDistort):
    """mmsegmentation's: SSD's distortion, with its hue, and without torchvision's exchange of the colour channels."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """What to do to one picture."""
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class PairSamples:
    """Pictures with their maps as samples."""

    def __init__(self, pairs: Pairs, size: tuple[int, int]) -> None:
        self.pairs = pairs
        self.size = size
        self._cache: TensorCache | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def fill_cache(self) -> None:
        """Decode all pictures and maps, and hold them in memory. Raises UserError where they do not fit."""

        def read(index: int) -> tuple[Tensor, Tensor]:
            picture, labels = self.pairs.pair(index)
            return picture, torch.from_numpy(labels)

        self._cache = TensorCache(read, len(self), self.pairs.data.workers)

    def pair(self, index: int) -> tuple[Tensor, np.ndarray]:
        """As `Pairs.pair`; neither is to be written to."""
        if self._cache is None:
            return self.pairs.pair(index)
        picture, labels = self._cache[index]
        return picture, labels.numpy()

    def name(self, index: int) -> str:
        """File name of the picture."""
        return self.pairs.name(index)


class TrainCrops(PairSamples):
    """Training crops: rescaled, cropped so that no class fills it, mirrored, distorted."""

    def __init__(self, pairs: Pairs, size: tuple[int, int], crop: CropConfig) -> None:
        super().__init__(pairs, size)
        self.crop = crop
        colours = pairs.preprocessing.bands is None
        self.distort = PhotometricDistort() if crop.photometric and colours else None

    def draw(self, index: int) -> tuple[Tensor, Tensor]:
        """(c, h, w) uint8 or float32, and (h, w) uint8."""
        picture, values = self.pair(index)
        labels = Image.fromarray(values)
        low, high = self.crop.ratio
        factor = covering(picture.shape[1:], self.size) * (low + (high - low) * torch.rand(()).item())
        height, width = (max(1, round(side * factor)) for side in picture.shape[1:])
        picture = resize_pixels(picture, (height, width))
        target = torch.from_numpy(np.array(labels.resize((width, height), Image.Resampling.NEAREST)))
        picture, target = self._cut(picture, target)
        if torch.rand(()) < self.crop.flip:
            picture, target = picture.flip(-1), target.flip(-1)
        picture, target = self._fill(picture, target)
        return self.distort(picture) if self.distort is not None else picture, target

    def _cut(self, picture: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        height, width = self.size
        box = (slice(0, height), slice(0, width))
        for _ in range(CROP_TRIES):
            room = [max(0, full - side) for full, side in zip(target.shape, self.size, strict=True)]
            top, left = (int(torch.randint(most + 1, ())) for most in room)
            box = (slice(top, top + height), slice(left, left + width))
            counts = torch.bincount(target[box].flatten(), minlength=IGNORED)[:IGNORED]
            if counts.count_nonzero() > 1 and counts.max() < self.crop.category_max * counts.sum():
                break
        return picture[(slice(None), *box)], target[box]

    def _fill(self, picture: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """A crop of a smaller picture, filled up with grey, or the mean of bands, that counts for nothing."""
        height, width = target.shape
        fill = fill_of(picture, self.pairs.preprocessing)
        fill = torch.full_like(fill, 124) if self.pairs.preprocessing.bands is None else fill
        filled = fill.repeat(1, *self.size)
        filled[:, :height, :width] = picture
        labels = torch.full(self.size, IGNORED, dtype=torch.uint8)
        labels[:height, :width] = target
        return filled, labels

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Images, Tensor]:
        """(b, c, h, w), or a list where bands differ, and (b, h, w)."""
        images = stacked([image for image, _ in samples], self.pairs.preprocessing)
        return images, torch.stack([labels for _, labels in samples])


class WholePictures(PairSamples):
    """Pictures for evaluation, scaled to cover the training crops; maps as they are."""

    def draw(self, index: int) -> tuple[Tensor, Tensor]:
        """(c, h, w) uint8 or float32, and (H, W) uint8."""
        picture, labels = self.pair(index)
        return to_test_size(picture, self.size), torch.from_numpy(labels)

    def collate(self, samples: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Two lists: sizes differ."""
        return [image for image, _ in samples], [labels for _, labels in samples]


def covering(shape: Sequence[int], size: tuple[int, int]) -> float:
    """Factor at which a picture (h, w) just covers a crop of `size`: with a square one its shorter side is as long."""
    return max(side / full for side, full in zip(size, shape, strict=True))


def to_test_size(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(c, h, w) -> (c, h, w) of the same type, scaled to cover a crop of `size`."""
    factor = covering(picture.shape[1:], size)
    height, width = (max(1, math.floor(side * factor + 0.5)) for side in picture.shape[1:])
    return resize_pixels(picture, (height, width))
