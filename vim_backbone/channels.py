"""Pictures that have only some of a model's channels: which these are, by how many a picture has."""

from collections.abc import Sequence
from typing import Literal

from vim_backbone.errors import UserError

Channels = Literal["mixed", "tokens"]
"""mixed: a patch of all channels is one token (Vim). tokens: of each channel one, as ChannelViT (arXiv 2309.16108)."""
Sets = tuple[tuple[int, ...], ...]
"""Numbers of channels or bands, counted from 0, in the order in which a picture has them; a line for each number."""


MOST_NAMED = 20
"""Numbers that a line names one by one."""


def check_sets(sets: Sequence[Sequence[int]], allowed: Sequence[int] | range, name: str) -> None:
    """Raise UserError where a set is empty, names what is not known or the same twice, or two are equally long."""
    for each in sets:
        strange = [number for number in each if type(number) is not int or number not in allowed]
        if not each or strange or len(set(each)) < len(each):
            some = list(allowed) if len(allowed) <= MOST_NAMED else f"{allowed[0]} to {allowed[-1]}"
            raise UserError(f"{name} has {list(each)}: give different numbers of {some}")
    if len({len(each) for each in sets}) < len(sets):
        raise UserError(
            f"{name} is {[list(each) for each in sets]}: two sets have the same length, and pictures are told apart by "
            "how many bands they have"
        )


def channels_of(number: int, in_chans: int, sets: Sets | None) -> tuple[int, ...]:
    """Which channels a picture with so many has. Raises UserError for a number that no set has."""
    for each in sets or ():
        if len(each) == number:
            return each
    if number != in_chans:
        numbers = sorted({in_chans, *(len(each) for each in sets or ())})
        raise UserError(f"pictures have {number} channels, the backbone wants {' or '.join(map(str, numbers))}")
    return tuple(range(in_chans))
