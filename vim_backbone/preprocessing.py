"""How pictures become input of a backbone: bands, range, normalisation, and preprocessor_config.json."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf, isfinite, nan
from operator import index
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from vim_backbone.channels import Sets, channels_of, check_sets
from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError
from vim_backbone.files import read_json

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = "preprocessor_config.json"
BANDS_PROCESSOR = "VimImageProcessor"
"""Of `vim_backbone.transformers`: transformers has no processor of bands, and one of RGB would give other values."""
Range = tuple[tuple[float, ...], tuple[float, ...]]
"""Lowest and highest values."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to the values of a picture; as it stands, to 8-bit RGB."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each channel, where `range` is 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Deviation of each channel, where `range` is 0 to 1."""
    bands: tuple[int, ...] | None = None
    """Bands of a file that are the model's channels, in their order, counted from 0; None: pictures are 8-bit RGB."""
    dtype: str | None = None
    """Type of the files' values, where `bands` are chosen; None for any."""
    range: Range | Literal["type"] | None = None
    """Lowest and highest values, one of each for every band; "type" or None for those of the type. Of 8-bit RGB: what
    becomes 0 and 255 of pictures of more bits, one value each; None also refuses those that would be almost black."""
    nodata: float | None = None
    """Value of pixels that hold nothing (NaN for all that is no finite number); they become the mean."""
    sets: Sets | None = None
    """Which bands a file holds, in its order, by how many they are, where files hold different ones; `bands` are of
    them. None: a file holds the bands 0, 1, 2 and so on."""

    @property
    def in_chans(self) -> int:
        """Channels of the model."""
        return len(self.mean)

    @property
    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Values of each channel of a view that the model takes as 0 and as 1."""
        if self.bands is None:
            return (0.0,) * self.in_chans, (255.0,) * self.in_chans
        if isinstance(self.range, tuple):
            return self.range
        low, high = type_range(self.dtype or "uint8")
        return (low,) * self.in_chans, (high,) * self.in_chans

    @property
    def fill(self) -> tuple[float, ...]:
        """The value of each channel of a view that becomes 0 in the model."""
        return tuple(low + mean * (high - low) for low, high, mean in zip(*self.scale, self.mean, strict=True))

    @property
    def channel_sets(self) -> Sets | None:
        """Which channels of the model pictures have, where some lack some; as `VimConfig` takes them."""
        channels = {tuple(k for k, band in enumerate(self.bands or ()) if band in each) for each in self.sets or ()}
        every = tuple(range(self.in_chans))
        return tuple(sorted(channels - {(), every})) or None

    def of_file(self, number: int) -> "Preprocessing":
        """That of a file with so many bands; its `bands` are places in the file.

        Raises UserError where files of so many bands are not known, or hold nothing that is wanted.
        """
        if self.sets is None:
            return self
        sets = {len(each): each for each in self.sets}
        if number not in sets:
            numbers = " or ".join(map(str, sorted(sets)))
            raise UserError(f"it holds {number} bands, and files of {numbers} are known (data.statistics)")
        channels = [k for k, band in enumerate(self.bands or ()) if band in sets[number]]
        if not channels:
            raise UserError(f"it holds the bands {list(sets[number])}, none of {list(self.bands or ())}")
        return self._part(channels, tuple(sets[number].index((self.bands or ())[k]) for k in channels))

    def of_channels(self, number: int) -> "Preprocessing":
        """That of a picture with so many of the model's channels. Raises UserError where no set has so many."""
        if self.sets is None or number == self.in_chans:
            return self
        channels = channels_of(number, self.in_chans, self.channel_sets)
        return self._part(channels, tuple((self.bands or ())[k] for k in channels))

    def _part(self, channels: Sequence[int], bands: tuple[int, ...]) -> "Preprocessing":
        def part(values: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(values[channel] for channel in channels)

        limits = (part(self.range[0]), part(self.range[1])) if isinstance(self.range, tuple) else self.range
        return replace(self, mean=part(self.mean), std=part(self.std), bands=bands, range=limits, sets=None)

    def model_input(self, values: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """The values of a picture, all bands of its file (bands, h, w), as the model's input (1, channels, h, w).

        Its size stays as it is. Raises what `channel_values` raises.
        """
        return to_model(torch.tensor(self.channel_values(values))[None], torch.device(device), self)

    def channel_values(self, values: np.ndarray) -> np.ndarray:
        """All bands of a picture's file (bands, h, w) -> the model's channels (c, h, w), filled where nothing is.

        Of files with different bands, the channels are those that the file has. Raises UserError for a picture of other
        bands, of another type, or with NaN that is no nodata.
        """
        if self.sets is not None:
            return self.of_file(len(values)).channel_values(values)
        count = self.in_chans if self.bands is None else max(self.bands) + 1
        dtype = self.dtype or "uint8"
        if values.ndim != 3 or len(values) < count or values.dtype.newbyteorder("=") != dtype:
            raise UserError(
                f"the picture is {values.shape} of {values.dtype}: it must be (bands, height, width) of {dtype}, with "
                f"{count} bands or more"
            )
        chosen = values[list(self.bands)] if self.bands is not None else values[:count]
        filled = self.filled(chosen, invalid(chosen, self.nodata))
        if not np.isfinite(filled).all():
            raise UserError("the picture holds NaN or infinity, and nodata is not nan: fill them first")
        return filled

    def filled(self, values: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
        """The channels (c, h, w) with the mean where they are missing, a copy where it is; other types become float32.

        Floats are kept within one width of the range on either side of it, or a stray 3e38 would make a loss infinite.
        """
        keep = values.dtype if values.dtype in (np.uint8, np.uint16) else np.float32
        if values.dtype.kind == "f":
            low, high = (np.array(edge, np.float32)[:, None, None] for edge in self.scale)
            values = np.clip(values, 2 * low - high, 2 * high - low)
        copy = values.astype(keep, copy=missing is not None)
        if missing is not None:
            fill = np.array(self.fill)
            fill = fill.round() if keep != np.float32 else fill
            np.copyto(copy, fill.astype(keep)[:, None, None], where=missing)
        return copy

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "bands": None if self.bands is None else list(self.bands),
            "dtype": self.dtype,
            "range": [list(side) for side in self.range] if isinstance(self.range, tuple) else self.range,
            "nodata": "nan" if self.nodata is not None and not isfinite(self.nodata) else self.nodata,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        } | ({} if self.sets is None else {"sets": [list(each) for each in self.sets]})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Preprocessing":
        """From plain data, of older versions too. Raises UserError for what makes no sense."""
        try:
            bands, limits, nodata, sets = (data.get(key) for key in ("bands", "range", "nodata", "sets"))
            preprocessing = cls(
                mean=tuple(map(float, data["image_mean"])),
                std=tuple(map(float, data["image_std"])),
                bands=None if bands is None else tuple(map(index, bands)),
                dtype=None if data.get("dtype") is None else number_type(data["dtype"]),
                range=limits
                if limits in (None, "type")
                else (tuple(map(float, limits[0])), tuple(map(float, limits[1]))),
                nodata=nan if nodata == "nan" else None if nodata is None else float(nodata),
                sets=None if sets is None else tuple(tuple(map(index, each)) for each in sets),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"bands, range, image_mean and image_std make no sense: {error}") from error
        preprocessing.check()
        return preprocessing

    def _check_sets(self) -> None:
        assert self.sets is not None
        everything = sorted({band for each in self.sets for band in each})
        if self.bands is None or any(band < 0 for band in everything):
            raise UserError(f"sets are {self.sets} and bands {self.bands}: both are numbers of bands, counted from 0")
        check_sets(self.sets, everything, "sets")
        if strange := sorted(set(self.bands) - set(everything)):
            raise UserError(f"bands has {strange[0]}, which no file of the sets {self.sets} holds")
        if len(set(self.bands)) < len(self.bands):
            raise UserError(f"bands are {list(self.bands)}: of files with different bands, name each once")
        check_sets(self.channel_sets or (), range(self.in_chans), f"of the bands {list(self.bands)}, what files hold")

    def check(self) -> None:
        """Raise UserError where the numbers do not fit together."""
        channels = self.in_chans
        lengths = {"image_std": len(self.std)} | ({"bands": len(self.bands)} if self.bands is not None else {})
        if isinstance(self.range, tuple):
            ends = {"lowest values": len(self.range[0]), "highest values": len(self.range[1])}
            if self.bands is not None:
                lengths |= ends
            elif set(ends.values()) != {1}:
                raise UserError(f"range is {self.range}: of RGB it is one lowest and one highest value")
        for name, length in lengths.items():
            if length != channels or not channels:
                raise UserError(f"{name} has {length} values and image_mean {channels}: each needs one for each band")
        if any(band < 0 for band in self.bands or ()):
            raise UserError(f"bands are {list(self.bands or ())}: they are counted from 0")
        if self.sets is not None:
            self._check_sets()
        if isinstance(self.range, tuple) and any(
            not -inf < low < high < inf for low, high in zip(*self.range, strict=True)
        ):
            raise UserError(f"range is {self.range}: the lowest values must be below the highest")
        if not all(isfinite(mean) and isfinite(std) and std > 0 for mean, std in zip(self.mean, self.std, strict=True)):
            raise UserError(
                f"image_mean is {self.mean}, image_std {self.std}: they must be numbers, the second positive"
            )


RGB = Preprocessing()
"""8-bit RGB, with ImageNet's mean and deviation."""


def number_type(name: str) -> str:
    """Name of a type of real numbers. Raises TypeError or ValueError for anything else."""
    kind = np.dtype(name)
    if not isinstance(name, str) or kind.kind not in "biuf":
        raise ValueError(f"{name!r} is no type of real numbers")
    return kind.name


def type_range(dtype: str) -> tuple[float, float]:
    """Lowest and highest value of whole numbers of a type; 0 and 1 for floats."""
    kind = np.dtype(dtype)
    return (0.0, 1.0) if kind.kind not in "iu" else (float(np.iinfo(kind).min), float(np.iinfo(kind).max))


def is_nodata(values: np.ndarray, nodata: float) -> np.ndarray:
    """Where values are a finite `nodata`, of floats rounded to their type, as the writer of the file rounded it."""
    with np.errstate(over="ignore"):
        return values == (values.dtype.type(nodata) if values.dtype.kind == "f" else np.float64(nodata))


def invalid(values: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Where channels (c, h, w) hold nothing, as bool of their shape; None for nowhere.

    A pixel holds nothing where all its channels are `nodata`. With NaN as `nodata`, each value that is not finite.
    """
    if nodata is None:
        return None
    if not isfinite(nodata):
        missing = ~np.isfinite(values) if values.dtype.kind == "f" else None
    else:
        missing = np.broadcast_to(is_nodata(values, nodata).all(0), values.shape)
    return missing if missing is not None and missing.any() else None


def preprocessor(config: VimConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    """preprocessor_config.json, in the keys that transformers reads, and our own for bands, range and nodata."""
    height, width = config.img_size
    low, high = preprocessing.scale
    plain = not any(low) and len(set(high)) == 1  # all that transformers can say
    return {
        "image_processor_type": "ViTImageProcessor" if preprocessing.bands is None else BANDS_PROCESSOR,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": plain,
        "rescale_factor": 1 / high[0] if plain else 1.0,
        "do_normalize": True,
    } | preprocessing.to_dict()


def read_preprocessing(folder: str | Path) -> Preprocessing:
    """What is done to pictures for the backbone in a folder; `RGB` where its preprocessor_config.json is missing.

    Raises UserError for a damaged file.
    """
    path = Path(folder) / PREPROCESSOR
    if not path.exists():
        return RGB
    data = read_json(path)
    try:
        return Preprocessing.from_dict(data if isinstance(data, dict) else {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@overload
def to_model(images: Tensor, device: torch.device, preprocessing: Preprocessing = RGB) -> Tensor: ...
@overload
def to_model(images: list[Tensor], device: torch.device, preprocessing: Preprocessing = RGB) -> list[Tensor]: ...
@overload
def to_model(
    images: Tensor | list[Tensor], device: torch.device, preprocessing: Preprocessing = RGB
) -> Tensor | list[Tensor]: ...


def to_model(
    images: Tensor | list[Tensor], device: torch.device, preprocessing: Preprocessing = RGB
) -> Tensor | list[Tensor]:
    """(b, c, h, w) uint8, uint16 or float32, or a list -> float on the device, scaled and normalised."""
    if isinstance(images, list):
        return [to_model(image, device, preprocessing) for image in images]
    low, span, mean, std = _constants(preprocessing.of_channels(images.shape[-3]), device)
    images = images.to(device, non_blocking=True).to(torch.float32, copy=True)  # converted there: fewer bytes are sent
    return images.sub_(low).div_(span).sub_(mean).div_(std)


def to_pixels(images: Tensor, preprocessing: Preprocessing = RGB) -> Tensor:
    """The inverse of `to_model`, in [0, 1]."""
    _, _, mean, std = _constants(preprocessing.of_channels(images.shape[-3]), images.device)
    return (images * std + mean).clamp(0, 1)


def as_rgb(pixels: Tensor) -> Tensor:
    """Channels (..., c, h, w) as three to look at: the first three, or the first alone in grey."""
    return (
        pixels[..., :3, :, :] if pixels.shape[-3] >= 3 else pixels[..., :1, :, :].expand(*pixels.shape[:-3], 3, -1, -1)
    )


@lru_cache(maxsize=64)
def _constants(preprocessing: Preprocessing, device: torch.device) -> list[Tensor]:
    """Low, span, mean and deviation, (c, 1, 1) each.

    Kept: to send them to a GPU anew for every picture would make it wait each time.
    """
    low, high = preprocessing.scale
    span = [top - bottom for bottom, top in zip(low, high, strict=True)]
    return [torch.tensor(v, device=device).view(-1, 1, 1) for v in (low, span, preprocessing.mean, preprocessing.std)]
