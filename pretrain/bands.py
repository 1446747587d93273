"""Statistics of a source's bands: `python -m pretrain.bands SOURCE --out FILE.json`, for `--data.statistics`."""

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all is imported ends this without a traceback

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from launch.data.sources import Source, length_of, some_pictures
from launch.data.statistics import Statistics
from launch.data.tiff import MOST_BANDS
from launch.run.cli import parse, run
from launch.run.progress import ProgressReport, user_console
from pretrain.data import DataConfig, source_field
from vim_backbone.channels import check_sets
from vim_backbone.errors import UserError, require
from vim_backbone.images import reason

MOST_VALUES = 4096
"""Values of a band and picture that are kept for the percentiles."""
PERCENTILES = (0.1, 99.9)
Kind = tuple[int, str]
"""Number of bands, and their type."""


@dataclass
class Totals:
    """What was read of pictures of one kind; sums in float64."""

    bands: int
    pictures: int = 0
    count: np.ndarray = field(init=False)
    mean: np.ndarray = field(init=False)
    squares: np.ndarray = field(init=False)
    """Sum of the squared distances from the mean."""
    minimum: np.ndarray = field(init=False)
    maximum: np.ndarray = field(init=False)
    samples: list[list[np.ndarray]] = field(init=False)

    def __post_init__(self) -> None:
        self.count, self.mean, self.squares = (np.zeros(self.bands) for _ in range(3))
        self.minimum, self.maximum = np.full(self.bands, np.inf), np.full(self.bands, -np.inf)
        self.samples = [[] for _ in range(self.bands)]

    def add(self, values: np.ndarray, valid: np.ndarray, rng: np.random.Generator) -> None:
        """Values (bands, n) of a picture, and which of them hold something."""
        self.pictures += 1
        for band, (row, keep) in enumerate(zip(values, valid, strict=True)):
            valid_values = row[keep].astype(np.float64)
            if not len(valid_values):
                continue
            self._join(band, len(valid_values), valid_values.mean(), valid_values.var() * len(valid_values))
            self.minimum[band] = min(self.minimum[band], valid_values.min())
            self.maximum[band] = max(self.maximum[band], valid_values.max())
            self.samples[band].append(
                rng.choice(valid_values, MOST_VALUES) if len(valid_values) > MOST_VALUES else valid_values
            )

    def add_totals(self, part: "Totals", bands: Sequence[int]) -> None:
        """What was read of other pictures, whose bands are these."""
        self.pictures += part.pictures
        for place, band in enumerate(bands):
            if part.count[place]:
                self._join(band, part.count[place], part.mean[place], part.squares[place])
                self.minimum[band] = min(self.minimum[band], part.minimum[place])
                self.maximum[band] = max(self.maximum[band], part.maximum[place])
                self.samples[band] += part.samples[place]

    def _join(self, band: int, count: float, mean: float, squares: float) -> None:
        """Chan's update of mean and deviation."""
        total, shift = self.count[band] + count, mean - self.mean[band]
        self.squares[band] += squares + shift**2 * self.count[band] * count / total
        self.mean[band] += shift * count / total
        self.count[band] = total


def gather(
    source: Source,
    pictures: int,
    seed: int,
    bands: list[int] | None,
    nodata: float | None,
    max_megapixels: float,
    report: ProgressReport | None = None,
    sets: list[list[int]] | None = None,
) -> tuple[Statistics, list[str]]:
    """Statistics of the most frequent kind of picture, and lines on those that are left out.

    With `sets`, of all numbers of bands of the most frequent type: a set says which bands files with as many hold;
    where there is none, band k of a file is band k. Raises UserError where no picture can be read.
    """
    rng = np.random.default_rng(seed)
    totals: dict[Kind, Totals] = {}
    bad: list[str] = []
    kinds: dict[Kind, list[str]] = {}
    declared: set[float | str | None] = set()

    def sampled(length: int, count: int) -> list[int]:
        # a source with fewer pictures than its share has some of them drawn again
        return sorted(np.resize(np.random.default_rng(seed).permutation(length), count).tolist())

    count = min(pictures, length_of(source) or pictures)
    for done, (name, opened) in enumerate(some_pictures(source, count, sampled), start=1):
        try:
            with opened() as picture:
                values = picture.sample(max_megapixels)
                kind = (picture.bands, str(picture.dtype))
                chosen_values = values[places(len(values), bands, sets)]  # as a run has it
                missing = picture.missing(chosen_values, nodata)
                valid = (
                    np.isfinite(values) & ~missing
                    if values.dtype.kind == "f"
                    else np.broadcast_to(~missing, values.shape)
                )
                if nodata is None and picture.nodata is None and not valid.all():
                    share = f"{1 - valid.mean():.2%} of its values"
                    raise UserError(f"{name}: {share} are NaN or infinite; add --nodata nan where they mean no data")
                unknown = picture.nodata is not None and np.isnan(picture.nodata)  # NaN equals nothing
                declared.add("nan" if unknown else picture.nodata)
                totals.setdefault(kind, Totals(picture.bands)).add(values, valid, rng)
                kinds.setdefault(kind, []).append(name)
        except UserError:
            raise
        except Exception as error:  # a decoder may raise anything on damaged data
            bad.append(f"{name}: {reason(error)}")
        if report is not None:
            report.update(done, report.rate())
    if not totals:
        raise UserError(f"no picture can be read, such as {bad[0] if bad else 'none'}: see SOURCE")
    used, whole, used_sets = of_one_type(totals, sets)
    (common, *others) = declared  # of files that differ, one's nodata may be another's value
    common = None if common is None or others else float(common)
    measured = summary((whole.bands, used[0][1]), whole, bands, common if nodata is None else nodata, used_sets)
    notes = [f"{len(bad)} pictures cannot be read, such as {bad[0]}"] if bad else []
    notes += [
        f"{len(names)} pictures of {number} bands of {dtype} are left out, such as {names[0]}"
        f"{': a run passes over them' * (measured.bands is not None)}"
        for (number, dtype), names in kinds.items()
        if (number, dtype) not in used
    ]
    if nodata is None and len(declared) > 1:
        notes.append(f"the files name different nodata ({', '.join(sorted(map(str, declared)))}): each keeps its own")
    return measured, notes


def layout(number: int, sets: list[list[int]]) -> list[int]:
    """The bands that files with so many hold; none where they are not among the sets, of which there are some."""
    return next((each for each in sets if len(each) == number), [] if sets else list(range(number)))


def places(number: int, bands: list[int] | None, sets: list[list[int]] | None) -> list[int] | slice:
    """Where the chosen bands are in a file with so many; all of them where it lacks some that it should have."""
    available = list(range(number)) if sets is None else layout(number, sets)
    chosen = [available.index(band) for band in bands or [] if band in available]
    return chosen if chosen and (sets is not None or len(chosen) == len(bands or [])) else slice(None)


def of_one_type(
    totals: dict[Kind, Totals], sets: list[list[int]] | None
) -> tuple[list[Kind], Totals, list[list[int]] | None]:
    """The kinds of pictures that are used, what was read of them together, and the sets of bands that they hold.

    Without `sets` the most frequent kind; with them all kinds that they name, of the most frequent type.
    """
    if sets is None:
        kind = max(totals, key=lambda key: totals[key].pictures)
        return [kind], totals[kind], None
    of_types = Counter[str]()
    for (_, dtype), total in totals.items():
        of_types[dtype] += total.pictures
    ((dtype, _),) = of_types.most_common(1)
    used = sorted(key for key in totals if key[1] == dtype and layout(key[0], sets))
    if not used:
        counts = ", ".join(str(number) for number, _ in sorted(totals))
        raise UserError(f"--sets is {sets}: the pictures hold {counts} bands, which none of them is")
    used_sets = sets or [layout(number, sets) for number, _ in used]
    whole = Totals(1 + max(band for each in used_sets for band in each))
    for kind in used:
        whole.add_totals(totals[kind], layout(kind[0], sets))
    return used, whole, used_sets


def summary(
    kind: Kind, totals: Totals, bands: list[int] | None, nodata: float | None, sets: list[list[int]] | None = None
) -> Statistics:
    """As it is written. Raises UserError for bands that are not there, or hold nothing."""
    number, dtype = kind
    colours = bands is None and sets is None and dtype == "uint8" and number in (1, 3)
    every = list(range(number)) if sets is None else sorted({band for each in sets for band in each})
    chosen = every if bands is None else bands
    if wrong := [band for band in chosen if not 0 <= band < number]:
        raise UserError(f"--bands has {wrong[0]}: the pictures hold {number} bands of {dtype}, counted from 0")
    if empty := [band for band in chosen if not totals.count[band]]:
        raise UserError(f"band {empty[0]} holds no value: see --nodata")
    if colours:
        chosen = chosen * (3 // number)  # grey becomes RGB
    pools = [np.concatenate(totals.samples[band]) for band in chosen]
    low, high = np.array([np.percentile(pool, PERCENTILES) for pool in pools]).T
    return Statistics(
        bands=None if colours else chosen,
        dtype=dtype,
        mean=totals.mean[chosen].tolist(),
        deviation=np.sqrt(totals.squares[chosen] / totals.count[chosen]).tolist(),
        minimum=totals.minimum[chosen].tolist(),
        maximum=totals.maximum[chosen].tolist(),
        percentiles=[low.tolist(), high.tolist()],
        nodata="nan" if nodata is not None and not np.isfinite(nodata) else nodata,
        pictures=totals.pictures,
        sets=sets,
    )


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        return [int(word) for word in text.strip("[] ").split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of bands, such as 0,1,2,3") from error


def set_of(text: str) -> list[int]:
    """NUMBER=BANDS, the bands that files with so many hold."""
    number, equals, bands = text.partition("=")
    chosen = numbers(bands) if equals else []
    if number.strip() != str(len(chosen)):
        raise argparse.ArgumentTypeError(f"{text!r} does not name so many bands, as 3=0,1,2 does")
    return chosen


def main(argv: list[str]) -> None:
    """Read the pictures, write the file, and print it as a table."""
    parser = argparse.ArgumentParser("pretrain.bands", description=__doc__)
    parser.add_argument("source", help="as data.source, or a list as data.sources")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, for --data.statistics")
    parser.add_argument("--pictures", type=int, default=1000, help="how many are read, drawn at random")
    parser.add_argument("--bands", type=numbers, help="which bands, in which order, such as 3,2,1; all when not given")
    text = (
        "files may hold different numbers of bands: which ones, such as 3=2,1,0 5=0,1,2,3,4; alone, all numbers, and "
        "band k of a file is band k"
    )
    parser.add_argument("--sets", type=set_of, nargs="*", metavar="NUMBER=BANDS", help=text)
    parser.add_argument("--nodata", type=float, help="value of pixels that hold nothing, or nan; else as the files say")
    parser.add_argument("--split", default="train", help="split of a data set")
    parser.add_argument("--column", help="image column of a data set")
    parser.add_argument("--streaming", action="store_true", help="read the first rows of a data set as a stream")
    parser.add_argument("--max-megapixels", type=float, default=200.0, help="most pixels of a picture that are decoded")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(argv)
    require(options.pictures >= 1, "--pictures", options.pictures, "it must be at least 1")
    if options.sets:
        check_sets(options.sets, range(MOST_BANDS), "--sets")
    fields = {source_field(options.source): options.source, "split": options.split, "column": options.column}
    words = [f"--{name}={text}" for name, text in fields.items() if text is not None]
    words += [f"--streaming={str(options.streaming).lower()}"]
    source = parse(DataConfig, words, "pretrain.bands", "").open()
    total = min(options.pictures, length_of(source) or options.pictures)
    console = user_console()
    with ProgressReport(console, "pictures", total) as report:
        measured, notes = gather(
            source,
            options.pictures,
            options.seed,
            options.bands,
            options.nodata,
            options.max_megapixels,
            report,
            options.sets,
        )
    for note in notes:
        console.print(note, markup=False)
    try:
        measured.write(options.out)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}") from error
    print_table(measured)
    print(options.out)  # noqa: T201 - the command's result


def print_table(measured: Statistics) -> None:
    """A line for each band."""
    sets = "" if measured.sets is None else f", files of the bands {' or '.join(map(str, measured.sets))}"
    print(f"{measured.pictures} pictures of {measured.dtype}, nodata {measured.nodata}{sets}")  # noqa: T201
    print("".join(f"{name:>12}" for name in ("band", "mean", "deviation", "lowest", "0.1 %", "99.9 %", "highest")))  # noqa: T201
    names = ["red", "green", "blue"] if measured.bands is None else measured.bands
    columns = (measured.mean, measured.deviation, measured.minimum, *measured.percentiles, measured.maximum)
    for name, *values in zip(names, *columns, strict=True):
        print(f"{name:>12}" + "".join(f"{value:12.5g}" for value in values))  # noqa: T201


if __name__ == "__main__":
    sys.exit(run(main))
