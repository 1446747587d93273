"""The file of statistics of a source's bands, and the settings of bands, range and nodata, as one `Preprocessing`."""

from dataclasses import asdict, dataclass, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vim_backbone.errors import UserError
from vim_backbone.files import read_json, write_json
from vim_backbone.preprocessing import RGB, Preprocessing, number_type, read_preprocessing, type_range

RangeField = Literal["type", "percentiles"] | list[float] | None
"""Type of the field `data.range`."""
NodataField = float | Literal["nan"] | None
"""Type of the field `data.nodata`."""
COMMAND = "python -m pretrain.bands SOURCE --out FILE.json"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the bands of a source, in the values of its files."""

    bands: list[int] | None
    """Which bands of a file these are; None for 8-bit RGB."""
    dtype: str
    """Type of the values."""
    mean: list[float]
    deviation: list[float]
    minimum: list[float]
    maximum: list[float]
    percentiles: list[list[float]]
    """0.1 and 99.9 per cent of the values lie below."""
    nodata: float | str | None
    """Value of pixels that hold nothing, or "nan"."""
    pictures: int
    """How many were read."""
    sets: list[list[int]] | None = None
    """Which of the bands a file holds, in its order, a set for each number of bands; None where all hold the same."""

    def write(self, path: Path) -> None:
        """Write the file of statistics."""
        write_json(path, {key: value for key, value in asdict(self).items() if (key, value) != ("sets", None)})

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Read what `write` wrote. Raises UserError for a file that is missing, or is another one."""
        data = read_json(path)
        try:
            stats = cls(**data)
            if stats.bands is not None and not all(type(band) is int and band >= 0 for band in stats.bands):
                raise ValueError(f"bands are {stats.bands}, no numbers of bands")
            if stats.nodata not in (None, "nan") and not isinstance(stats.nodata, int | float):
                raise ValueError(f"nodata is {stats.nodata!r}, no number")
            channels = len(stats.mean)
            per_band: list[Any] = [stats.deviation, stats.minimum, stats.maximum, *stats.percentiles]
            numbers = [stats.mean, *per_band]
            if stats.sets is not None and not all(type(band) is int for each in stats.sets for band in each):
                raise ValueError(f"sets are {stats.sets}, no numbers of bands")
            if stats.sets is not None and stats.bands is None:
                raise ValueError("it has sets, and no bands")
            wrong = (
                any(len(values) != channels for values in numbers) or not np.isfinite(np.array(numbers, float)).all()
            )
            if wrong or len(stats.percentiles) != 2 or channels != (3 if stats.bands is None else len(stats.bands)):
                raise ValueError("the numbers of values differ, or some are no numbers")
            low, high = stats.percentiles
            if min(stats.deviation) < 0 or any(above < below for below, above in zip(low, high, strict=True)):
                raise ValueError("a deviation is negative, or percentiles are in the wrong order")
            number_type(stats.dtype)
        except (TypeError, ValueError) as error:
            raise UserError(f"data.statistics {path} was not written by {COMMAND}: {error}") from error
        return stats


def preprocessing_of(
    statistics: str | None, bands: list[int] | None, limits: RangeField, nodata: NodataField
) -> Preprocessing:
    """What `data.statistics`, `data.bands`, `data.range` and `data.nodata` say together.

    Raises UserError where they do not fit, and for bands whose mean and deviation nothing says.
    """
    nothing = nan if nodata == "nan" else nodata
    if bands is not None and (not bands or min(bands) < 0):
        raise UserError(f"data.bands is {bands}: give the numbers of bands, counted from 0")
    if isinstance(limits, list) and not (len(limits) == 2 and limits[0] < limits[1] and all(map(isfinite, limits))):
        raise UserError(f"data.range is {limits}: give the lowest and the highest value, such as [0, 4095]")
    if statistics is None:
        if limits == "percentiles":
            raise UserError(f"data.range is 'percentiles': they are taken from data.statistics, made by {COMMAND}")
        pair = ((limits[0],), (limits[1],)) if isinstance(limits, list) else limits
        plain = replace(RGB, range=pair, nodata=nothing)
        if bands is None:
            return plain
        # the size of a model can be planned with this; its values cannot be normalised, see `require_statistics`
        blank = (0.5,) * len(bands)
        whole = ((limits[0],) * len(bands), (limits[1],) * len(bands)) if isinstance(limits, list) else limits
        return Preprocessing(mean=blank, std=blank, bands=tuple(bands), range=whole, nodata=nothing)
    measured = Statistics.read(Path(statistics).expanduser())
    nothing = nothing if nodata is not None else nan if measured.nodata == "nan" else measured.nodata
    assert not isinstance(nothing, str)
    if measured.bands is None:
        if bands is not None:
            raise UserError(
                f"data.bands is {bands}, but data.statistics {statistics} are of 8-bit RGB: add --bands there"
            )
        pair = ((limits[0],), (limits[1],)) if isinstance(limits, list) else None if limits is None else "type"
        mean, std = (tuple(value / 255 for value in values) for values in (measured.mean, measured.deviation))
        std = tuple(value or 1.0 for value in std)  # a colour of one value
        return checked(Preprocessing(mean=mean, std=std, range=pair, nodata=nothing), statistics)
    chosen = measured.bands if bands is None else bands
    if absent := sorted(set(chosen) - set(measured.bands)):
        raise UserError(
            f"data.bands has {absent[0]}, data.statistics {statistics} have the bands {measured.bands}: choose of these"
        )
    places = [measured.bands.index(band) for band in chosen]
    lowest, highest = (
        ([limits[side]] * len(measured.bands) if isinstance(limits, list) else measured.percentiles[side])
        for side in (0, 1)
    )
    if limits == "type" or (limits is None and measured.dtype in ("uint8", "bool")):
        lowest, highest = ([edge] * len(measured.bands) for edge in type_range(measured.dtype))
    low, high = np.array(lowest)[places], np.array(highest)[places]
    high = np.where(high > low, high, low + 1.0)  # a band of one value
    mean = (np.array(measured.mean)[places] - low) / (high - low)
    std = np.array(measured.deviation)[places] / (high - low)
    std = np.where(std > 0, std, 1.0)  # of one value too: others, if they come, stay numbers of its size
    return checked(
        Preprocessing(
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            bands=tuple(chosen),
            dtype=measured.dtype,
            range=(tuple(low.tolist()), tuple(high.tolist())),
            nodata=nothing,
            sets=None if measured.sets is None else tuple(map(tuple, measured.sets)),
        ),
        statistics,
    )


def checked(preprocessing: Preprocessing, statistics: str) -> Preprocessing:
    """The same. Raises UserError where the numbers make no sense."""
    try:
        preprocessing.check()
    except UserError as error:
        raise UserError(f"data.statistics {statistics}: {error}") from error
    return preprocessing


def require_statistics(preprocessing: Preprocessing) -> None:
    """Raise UserError where nothing says mean and deviation of the bands."""
    if preprocessing.bands is not None and preprocessing.dtype is None:
        bands = ",".join(map(str, preprocessing.bands))
        raise UserError(
            f"data.bands is {list(preprocessing.bands)}: their mean and deviation are not known, run {COMMAND} "
            f"--bands {bands} and add --data.statistics FILE.json"
        )


def channels_of_bands(folder: Path, preprocessing: Preprocessing) -> list[int]:
    """Which channels of a backbone, each of which is a token, have the bands of `preprocessing`.

    Raises UserError for a band that the backbone does not know.
    """
    before, bands = (each.bands or tuple(range(each.in_chans)) for each in (read_preprocessing(folder), preprocessing))
    if strange := [band for band in bands if band not in before]:
        raise UserError(
            f"data.statistics has band {strange[0]}: {folder} was pretrained on the bands {list(before)}; say which of "
            "them your files hold, with --sets of python -m pretrain.bands"
        )
    return [before.index(band) for band in bands]
