"""How a scan is cut into programs: sequences, chunks, blocks of channels, and the tuned sizes that ship.

Nothing is tuned at run time. The sizes were measured: docs/log-kernels.md.
"""

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from vim_kernels.memory import is_tight
from vim_kernels.triton_backend.chunks import chunk_table_kernel
from vim_kernels.triton_backend.launch import cdiv, launch

INTERVAL = 32
"""Chunks are a multiple of so many tokens, and float32 tokens have a state saved every so many for the backward: n / 8
bytes a token, channel and direction. 16-bit tokens have one every 16, in bfloat16: as many bytes, and half as far to
compute again; but not on AMD, where the kernel would hold 282 registers instead of 230."""


class ForwardSizes(NamedTuple):
    """Channels a program, warps a program, tokens prefetched ahead."""

    block: int
    warps: int
    ahead: int


class BackwardSizes(NamedTuple):
    """Channels a program, warps a program, tokens whose states are in registers at a time."""

    block: int
    warps: int
    group: int


class TiledSizes(NamedTuple):
    """Of the Gluon kernels: states and channels a thread, warps a direction, tokens a tile, tokens a step."""

    states_thread: int
    channels_thread: int
    warps: int
    tile: int
    step: int  # forward: tokens unrolled; backward: tokens whose states are in registers at a time


class ConvolutionSizes(NamedTuple):
    """Groups of consecutive rows, rows of a group, channels and warps a program."""

    groups: int
    steps: int
    block: int
    warps: int


class MixerSizes(NamedTuple):
    """Rows and channels of a tile, warps, stages of the loads in a loop."""

    rows: int
    block: int
    warps: int
    stages: int


class PooledSizes(NamedTuple):
    """Lines a program, tokens of each at a time, channels at a time, warps."""

    lines: int
    steps: int
    block: int
    warps: int


TILED_FORWARD = ((7, TiledSizes(16, 1, 2, 8, 8)), (4, TiledSizes(8, 1, 2, 8, 8)), (0, TiledSizes(4, 1, 2, 16, 16)))
"""From how many warps a multiprocessor, if a warp holds all states of 32 channels, which sizes. Fewer states a thread
make more warps, which wait less, of more instructions in all."""
TILED_BACKWARD = TiledSizes(4, 4, 1, INTERVAL, 4)
TILED_STATES = 16
"""The state size that the Gluon kernels are laid out for, Mamba's; another takes the core-Triton kernels."""

FORWARD = {"cuda": ForwardSizes(32, 1, 2), "hip": ForwardSizes(64, 1, 0), "interpreter": ForwardSizes(32, 1, 0)}
STATE = {"cuda": ForwardSizes(32, 1, 2), "hip": ForwardSizes(64, 1, 0), "interpreter": ForwardSizes(32, 1, 0)}
BACKWARD = {"cuda": BackwardSizes(32, 1, 2), "hip": BackwardSizes(64, 1, 2), "interpreter": BackwardSizes(32, 1, 4)}
MIXER_WIDE, MIXER_WIDE_RANK = MixerSizes(128, 64, 8, 3), 64
"""Where the rank is so large, a block of rows reads many weights, and larger ones are faster if they fill the chip."""
FEW_ROWS = MixerSizes(16, 128, 4, 3)
"""Of the projections where larger blocks of rows do not fill the chip, as with the lines of a pooled scan."""
MIXER = {"cuda": MixerSizes(64, 64, 4, 3), "hip": MixerSizes(64, 32, 4, 1), "interpreter": MixerSizes(16, 64, 4, 1)}
PROJECTIONS_BACKWARD = {
    "cuda": MixerSizes(64, 64, 4, 3),
    "hip": MixerSizes(64, 64, 4, 1),
    "interpreter": MixerSizes(16, 64, 4, 1),
}
PROJECTION_SUMS = {
    "cuda": MixerSizes(64, 64, 4, 2),  # a third stage spills on sm_80
    "hip": MixerSizes(32, 64, 4, 1),
    "interpreter": MixerSizes(16, 64, 4, 1),
}
PARTS_AHEAD, PROJECTION_PROGRAMS = 4, 32
"""Parts of the gradients of B and C that are loaded at a time; programs that share the rows where the gradients of
x_proj and dt_proj are summed, for every block of channels and direction: fixed, so that the sum is always the same."""
GRADIENTS = MixerSizes(32, 64, 4, 1)
"""Rows: partial sums loaded at a time."""
CONVOLUTION = ConvolutionSizes(4, 8, 128, 4)
CONVOLUTION_BACKWARD = {
    "cuda": ConvolutionSizes(2, 6, 128, 4),
    "hip": ConvolutionSizes(8, 3, 64, 4),  # more rows a group spill
    "interpreter": ConvolutionSizes(2, 8, 128, 4),
}
POOLED_LINES = {
    "cuda": PooledSizes(1, 4, 256, 2),
    "hip": PooledSizes(1, 4, 128, 1),
    "interpreter": PooledSizes(2, 4, 64, 4),
}
POOLED_OUTPUT = POOLED_LINES | {"cuda": PooledSizes(1, 2, 256, 2)}
POOLED_OUTPUT_BACKWARD = POOLED_OUTPUT
POOLED_NORM = {
    "cuda": PooledSizes(1, 2, 512, 4),
    "hip": PooledSizes(1, 1, 128, 2),
    "interpreter": PooledSizes(2, 4, 64, 4),
}
POOLED_CONVOLUTION_BACKWARD = {
    "cuda": ConvolutionSizes(1, 20, 128, 2),
    "hip": ConvolutionSizes(1, 28, 128, 1),
    "interpreter": ConvolutionSizes(2, 8, 128, 4),
}
"""Rows of a group: those of the loop, see `run_length`."""
POOLED_PROGRAMS = 1024
"""Programs that share the lines where the norm's gradients are summed: fixed, so that the sum is always the same."""
TILE = {"ROWS": 32, "BLOCK": 64}
"""Of the kernels that take every element by itself, and of the convolution of one direction."""
SUMMING_PROGRAMS = 256
"""Programs that share the rows when a sum over all rows is taken: fixed, so that the sum is the same everywhere."""
CARRY_BLOCK, CARRY_CHUNKS = 32, 64
FORWARD_FEW, BACKWARD_FEW, WANTED_WARPS = 1.6, 4, 64
"""Warps a multiprocessor: with fewer of them a scan of whole sequences waits, and is cut to make WANTED_WARPS."""
SLICE_WARPS, SLICE_ROWS = 10, 2**17
"""Warps a multiprocessor and tokens that a slice of a batch must have to be about as fast as a part of the whole: more
warps gain little, and its kernels are long beside their launches."""


class Tokens(NamedTuple):
    """Sequences laid one after the other: a batch of equal ones, or packed ones between the borders cu_seqlens."""

    rows: int
    length: int  # of a sequence; of all where packed
    sequences: int
    cu_seqlens: Tensor | None
    interval: int  # tokens between two saved states

    @property
    def packed(self) -> bool:
        """Whether the sequences have sizes of their own."""
        return self.cu_seqlens is not None

    def slots(self) -> int:
        """Saved states a channel and direction, an upper bound where packed."""
        if self.packed:
            return self.rows // self.interval + self.sequences
        return self.sequences * cdiv(self.length, self.interval)

    def segment(self, like: Tensor) -> Tensor:
        """(rows,) int32, the sequence of every row where packed; otherwise unused."""
        if self.cu_seqlens is None:
            return like
        rows = torch.arange(self.rows, dtype=torch.int32, device=like.device)
        return torch.searchsorted(self.cu_seqlens, rows, right=True, out_int32=True)


class Chunks(NamedTuple):
    """Runs of at most `size` rows of one sequence, each scanned by one program."""

    size: int
    total: int  # an upper bound where packed: the rest have no rows
    per_sequence: int
    table: Tensor | None  # (total, 3) first row, rows, first slot
    sequence_table: Tensor | None  # (sequences, 2) first chunk, chunks

    @property
    def one_each(self) -> bool:
        """A sequence is one chunk."""
        return self.per_sequence == 1


def tokens_of(x: Tensor, cu_seqlens: Tensor | None) -> Tokens:
    """X (b, l, d); a packed x has b = 1."""
    b, l, _ = x.shape
    interval = INTERVAL if states_dtype(x) == torch.float32 else INTERVAL // 2
    return Tokens(b * l, l, b if cu_seqlens is None else cu_seqlens.shape[0] - 1, cu_seqlens, interval)


def states_dtype(x: Tensor) -> torch.dtype:
    """Of the states saved for the backward of tokens like x: bfloat16, which has float32's range, for 16 bits."""
    return torch.bfloat16 if x.itemsize == 2 and target(x.device) != "hip" else torch.float32


def cut(tokens: Tokens, size: int | None, device: torch.device) -> Chunks:
    """Chunks of `size` rows, or each sequence whole where None."""
    size = tokens.length if size is None else min(size, tokens.length)
    whole = size == tokens.length
    if tokens.cu_seqlens is None:
        per_sequence = cdiv(tokens.length, size)
        return Chunks(size, tokens.sequences * per_sequence, per_sequence, None, None)
    count = tokens.sequences if whole else tokens.rows // size + tokens.sequences
    table = torch.empty(count, 3, dtype=torch.int32, device=device)
    sequence_table = torch.empty(tokens.sequences, 2, dtype=torch.int32, device=device)
    launch(
        chunk_table_kernel,
        (cdiv(count, 128),),
        tokens.cu_seqlens,
        table,
        sequence_table,
        tokens.sequences,
        count,
        size,
        INTERVAL=tokens.interval,
        BLOCK=128,
    )
    return Chunks(size, count, 1 if whole else 0, table, sequence_table)


def chunk_size(tokens: Tokens, warps: int, processors: int, few: float, most: int | None = None) -> int | None:
    """Rows a chunk, a multiple of INTERVAL, or None where `warps` warps a sequence are enough for the chip as they are.

    Cutting costs a second pass over the exponentials: worth it under `few` warps a multiprocessor. `most` chunks a
    sequence are as many as one step of the carry kernel takes.
    """
    programs = warps * tokens.sequences
    if programs >= few * processors or tokens.length <= 2 * INTERVAL:
        return None
    length = tokens.rows // tokens.sequences
    whole = cdiv(length, INTERVAL)
    intervals = programs * whole // (WANTED_WARPS * processors)
    return max(1, intervals, cdiv(whole, most) if most else 0) * INTERVAL


def slices(tokens: Tokens, channels: int, processors: int) -> int:
    """Parts of a batch that a forward pass which saves nothing takes in turn, to share memory; 1 where packed."""
    if tokens.packed or not processors:
        return 1
    warps = 2 * cdiv(channels, 32) * tokens.sequences
    warps_per_slice = SLICE_WARPS // 2 if is_tight() else SLICE_WARPS
    return max(1, min(warps // (warps_per_slice * processors), tokens.rows // SLICE_ROWS, tokens.sequences))


def tiled_forward(warps: int, processors: int) -> TiledSizes:
    """Sizes for `warps` warps, if a warp holds all states of 32 channels."""
    return next(sizes for fewest, sizes in TILED_FORWARD if warps >= fewest * processors)


def mixer(device: torch.device, rank: int, rows: int) -> MixerSizes:
    """Sizes for x_proj and dt_proj of a padded rank, both directions."""
    if _few(device, MIXER, rows):
        return FEW_ROWS
    wide = rank >= MIXER_WIDE_RANK and 2 * cdiv(rows, MIXER_WIDE.rows) >= 1.4 * processors(device)
    return MIXER_WIDE if wide and target(device) == "cuda" else MIXER[target(device)]


def projections_backward(device: torch.device, rows: int) -> MixerSizes:
    """Sizes for the path back through both projections, both directions."""
    return FEW_ROWS if _few(device, PROJECTIONS_BACKWARD, rows) else PROJECTIONS_BACKWARD[target(device)]


def _few(device: torch.device, sizes: dict[str, MixerSizes], rows: int) -> bool:
    return target(device) == "cuda" and 2 * cdiv(rows, sizes["cuda"].rows) < processors(device)


def run_length(sizes: ConvolutionSizes, width: int) -> int:
    """Positions of a run of the pooled convolution's backward: whole windows of `width`, and the rows before them."""
    return max(sizes.steps // width, 1) * width + width - 1


def tiled(device: torch.device, states: int) -> bool:
    """Whether the Gluon kernels run: they are written for warps of 32, and the interpreter does not know Gluon."""
    return target(device) == "cuda" and states == TILED_STATES


def target(device: torch.device) -> str:
    """Which column of the tables of sizes a device reads."""
    if device.type != "cuda":
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def dot_dtype(x: Tensor) -> tl.dtype:
    """What the small products are taken in; the interpreter's bfloat16 product is wrong."""
    if x.device.type != "cuda" or x.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 0 under the interpreter, where chunks only cost."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
