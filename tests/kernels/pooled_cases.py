"""Pictures for the tests of the pooled scan: which patches are visible, and the lines that they make."""

from typing import NamedTuple

import numpy as np
import torch

from vim_kernels import Lines


class Picture(NamedTuple):
    """Patches of a grid; `visible` are the indices, row by row, of those that have a token."""

    grid: tuple[int, int]
    visible: list[int]

    def coordinates(self, by_column):
        """(line, place in the line) of every token."""
        rows, columns = (
            zip(*(divmod(patch, self.grid[1]) for patch in self.visible), strict=True) if self.visible else ((), ())
        )
        return (columns, rows) if by_column else (rows, columns)

    def whole(self, by_column):
        """(lines, tokens of a whole line)"""
        return self.grid[::-1] if by_column else self.grid


def draw_picture(rows, columns, visible=None, seed=0):
    """All patches, or so many of them, drawn."""
    everything = range(rows * columns)
    if visible is None:
        return Picture((rows, columns), list(everything))
    return Picture(
        (rows, columns), sorted(np.random.default_rng(seed).choice(everything, visible, replace=False).tolist())
    )


def lines_of(pictures, *, by_column=False, packed=False, share=1.0):
    """`Lines` of pictures, packed or the rows of a batch, from their definition."""
    starts, line_of, weights, order, cu_lines, tokens = [0], [], [], [], [0], 0
    for picture in pictures:
        lines, places = picture.coordinates(by_column)
        count, length = picture.whole(by_column)
        for line in range(count):
            members = sorted((places[t], t) for t in range(len(lines)) if lines[t] == line)
            order += [tokens + t for _, t in members]
            line_of += [cu_lines[-1] + line] * len(members)
            starts.append(len(order))
        weights += [share / length] * count
        cu_lines.append(cu_lines[-1] + count)
        tokens += len(lines)
    whole = [torch.tensor(t, dtype=torch.int32) for t in (starts, line_of, order, cu_lines)]
    return Lines(
        whole[0], whole[1], torch.tensor(weights), whole[2] if by_column else None, whole[3] if packed else None
    )


PACKED = [
    draw_picture(3, 4),
    draw_picture(1, 1),
    draw_picture(5, 2, 4),
    draw_picture(2, 7, 9),
    draw_picture(6, 1),
    draw_picture(4, 4, 1),
]
"""Different sizes, hidden patches, lines of one token, empty lines, one line only."""
MASKED = [draw_picture(5, 6, 9, seed=seed) for seed in range(3)]
"""Of one size, as many visible in each: a batch. Some lines are empty."""
WHOLE = [draw_picture(5, 3)] * 2
CASES = {
    "packed": (PACKED, True),
    "masked": (MASKED, False),
    "whole": (WHOLE, False),
    "one": ([draw_picture(1, 1)], False),
}
"""Name -> pictures, and whether they are packed."""
