"""Pictures that cannot be used: replaced, counted, named, and fatal only when they are many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vim_backbone.errors import UserError
from vim_backbone.files import append_lines, explain
from vim_backbone.images import reason

Sample = TypeVar("Sample")
MAX_TRIES = 100
"""Bad pictures in a row, after which a sample is given up and the run ends."""


class Named(Protocol):
    """Samples by index that have names."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def name(self, index: int) -> str:
        """What to call sample `index` in messages."""
        ...


class ReadBatch(Protocol):
    """What a batch of any task holds on the pictures that were read for it."""

    @property
    def images(self) -> Any:
        """None where a sample had to be given up."""

    @property
    def names(self) -> list[str]:
        """Pictures that were used."""
        ...

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Pictures passed over, with the reason."""
        ...


class BadPictures:
    """Counts and names pictures that cannot be used, in bad_pictures.txt of the run; fails the run past a share."""

    def __init__(self, path: Path, total: int | None, max_share: float) -> None:
        self.path = path
        self.total = total
        self.max_share = max_share
        self.known = self._read()
        self.seen = 0

    def add(self, batch: ReadBatch) -> list[str]:
        """Take note of a batch; returns a line for each picture not met before. Raises UserError past the share."""
        self.seen += len(batch.names) + len(batch.bad)
        if batch.images is None:
            name, why = batch.bad[-1]
            number = len({name for name, _ in batch.bad})
            raise UserError(f"{number} pictures in a row cannot be used, the last {name} ({why}): see data.source")
        fresh = {name: why for name, why in batch.bad if name not in self.known}
        if not fresh:
            return []
        append_lines(self.path, "".join(f"{name}\t{why}\n" for name, why in fresh.items()))
        self.known = self._read()  # other processes write to it too
        total = self.total or max(self.seen, 1000)
        if len(self.known) > self.max_share * total:
            first, why = next(iter(self.known.items()))
            raise UserError(
                f"{len(self.known)} of {total} pictures cannot be used, over data.max_bad_share {self.max_share:g}; "
                f"the first is {first} ({why}), all are in {self.path}"
            )
        return [f"skipped {name}: {why} ({len(self.known)} of {total} so far)" for name, why in fresh.items()]

    def _read(self) -> dict[str, str]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {explain(error)}; move it away") from error
        return dict(line.split("\t", 1) for line in lines if "\t" in line)


def first_usable(
    source: Named, index: int, read: Callable[[int, int], Sample], among: range | None = None
) -> tuple[Sample | None, int, list[tuple[str, str]]]:
    """Sample `index`, or the next one of the source that can be read.

    Args:
        read: (index, number of samples passed over before) -> the sample; it may raise anything.
        among: indices of those that can stand in for it; None: all.

    Returns:
        The sample, None after MAX_TRIES bad ones; its index; names of those passed over, with the reason.
    """
    bad: list[tuple[str, str]] = []
    among = among or range(len(source))
    for attempt in range(min(MAX_TRIES, len(among))):
        candidate = among[(index - among.start + attempt) % len(among)]
        try:
            return read(candidate, attempt), candidate, bad
        except Exception as error:  # a decoder may raise anything on damaged data
            bad.append((source.name(candidate), reason(error)))
    return None, index, bad
