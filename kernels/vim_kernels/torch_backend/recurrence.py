"""The recurrence of the scan in plain PyTorch, tile by tile: states forward, gradients backward.

The exponentials of a tile of 64 tokens are one call each, the recurrence one in-place addcmul a token; the backward
recomputes the states of a tile from the state saved at its start. Shape letters as in `vim_kernels.reference`; in a
tile, states are (tokens, b, n, d).
"""

import itertools

import torch
from torch import Tensor

TILE = 64
"""Tokens whose exponentials are computed in one call."""


def pieces(x: Tensor, cu_seqlens: Tensor | None) -> list[slice]:
    """Token ranges that run through the recurrence at once: the whole batch, or each packed image."""
    if cu_seqlens is None:
        return [slice(0, x.shape[1])]
    borders = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(borders)]


def empty_tile_states(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(tiles of all sequences at most, n, d)"""
    images = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = (x.shape[1] + TILE - 1) // TILE if cu_seqlens is None else x.shape[1] // TILE + images
    return x.new_empty((x.shape[0] * tiles, A.shape[1], A.shape[0]), dtype=torch.float32)


def scan_tiles(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reverse: bool,
    cu_seqlens: Tensor | None,
    initial: Tensor | None,
    tile_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Y (b, l, d) without the skip, final states (s, d, n); fills tile_states if given."""
    y, finals, used = torch.empty_like(u, memory_format=torch.contiguous_format), [], 0
    A_nd = A.t().contiguous()
    for index, piece in enumerate(pieces(u, cu_seqlens)):
        steps, drives, B_lbn, C_lbn = _in_scan_order(reverse, piece, step, step * u, B, C)
        rows = steps.shape[1]
        h = u.new_zeros(rows, *A_nd.shape)
        if initial is not None:
            h = initial.float().transpose(1, 2)[index : index + 1] if cu_seqlens is not None else initial.mT.float()
        outputs = []
        for start in range(0, len(steps), TILE):
            tile = slice(start, start + TILE)
            if tile_states is not None:
                tile_states[used : used + rows] = h
                used += rows
            _, states = _tile_states(steps[tile], drives[tile], A_nd, B_lbn[tile], h)
            outputs.append((C_lbn[tile].unsqueeze(2) @ states).squeeze(2))
            h = states[-1].clone()
        if outputs:
            out = torch.cat(outputs).transpose(0, 1)
            y[:, piece] = out.flip(1) if reverse else out
        finals.append(h.mT)
    return y, torch.cat(finals).contiguous()


def _in_scan_order(reverse: bool, piece: slice, *tensors: Tensor) -> list[Tensor]:
    """(b, l, ...) -> the piece as (tokens, b, ...) in the order of the scan."""
    cut = [t[:, piece].transpose(0, 1) for t in tensors]
    return [t.flip(0) if reverse else t for t in cut]


def _tile_states(steps: Tensor, drives: Tensor, A_nd: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states (tokens, b, n, d) of a tile that starts from state h."""
    decays = (steps.unsqueeze(2) * A_nd).exp_()
    states = drives.unsqueeze(2) * B.unsqueeze(3)
    for decay, state in zip(decays.unbind(0), states.unbind(0), strict=True):
        h = torch.addcmul(state, decay, h, out=state)
    return decays, states


def scan_gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reverse: bool,
    cu_seqlens: Tensor | None,
    tile_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y again (no skip), and the gradients of u, step, A, B, C and of the initial states."""
    A_nd = A.t().contiguous()
    y, du, dstep, dB, dC = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (u, u, u, B, C))
    dA_nd, dinitials, used = torch.zeros_like(A_nd), [], 0
    for index, piece in enumerate(pieces(u, cu_seqlens)):
        steps, us, Bs, Cs, dys = _in_scan_order(reverse, piece, step, u, B, C, dy)
        rows, tokens = u.shape[0], len(steps)
        if dfinal is None:
            carried = u.new_zeros(rows, *A_nd.shape)
        else:
            carried = (dfinal if cu_seqlens is None else dfinal[index : index + 1]).mT
        starts = range(0, tokens, TILE)
        parts: list[list[Tensor]] = []
        for number in reversed(range(len(starts))):
            tile = slice(starts[number], starts[number] + TILE)
            first = tile_states[used + rows * number : used + rows * (number + 1)]
            *part, tile_dA, carried = _tile_gradients(
                steps[tile], us[tile], Bs[tile], Cs[tile], dys[tile], A_nd, first, carried
            )
            parts.append(part)
            dA_nd += tile_dA
        used += rows * len(starts)
        dinitials.append(carried.mT)
        for target, chunks in zip((y, du, dstep, dB, dC), zip(*parts[::-1], strict=True), strict=False):
            joined = torch.cat(chunks).transpose(0, 1)
            target[:, piece] = joined.flip(1) if reverse else joined
    return y, du, dstep, dA_nd.t(), dB, dC, torch.cat(dinitials)


def _tile_gradients(
    step: Tensor, u: Tensor, B: Tensor, C: Tensor, dy: Tensor, A_nd: Tensor, first: Tensor, carried: Tensor
) -> tuple[Tensor, ...]:
    """y, du, dstep, dB, dC, dA of a tile in scan order, and what the adjoint carries to the tile before."""
    drives = step * u
    decays, states = _tile_states(step, drives, A_nd, B, first)
    y = (C.unsqueeze(2) @ states).squeeze(2)
    dC = (states @ dy.unsqueeze(3)).squeeze(3)
    adjoints = C.unsqueeze(3) * dy.unsqueeze(2)
    adjoints[-1] += carried
    for k in range(len(adjoints) - 2, -1, -1):
        adjoints[k].addcmul_(decays[k + 1], adjoints[k + 1])
    dB = (adjoints @ drives.unsqueeze(3)).squeeze(3)
    ddrive = (B.unsqueeze(2) @ adjoints).squeeze(2)
    decayed = adjoints.mul_(decays)
    carried = decayed[0].clone()
    dexponent = decayed * torch.cat([first.unsqueeze(0), states[:-1]])
    dA = torch.einsum("tbnd,tbd->nd", dexponent, step)
    dstep = (dexponent * A_nd).sum(2) + ddrive * u
    return y, ddrive * step, dstep, dB, dC, dA, carried
