"""The work on all pictures of a source: read ahead by threads, packed into rows, and kept part by part."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from typing import NamedTuple, Protocol

from torch import Tensor

from vim_backbone.embedding.features import Selection, compute
from vim_backbone.embedding.parts import Parts
from vim_backbone.images import reason
from vim_backbone.vim import VisionMamba

ROW_PATCHES = 1 << 16
"""Patches that are packed into one row, at most, but of a picture that has more alone."""
AHEAD = 4
"""Pictures that are read ahead, for each thread that reads."""
Read = tuple[int, Tensor | str]
"""Index of a picture, and the input that it became (1, c, h, w), or why it is bad."""


class Pictures(Protocol):
    """Pictures of a source, by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a picture, on one line."""
        ...

    def read(self, index: int) -> Tensor:
        """The backbone's input (1, c, h, w). Raises anything that a decoder raises."""
        ...


class Share(NamedTuple):
    """Which of several processes this one is."""

    rank: int = 0
    processes: int = 1


ALL = Share()


class Progress(NamedTuple):
    """How far all processes are, as this one knows."""

    done: int
    bad: int


def embed_share(
    model: VisionMamba,
    pictures: Pictures,
    selection: Selection,
    parts: Parts,
    *,
    batch_size: int,
    threads: int,
    name_bad: Callable[[str], None],
    report: Callable[[Progress], None],
    share: Share = ALL,
) -> None:
    """Compute and keep the parts that are missing, of those that fall to this process.

    Args:
        batch_size: pictures of a row, at most.
        threads: that read pictures.
        name_bad: is given a line on each picture that cannot be used.
        report: is called after each `batch_size` pictures.
    """
    missing = parts.missing(*share)
    before, bad = parts.pictures_done(), len(parts.bad())
    every = chain.from_iterable(map(parts.indices, missing))

    def watched(some: Iterator[Read]) -> Iterator[Read]:
        done, wrong = before, bad
        while batch := list(islice(some, batch_size)):
            yield from batch
            done += len(batch)
            wrong += sum(isinstance(picture, str) for _, picture in batch)
            report(Progress(done, wrong))

    with closing(read_ahead(pictures, every, threads)) as read:
        for part in missing:
            features, more = embed_part(model, watched(islice(read, len(parts.indices(part)))), selection, batch_size)
            parts.write(part, features, more)
            for index, why in more.items():
                name_bad(f"cannot use {pictures.name(index)}: {why}")
            bad += len(more)
            before = parts.pictures_done() if share.processes > 1 else before + len(parts.indices(part))


def read_ahead(pictures: Pictures, indices: Iterable[int], threads: int) -> Generator[Read, None, None]:
    """Pictures in this order, each read by one of some threads; the reason in place of one that is bad."""

    def attempt(index: int) -> Tensor | str:
        try:
            return pictures.read(index)
        except Exception as error:  # a decoder may raise anything on damaged data
            return reason(error)

    pool = ThreadPoolExecutor(threads)
    waiting: list[tuple[int, Future[Tensor | str]]] = []
    try:
        for index in indices:
            waiting.append((index, pool.submit(attempt, index)))
            if len(waiting) > AHEAD * threads:
                first, result = waiting.pop(0)
                yield first, result.result()
        yield from ((index, result.result()) for index, result in waiting)
    finally:  # after Ctrl-C what is read ahead is not waited for
        pool.shutdown(wait=False, cancel_futures=True)


def embed_part(
    model: VisionMamba, pictures: Iterable[Read], selection: Selection, batch_size: int
) -> tuple[dict[int, dict[str, Tensor]], dict[int, str]]:
    """The features of pictures by index, and why others are bad."""
    features: dict[int, dict[str, Tensor]] = {}
    bad: dict[int, str] = {}
    batch: dict[int, Tensor] = {}

    def flush() -> None:
        if batch:
            device = model.pos_embed.device
            images = [image[0].to(device, non_blocking=True) for image in batch.values()]
            features.update(zip(batch, compute(model, images, selection), strict=True))
            batch.clear()

    patches = 0
    for index, picture in pictures:
        if isinstance(picture, str):
            bad[index] = picture
            continue
        rows, columns = model.config.grid(*picture.shape[-2:])
        count = rows * columns * model.config.tokens_a_patch(picture.shape[1])
        if len(batch) == batch_size or patches + count > ROW_PATCHES:
            flush()
            patches = 0
        batch[index] = picture
        patches += count
    flush()
    return features, bad
