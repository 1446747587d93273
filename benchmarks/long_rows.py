"""Values of one very long row: a reference in float64 that takes any length, beside which a backend is checked.

Shape letters as in `vim_kernels`: l tokens, d channels, n states; k channels that are looked at, t tokens of a block.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_kernels import ScanWeights, bidirectional_scan

BLOCK = {"cpu": 32, "cuda": 256}
"""Tokens of a block, within which the recurrence is a triangular matrix; the state is carried from block to block."""


def random_weights(d: int, n: int, rank: int, generator: torch.Generator, longest: float = 1e5) -> ScanWeights:
    """Of one direction, float32: dt around 0.01, and states whose memory goes from 100 tokens to about `longest`."""

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    rates = torch.logspace(0, -torch.log10(torch.tensor(longest / 100)).item(), n)
    return ScanWeights(
        conv_weight=normal(d, 4, scale=0.5), conv_bias=normal(d, scale=0.1),
        x_proj=normal(rank + 2 * n, d, scale=d**-0.5), dt_proj=normal(d, rank, scale=0.2 * rank**-0.5),
        dt_bias=torch.full((d,), 0.01).expm1().log(), A_log=rates.log().repeat(d, 1), D=normal(d, scale=0.5),
    )  # fmt: skip


def long_mixer(xz: Tensor, forward: ScanWeights, backward: ScanWeights, channels: Tensor) -> Tensor:
    """`bidirectional_scan` of xz (1, l, 2 d) in float64, of chosen channels (k,) -> (l, k)."""
    total = torch.zeros(xz.shape[1], len(channels), dtype=torch.float64, device=xz.device)
    for weights, reverse in ((forward, False), (backward, True)):
        double = ScanWeights._make(None if w is None else w.double() for w in weights)
        for start, y in _blocks(xz, double, channels, reverse):
            total[start : start + len(y)] += y
    z = xz[0, :, xz.shape[2] // 2 + channels].double()
    return total * F.silu(z) / 2


def _blocks(xz: Tensor, weights: ScanWeights, channels: Tensor, reverse: bool) -> Iterator[tuple[int, Tensor]]:
    """First token and (t, k) of every block, in the order of the scan."""
    l, d, width = xz.shape[1], xz.shape[2] // 2, weights.conv_weight.shape[1]
    n, rank = weights.A_log.shape[1], weights.dt_proj.shape[1]
    A = -weights.A_log[channels].exp()
    taps = (weights.conv_weight.flip(1) if reverse else weights.conv_weight)[:, None]
    h = A.new_zeros(A.shape)
    block = BLOCK[xz.device.type]
    earlier = torch.ones(block, block, dtype=torch.bool, device=xz.device).tril()
    starts = range(0, l, block)
    for start in reversed(starts) if reverse else starts:
        stop = min(start + block, l)
        first, last = (start, min(stop + width - 1, l)) if reverse else (max(0, start - width + 1), stop)
        missing = width - 1 - (last - first - (stop - start))  # before the first token of all, or behind the last
        x = F.pad(xz[0, first:last, :d].double().t(), (0, missing) if reverse else (missing, 0))
        u = F.silu(F.conv1d(x[None], taps, weights.conv_bias, groups=d))[0].t()
        low, B, C = F.linear(u, weights.x_proj).split([rank, n, n], dim=1)
        dt = F.softplus(F.linear(low, weights.dt_proj[channels], weights.dt_bias[channels]))
        if reverse:
            u, dt, B, C = (each.flip(0) for each in (u, dt, B, C))
        since = dt.cumsum(0)  # (t, k)
        decay = torch.exp((since[:, None] - since[None])[..., None] * A)  # (to, from, k, n)
        decay = decay.masked_fill(~earlier[: len(u), : len(u), None, None], 0.0)
        chosen = u[:, channels]
        states = torch.einsum("tskn,sk,sn->tkn", decay, dt * chosen, B) + torch.exp(since[..., None] * A) * h
        h = states[-1]
        y = torch.einsum("tkn,tn->tk", states, C) + weights.D[channels] * chosen
        yield start, y.flip(0) if reverse else y


def packed_row_errors(
    long: int, shorts: tuple[int, int], d: int, dtype: torch.dtype, device: str, n: int = 16, rank: int = 2
) -> dict[str, float]:
    """One long sequence between two short ones in a row: largest error of stretches, over the largest value of all.

    Every token of chosen channels, the first and the last among them, is beside the float64 reference.
    """
    generator = torch.Generator().manual_seed(0)
    forward, backward = (random_weights(d, n, rank, generator) for _ in range(2))
    lengths = (shorts[0], long, shorts[1])
    borders = torch.tensor([0, *lengths]).cumsum(0)
    xz = torch.empty(1, sum(lengths), 2 * d, dtype=dtype, device=device)
    xz.normal_(generator=torch.Generator(device).manual_seed(1))
    forward, backward = (
        ScanWeights._make(None if w is None else w.to(device) for w in each) for each in (forward, backward)
    )
    cu_seqlens = borders.to(device, torch.int32)
    channels = torch.tensor(sorted({0, d // 3, d // 2, d - 1}), device=device)
    with torch.no_grad():
        got = bidirectional_scan(xz, forward, backward, cu_seqlens=cu_seqlens)[0]
        alone = bidirectional_scan(xz[:, shorts[0] : shorts[0] + long], forward, backward)[0]
    errors: dict[str, float] = {}
    for name, start, stop in zip(
        ("short one before", "long one", "short one behind"), borders, borders[1:], strict=False
    ):
        expected = long_mixer(xz[:, start:stop], forward, backward, channels)
        here = got[start:stop, channels].double()
        scale = expected.abs().max()
        wrong = (here - expected).abs().amax(1) / scale
        if name == "long one":
            end = min(4096, len(wrong) // 4)
            middle = slice(len(wrong) // 2 - end // 2, len(wrong) // 2 + end // 2)
            parts = {
                "first tokens": wrong[:end],
                "in the middle": wrong[middle],
                "last tokens": wrong[-end:],
                "all tokens": wrong,
            }
            errors |= {f"{name}, {part}": values.max().item() for part, values in parts.items()}
            by_itself = (alone[:, channels].double() - expected).abs().max() / scale
            errors["long one alone, all tokens"] = by_itself.item()
        else:
            errors[name] = wrong.max().item()
    return errors
