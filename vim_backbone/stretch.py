"""One sequence over several processes: each holds a stretch of its tokens; both directions pass from one to the next.

The recurrence is linear in the state: what leaves a stretch is what it makes of nothing, plus what enters times the
decay over all of it. Where the backend takes a part of a sequence (`vim_kernels.takes_parts`), the fused scan of both
directions asks amid its work for the states that enter: each process gathers what would leave every stretch if nothing
entered and how far that decays, and works out its own. The scan of a long sequence makes these on its way, so that the
processes together compute what one would. Adjoint states pass back in the same way.

Other backends run each direction as ops of its own. Two processes swap states: the first scans forward while the second
scans backward, each from the end of the sequence that it holds; then each scans the other direction. More processes
scan first from zero in both directions, and again from the states that enter.

The loss of all is the sum of the losses of the processes: gradients of tokens are those of that sum, and the gradient
of a parameter is the sum of what the processes have. All of them must go backward, since gradients of states pass from
one to the next as well.
Shape letters: b batch, l tokens of this stretch, d inner channels, n states, w taps, k = w - 1 tokens of a halo, q = 2
directions, s processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vim_backbone.errors import UserError
from vim_backbone.tokens import TokenLayout
from vim_kernels import (
    Part,
    ScanWeights,
    bidirectional_scan_part,
    causal_conv1d,
    selective_scan,
    takes_parts,
)
from vim_kernels.dispatch.contract import Recompute

AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn


@dataclass(frozen=True)
class Stretch:
    """What this process holds of a sequence: `lengths[rank]` patch tokens, behind those of the processes before it."""

    lengths: tuple[int, ...]
    rank: int
    group: Any = None
    """The processes, of `torch.distributed`; None for all."""

    @classmethod
    def of(cls, length: int, device: torch.device, group: Any = None) -> "Stretch":
        """Where this process has `length` patches of the sequence; every process of the group must call it."""
        here = torch.tensor([length], device=device)
        lengths = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
        dist.all_gather(lengths, here, group)
        return cls(tuple(int(each) for each in lengths), dist.get_rank(group), group)

    @property
    def size(self) -> int:
        """Processes."""
        return len(self.lengths)

    @cached_property
    def patches(self) -> slice:
        """Those of the whole sequence that are here."""
        start = sum(self.lengths[: self.rank])
        return slice(start, start + self.lengths[self.rank])

    def check(self, taps: int) -> None:
        """Raise UserError where a stretch is shorter than what a convolution sees of it."""
        if min(self.lengths) < max(1, taps - 1):
            raise UserError(
                f"the processes hold {list(self.lengths)} tokens of a sequence: each needs {max(1, taps - 1)} at least"
            )

    def gather(self, tensor: Tensor) -> Tensor:
        """Of one shape in every process -> (s, ...), in float32 at least; with a gradient."""
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        return _Gather.apply(wide, self)  # pyright: ignore[reportReturnType]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, of one shape in each."""
        return self.gather(tensor).sum(0).to(tensor.dtype)

    def halo(self, x: Tensor, k: int) -> Tensor:
        """(b, 2 k, d): the k tokens before this stretch of x (b, l, d), and those behind it; 0 where there are none."""
        if not k:
            return x[:, :0]
        edges: Tensor = _Gather.apply(torch.cat([x[:, :k], x[:, -k:]], dim=1), self)  # pyright: ignore[reportAssignmentType]
        nothing = x.new_zeros(x.shape[0], k, x.shape[2])
        before = edges[self.rank - 1, :, k:] if self.rank else nothing
        behind = edges[self.rank + 1, :, :k] if self.rank < self.size - 1 else nothing
        return torch.cat([before, behind], dim=1)

    def entering(self, state: Tensor, steps: Tensor, rates: Tensor, reverse: bool) -> Tensor:
        """See `vim_kernels.Part`; without a gradient."""
        gathered = _gathered(torch.cat([state, steps[:, :, None]], dim=2), self)  # (s, q, b, n + 1, d)
        entering = torch.zeros_like(state)
        befores = [range(self.rank), range(self.size - 1, self.rank, -1)]
        for direction, before in enumerate(befores[::-1] if reverse else befores):
            for leaving in (gathered[rank, direction] for rank in before):
                decay = torch.exp2(leaving[:, -1:] * rates[direction])
                torch.addcmul(leaving[:, :-1], decay, entering[direction], out=entering[direction])
        return entering


class _Gather(torch.autograd.Function):
    """Every process gets what each has; the gradient of what one has is the sum of what all have for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, stretch: Stretch) -> Tensor:
        ctx.stretch = stretch
        return _gathered(tensor, stretch)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.stretch.group)
        return gradient[ctx.stretch.rank], None


def _gathered(tensor: Tensor, stretch: Stretch) -> Tensor:
    """(s, ...)"""
    gathered = tensor.new_empty(stretch.size, *tensor.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), tensor.contiguous(), stretch.group)
    return gathered


class _Together(torch.autograd.Function):
    """Both as they are; where the gradient of one comes back, so does that of the other, if only as zeros.

    A process whose loss has nothing of the special tokens would else leave the others alone in their gradient's sum.
    """

    @staticmethod
    def forward(ctx: Any, special: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        del ctx
        return special.view_as(special), patches.view_as(patches)

    @staticmethod
    def backward(ctx: Any, special: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return special, patches


class StretchLayout:
    """What `TokenLayout` is for a whole sequence, for a stretch: a special token is with the patch that it precedes."""

    def __init__(self, layout: TokenLayout, stretch: Stretch) -> None:
        self.stretch, self.num_special = stretch, layout.num_special
        slots = layout.slots(sum(stretch.lengths))
        here, last = stretch.patches, stretch.rank == stretch.size - 1
        self._places: list[tuple[int, int]] = []
        """Place among the patches here and special token, in the order of the scan."""
        for ahead, token in enumerate(sorted(range(len(slots)), key=slots.__getitem__)):
            before = slots[token] - ahead
            if here.start <= before < here.stop or (last and before == here.stop):
                self._places.append((before - here.start, token))

    def join(self, special: Tensor, patches: Tensor) -> Tensor:
        """(b, special, d_model), all of them, and (b, l, d_model) -> (b, l + those here, d_model) in scan order."""
        # none of them where none is here: DDP waits for the gradient of every parameter
        pieces, start = [special[:, :0]], 0
        for place, token in self._places:
            pieces += [patches[:, start:place], special[:, token : token + 1]]
            start = place
        return torch.cat([*pieces, patches[:, start:]], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse; all processes get all special tokens (b, special, d_model)."""
        places = [place + ahead for ahead, (place, _) in enumerate(self._places)]
        patches = [
            tokens[:, a:b] for a, b in zip([0, *(p + 1 for p in places)], [*places, tokens.shape[1]], strict=True)
        ]
        if not self.num_special:
            return tokens[:, :0], patches[0]
        local = {token: tokens[:, place : place + 1] for place, (_, token) in zip(places, self._places, strict=True)}
        nothing = tokens[:, :1] * 0.0
        special = torch.cat([local.get(token, nothing) for token in range(self.num_special)], dim=1)
        return _Together.apply(self.stretch.total(special), torch.cat(patches, dim=1))  # pyright: ignore[reportReturnType]


def scan_stretch(
    xz: Tensor,
    forward: ScanWeights,
    backward: ScanWeights,
    *,
    stretch: Stretch,
    gated: bool = True,
    overwrite: bool = False,
    recompute: Recompute = "inputs",
) -> Tensor:
    """`vim_kernels.bidirectional_scan` of the whole sequence -> (b, l, d), what is here of it.

    Every process of the stretch must call it. xz (b, l, 2 d), and the rest, as there.
    """
    x, z = xz.chunk(2, dim=-1) if gated else (xz, None)
    if takes_parts(xz, forward, backward):
        part = Part(stretch.halo(x, forward.conv_weight.shape[1] - 1), stretch.entering)
        options: dict[str, Any] = {"gated": gated, "overwrite": overwrite, "recompute": recompute}
        return bidirectional_scan_part(xz, forward, backward, part, **options)
    if not torch.is_grad_enabled():
        return _one_by_one(x, z, forward, backward, stretch)
    # gated here, for the gate's backward would scan once more
    if recompute in ("inputs", "states"):
        y: Tensor = checkpoint(_one_by_one, x, None, forward, backward, stretch, **AGAIN)  # pyright: ignore[reportAssignmentType]
    else:
        y = _one_by_one(x, None, forward, backward, stretch)
    return y if z is None else y * F.silu(z)


def _one_by_one(x: Tensor, z: Tensor | None, forward: ScanWeights, backward: ScanWeights, stretch: Stretch) -> Tensor:
    """Each direction as ops of its own; x, z and the result (b, l, d)."""
    before, behind = stretch.halo(x, forward.conv_weight.shape[1] - 1).chunk(2, dim=1)

    def way(reverse: bool) -> OneWay:
        weights = backward if reverse else forward
        return OneWay(_convolved(x, behind if reverse else before, weights, reverse), z, weights, reverse)

    first, second = _swapped(way, stretch) if stretch.size == 2 else _carried(way, stretch)
    return torch.lerp(first, second, 0.5)


class OneWay:
    """One direction of a mixer's scan: its convolved tokens u (b, l, d), and what the scan takes beside them."""

    def __init__(self, u: Tensor, z: Tensor | None, weights: ScanWeights, reverse: bool) -> None:
        rank, n = weights.dt_proj.shape[1], weights.A_log.shape[1]
        self.u, self.z, self.weights, self.reverse = u, z, weights, reverse
        low_rank, self.B, self.C = F.linear(u, weights.x_proj).split([rank, n, n], dim=-1)
        self.dt = F.linear(low_rank, weights.dt_proj)
        self.A = -(weights.A_log if weights.A_log.dtype == torch.float64 else weights.A_log.float()).exp()

    def scan(self, entering: Tensor | None) -> tuple[Tensor, Tensor]:
        """From a state (b, d, n): y (b, l, d), and the state that leaves."""
        return selective_scan(
            self.u, self.dt, self.A, self.B, self.C, self.weights.D, self.z, self.weights.dt_bias, dt_softplus=True,
            reverse=self.reverse, initial_state=entering, return_final_state=True,
        )  # fmt: skip

    def steps(self) -> Tensor:
        """(b, d): the sum of dt over the stretch."""
        bias = self.weights.dt_bias.to(self.A.dtype)
        return F.softplus(self.dt.to(self.A.dtype) + bias).sum(1)


def _swapped(way: Callable[[bool], OneWay], stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Two processes: each begins with the direction that begins in its stretch, and takes the other one's state."""
    reverse = stretch.rank == 1
    first, leaving = way(reverse).scan(None)
    entering = stretch.gather(leaving)[1 - stretch.rank]
    return first, way(not reverse).scan(entering)[0]


def _carried(way: Callable[[bool], OneWay], stretch: Stretch) -> tuple[Tensor, Tensor]:
    """Any number of processes: what leaves every stretch if nothing enters, then the scan from what does enter."""
    ways = way(False), way(True)
    summaries = torch.stack([torch.cat([w.scan(None)[1].to(w.A.dtype), w.steps()[..., None]], dim=-1) for w in ways])
    gathered = stretch.gather(summaries)  # (s, q, b, d, n + 1)
    befores = range(stretch.rank), range(stretch.size - 1, stretch.rank, -1)
    results = []
    for each, before, of_all in zip(ways, befores, gathered.unbind(1), strict=True):
        entering = torch.zeros_like(of_all[0, ..., :-1])
        for rank in before:
            state, steps = of_all[rank].split([each.A.shape[1], 1], dim=-1)
            entering = torch.exp(steps * each.A) * entering + state
        results.append(each.scan(entering)[0])
    return results[0], results[1]


def _convolved(x: Tensor, halo: Tensor, weights: ScanWeights, reverse: bool) -> Tensor:
    """Convolution and SiLU of one direction, whose first tokens in its order see the halo (b, k, d)."""
    taps, bias = weights.conv_weight, weights.conv_bias
    u = causal_conv1d(x, taps, bias, reverse=reverse)
    k = halo.shape[1]
    if not k:
        return u
    near, ends = ([x[:, -k:], halo], slice(-k, None)) if reverse else ([halo, x[:, :k]], slice(None, k))
    at_end = causal_conv1d(torch.cat(near, dim=1), taps, bias, reverse=reverse)
    at_end = at_end[:, :k] if reverse else at_end[:, k:]
    if not torch.is_grad_enabled():
        u[:, ends] = at_end
        return u
    return torch.cat([u[:, :-k], at_end] if reverse else [at_end, u[:, k:]], dim=1)
