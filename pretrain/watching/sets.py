"""Which pictures are held out of training, and which labelled ones are scored."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np

from launch.data.first_look import LOOKED_AT, look_at_first, spread
from launch.data.labelled import Labelled, missing_classes, open_labelled, shuffled_within_classes
from launch.data.sources import ImageSource, MixedPictures, Picked, Source, TitledPictures
from launch.data.streams import Stream
from launch.state.checkpoint import TrainState
from pretrain.data import DataConfig
from pretrain.watching.config import EvalConfig
from vim_backbone.errors import UserError, require
from vim_backbone.images import reason


@dataclass(frozen=True)
class EvalSets:
    """What an evaluation reads."""

    held_out: ImageSource | None
    """Pictures that are never trained on."""
    train: Labelled | None
    """Labelled pictures that probes learn from."""
    val: Labelled | None
    """Labelled pictures that they are scored on."""

    @property
    def pictures(self) -> int:
        """How many there are in all."""
        return sum(
            len(each) for each in (self.held_out, *(half and half.source for half in (self.train, self.val))) if each
        )


def key_of(name: str, seed: int) -> int:
    """A number below 2^64 that is a function of a picture's name and the seed alone."""
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, ImageSource | None]:
    """The pictures that are trained on, and those that are held out; None for none.

    A picture that is added later, or taken away, moves no other one from one side to the other, in a data set none that
    lies before it: there the name is the row's number. Raises UserError for a
    stream, and for a share that leaves none on either side.
    """
    if not share:
        return source, None
    if isinstance(source, Stream):
        raise UserError(f"eval.share is {share}: a stream's pictures cannot be held out, set data.streaming false")
    parts = source.parts if isinstance(source, MixedPictures) else [source]
    chosen = [_is_held_out(part.source if isinstance(part, TitledPictures) else part, share, seed) for part in parts]
    for part, mask in zip(parts, chosen, strict=True):
        if mask.all():
            title = f" of {part.title}" if isinstance(part, TitledPictures) else ""
            raise UserError(f"eval.share is {share}: it holds out all {len(mask)} pictures{title}, lower it")
    everywhere = np.concatenate(chosen)
    if not everywhere.any():
        raise UserError(
            f"eval.share is {share}: it holds out none of {len(everywhere)} pictures, raise it or leave it out"
        )
    rest = [Picked(part, np.flatnonzero(~mask)) for part, mask in zip(parts, chosen, strict=True)]
    held_out = Picked(source, np.flatnonzero(everywhere))
    if isinstance(source, MixedPictures):
        titled = [TitledPictures(Picked(p.source, k.indices), p.title) for p, k in zip(source.parts, rest, strict=True)]
        return MixedPictures(titled, source.weights), held_out
    return rest[0], held_out


def require_same_held_out(state: TrainState, held_out: ImageSource | None) -> None:
    """Raise UserError where others are held out than before, which were trained on; note which in the state."""
    if held_out is None:
        return
    names = (held_out.name(number) for number in range(len(held_out)))
    now = f"{hash_of(names):016x}"
    if state.extra.setdefault("held_out", now) != now:
        raise UserError(
            "other pictures are held out than when the run began, which were trained on: leave data.source and what is "
            "in it as they were, or start another run"
        )


def hash_of(names: Iterable[str]) -> int:
    """A number below 2^64 of some names, in any order."""
    return sum(key_of(name, 0) for name in names) % 2**64


def _is_held_out(source: ImageSource, share: float, seed: int) -> np.ndarray:
    keys = (key_of(source.name(index), seed) for index in range(len(source)))
    return np.fromiter(keys, np.uint64, len(source)) < np.uint64(int(share * 2**64))


def open_sets(config: EvalConfig, held_out: ImageSource | None, seed: int) -> EvalSets:
    """What an evaluation reads, at most `config.pictures` of each kind; as many of each class as there are.

    Raises UserError for labelled pictures that are not there or have fewer than two classes.
    """
    if held_out is not None:
        held_out = Picked(held_out, spread(len(held_out), config.pictures))
    if not config.source:
        return EvalSets(held_out, None, None)
    with named_eval(config):
        train, val = open_labelled(config, seed)
    classes, remedy = len(train.classes), "it must be as many as eval.source has classes"
    require(classes <= config.pictures, "eval.pictures", config.pictures, f"{remedy}, {classes}")
    for half, split in ((train, config.train_split), (val, config.val_split)):
        if len(half.classes) - len(missing_classes(half)) < 2:
            raise UserError(
                f"eval.source {config.source} has one class in its {split}, {half.classes[half.labels[0]]!r}: a probe "
                "needs two or more"
            )
    return EvalSets(held_out, *(_some_of_each_class(half, config.pictures, seed) for half in (train, val)))


def _some_of_each_class(data: Labelled, count: int, seed: int) -> Labelled:
    """At most so many, of every class alike as far as it has them, by the seed."""
    ranked = sorted(
        (rank, index) for members in shuffled_within_classes(data.labels, seed) for rank, index in enumerate(members)
    )
    return data.pick(sorted(index for _, index in ranked[:count]))


def check_sets(sets: EvalSets, config: EvalConfig, data: DataConfig) -> None:
    """Raise UserError where labelled pictures cannot be read as those of training are: other bands, all damaged."""
    for half in filter(None, (sets.train, sets.val)):
        source = half.source
        with named_eval(config):
            look_at_first(source, data.preprocessing, data.max_megapixels, data.max_bad_share)
        reasons = [_why_unreadable(source.open, index) for index in spread(len(source), LOOKED_AT)]
        if all(reasons):
            first = source.name(spread(len(source), LOOKED_AT)[0])
            raise UserError(
                f"eval.source {config.source}: none of {len(reasons)} pictures can be read, {first}: {reasons[0]}"
            )


def _why_unreadable(opened: Callable, index: int) -> str | None:
    try:
        with opened(index):
            return None
    except Exception as error:  # a decoder may raise anything on damaged data
        return reason(error)


@contextmanager
def named_eval(config: EvalConfig) -> Iterator[None]:
    """Let the errors of what reads labelled pictures name the fields of `eval`, where they speak of `data`."""
    names = "|".join(entry.name for entry in fields(config))
    try:
        yield
    except UserError as error:
        line = re.sub(rf"(?<![\w./])data\.({names})\b", r"eval.\1", str(error))
        where = "eval.source" if config.source in line else f"eval.source {config.source}"
        raise UserError(line if "eval." in line else f"{where}: {line}") from error
