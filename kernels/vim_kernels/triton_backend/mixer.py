"""The bidirectional scan of the Triton backend: all of a Vim mixer between in_proj and out_proj."""

from typing import NamedTuple

import torch
from torch import Tensor

from vim_kernels.dispatch.contract import BidirectionalScan, Part, ScanWeights
from vim_kernels.triton_backend import plan
from vim_kernels.triton_backend.conv import conv_backward
from vim_kernels.triton_backend.conv_forward import mixer_conv_forward_kernel
from vim_kernels.triton_backend.ends import add_ends, ends_of, take_ends, write_ends
from vim_kernels.triton_backend.launch import cdiv, launch, power_of_two
from vim_kernels.triton_backend.mixer_backward import (
    mixer_gradients_kernel,
    projection_sums_kernel,
    projections_backward_kernel,
)
from vim_kernels.triton_backend.mixer_forward import projections_forward_kernel, weight_layout_kernel
from vim_kernels.triton_backend.plan import Tokens, tokens_of
from vim_kernels.triton_backend.recurrence import Gate, ScanGradients, ScanInputs, scan_backward, scan_forward
from vim_kernels.triton_backend.tensors import flat

WEIGHTS_BLOCK = 64


class MixerWeights(NamedTuple):
    """The weights of both directions as the kernels read them: `mixer_forward.weight_layout_kernel`."""

    rates: Tensor  # (2, n', d) float32
    taps: Tensor  # (2, w + 1, d) float32
    projections: Tensor  # (2, 2, columns, d)
    dt_biases: tuple[Tensor, Tensor]
    skips: tuple[Tensor, Tensor]
    rank: int  # padded

    @property
    def padded(self) -> tuple[int, int]:
        """States and rank."""
        return self.rates.shape[1], self.rank


class MixerInputs(NamedTuple):
    """What is made of x for the scan of both directions, and the low rank of dt where the backward needs it."""

    u: Tensor  # (2, rows, d)
    dt: Tensor  # (2, rows, d)
    bc: Tensor  # (2, rows, 2 n') float32
    low: Tensor | None  # (2, rows, r')

    @classmethod
    def empty(cls, x: Tensor, states: int, rank: int, *, low: bool) -> "MixerInputs":
        """To be filled, for x (b, l, d) and padded sizes."""
        return cls.of(x.new_empty(2, x.shape[0] * x.shape[1], x.shape[2]), states, rank, low=low)

    @classmethod
    def of(cls, u: Tensor, states: int, rank: int, *, low: bool) -> "MixerInputs":
        """With u (2, rows, d) there and the rest to be filled, for padded sizes."""
        _, rows, d = u.shape
        dt = u.new_empty(2, rows, d, dtype=torch.float32 if u.dtype == torch.float32 else torch.float16)
        bc = u.new_empty(2, rows, 2 * states, dtype=torch.float32)
        return cls(u, dt, bc, u.new_empty(2, rows, rank) if low else None)

    def scan(self, weights: MixerWeights, gaps: Tensor | None = None) -> ScanInputs:
        """What the scan reads; `gaps` (2, rows), which dt has in it already."""
        return ScanInputs(self.u, self.dt, self.bc, weights.rates, weights.skips, False, gaps)


def bidirectional_scan_saved(arguments: BidirectionalScan) -> list[Tensor]:
    """[states (2, slots, n, d), the sum before the gate (b, l, d) if gated, `MixerInputs` if keep_inputs].

    With n = 16 and 16-bit tokens 6 bytes a token and channel: 4 for the states, 2 for the sum; 8 more for the inputs.
    """
    x, z = arguments.halves()
    d, n = arguments.forward.A_log.shape
    tokens = tokens_of(x, arguments.cu_seqlens)
    saved = [x.new_empty(2, tokens.slots(), padded(n), d, dtype=plan.states_dtype(x))]
    if z is not None:
        saved.append(x.new_empty(x.shape))
    if arguments.keep_inputs:
        inputs = MixerInputs.empty(x, padded(n), padded(arguments.forward.dt_proj.shape[1]), low=True)
        saved += [t for t in inputs if t is not None]
    return saved


def bidirectional_scan_forward(
    arguments: BidirectionalScan, save: bool, overwrite: bool = False, part: Part | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Output (b, l, d) in the dtype of x, in its memory if overwrite, and what was saved.

    Without `save` a large batch goes slice by slice: the slices share the memory of what the scan reads. A part goes
    whole, for others wait for what leaves it.
    """
    _, forward, backward, cu_seqlens, gaps, *_ = arguments
    x, z = arguments.halves()
    out = x if overwrite else x.new_empty(x.shape)
    saved = bidirectional_scan_saved(arguments) if save else []
    keeps_inputs = save and arguments.keep_inputs
    if x.numel() == 0:
        return out, saved
    laid_out = mixer_weights(x, forward, backward)
    slices = 1 if save or part else plan.slices(tokens_of(x, cu_seqlens), x.shape[2], plan.processors(x.device))
    zs = [None] * slices if z is None else z.tensor_split(slices)
    all_gaps = [None] * slices if gaps is None else gaps.tensor_split(slices, dim=1)
    parts = zip(x.tensor_split(slices), zs, out.tensor_split(slices), all_gaps, strict=True)
    for x_part, z_part, out_part, gaps_part in parts:
        tokens = tokens_of(x_part, cu_seqlens)
        inputs = MixerInputs(*saved[-4:]) if keeps_inputs else MixerInputs.empty(x_part, *laid_out.padded, low=False)
        mixer_inputs(x_part, laid_out, tokens, inputs, gaps_part)
        if part is not None:
            inputs_of_ends(x_part, laid_out, inputs, part.halo)
        scan_forward(
            inputs.scan(laid_out),
            None if z_part is None else flat(z_part),
            flat(out_part),
            tokens,
            scale=0.5,
            states=saved[0] if save else None,
            ungated=flat(saved[1]) if save and z is not None else None,
            initial=None,
            want_final=False,
            part=part,
        )
        del inputs  # the next slice's take their memory
    return out, saved


def bidirectional_scan_backward(arguments: BidirectionalScan, dout: Tensor, saved: list[Tensor]) -> BidirectionalScan:
    """See `vim_kernels.dispatch.contract`."""
    return part_backward(arguments, dout, saved, None)[0]


def part_backward(
    arguments: BidirectionalScan, dout: Tensor, saved: list[Tensor], part: Part | None
) -> tuple[BidirectionalScan, Tensor | None]:
    """Gradients of the arguments, and of the halo of a part. See `vim_kernels.dispatch.contract`."""
    _, forward, backward, cu_seqlens, gaps, *_ = arguments
    x, z = arguments.halves()
    b, l, d = x.shape
    dxz = x.new_empty(b, l, d if z is None else 2 * d)
    dx, dz = dxz[..., :d], None if z is None else dxz[..., d:]
    if x.numel() == 0:
        return arguments._replace(xz=dxz, forward=zeros(forward), backward=zeros(backward)), None
    tokens = tokens_of(x, cu_seqlens)
    laid_out = mixer_weights(x, forward, backward)
    if arguments.keep_inputs:
        inputs = MixerInputs(*saved[-4:])
    else:
        inputs = MixerInputs.empty(x, *laid_out.padded, low=True)
        mixer_inputs(x, laid_out, tokens, inputs, gaps)
        if part is not None:
            inputs_of_ends(x, laid_out, inputs, part.halo)
    gate = Gate(0.5)
    if z is not None and dz is not None:
        gate = Gate(0.5, flat(z), flat(saved[1]), flat(dz))
    grads = scan_backward(
        inputs.scan(laid_out, gaps), flat(dout), tokens,
        gate=gate, states=saved[0], dfinal=None, softplus=True, want_initial=False, part=part,
    )  # fmt: skip
    dprojections = projections_backward(grads, inputs, laid_out)
    taps, biases = (forward.conv_weight, backward.conv_weight), conv_biases(forward, backward)
    k = 0 if part is None else part.halo.shape[1] // 2
    du_ends = take_ends(grads.u, l, k) if k else None
    dtaps = conv_backward(grads.u, x, taps, biases, dx, cu_seqlens, reverse=False, silu=True)
    dhalo = None
    if part is not None and du_ends is not None:
        ends = ends_of(x, part.halo)
        dends = torch.empty_like(ends)
        of_ends = conv_backward(du_ends, ends, taps, biases, dends, None, reverse=False, silu=True)
        dtaps, dhalo = torch.cat([dtaps, of_ends], dim=1), add_ends(dx, dends)
    dforward, dbackward = parameter_gradients(forward, backward, dprojections, grads, dtaps, laid_out)
    return arguments._replace(xz=dxz, forward=dforward, backward=dbackward), dhalo


def mixer_weights(x: Tensor, forward: ScanWeights, backward: ScanWeights) -> MixerWeights:
    """What `mixer_inputs` and the scan need of the weights, in memory of its own."""
    f, b = _contiguous(forward), _contiguous(backward)
    d, n = f.A_log.shape
    rank, states, width = f.dt_proj.shape[1], padded(n), f.conv_weight.shape[1]
    columns = power_of_two(2 * states + padded(rank))
    biases = conv_biases(f, b)
    rates = x.new_empty(2, states, d, dtype=torch.float32)
    taps = x.new_empty(2, width + 1, d, dtype=torch.float32)
    projections = x.new_empty(2, 2, columns, d, dtype=x.dtype if x.is_cuda else torch.float32)  # see plan.dot_dtype
    launch(weight_layout_kernel, (cdiv(d, WEIGHTS_BLOCK), 2),
        f.A_log, b.A_log, f.conv_weight, b.conv_weight, *(biases or (x, x)), f.x_proj, b.x_proj, f.dt_proj, b.dt_proj,
        rates, taps, projections, d,
        N=n, STATES=states, WIDTH=width, RANK=rank, COLUMNS=columns, HAS_BIAS=biases is not None, BLOCK=WEIGHTS_BLOCK,
    )  # fmt: skip
    return MixerWeights(rates, taps, projections, (f.dt_bias, b.dt_bias), (f.D, b.D), padded(rank))


def mixer_inputs(x: Tensor, weights: MixerWeights, tokens: Tokens, inputs: MixerInputs, gaps: Tensor | None) -> None:
    """Fill `inputs`: convolution, SiLU, x_proj, dt_proj, softplus and `gaps` (2, b, l) of both directions."""
    rows, d = tokens.rows, x.shape[2]
    source, width, sizes = flat(x), weights.taps.shape[1] - 1, plan.CONVOLUTION
    launch(mixer_conv_forward_kernel, (cdiv(rows, sizes.groups * sizes.steps), cdiv(d, sizes.block)),
        source, source.stride(0), weights.taps, inputs.u, tokens.segment(x), rows, tokens.length, d, rows * d,
        PACKED=tokens.packed, WIDTH=width, GROUPS=sizes.groups, STEPS=sizes.steps, BLOCK=sizes.block,
        HARDWARE=plan.target(x.device) == "cuda", num_warps=sizes.warps,
    )  # fmt: skip
    project(inputs, weights, gaps)


def inputs_of_ends(x: Tensor, weights: MixerWeights, inputs: MixerInputs, halo: Tensor) -> None:
    """Of `inputs`, made of x (b, l, d) alone, make again the rows whose convolution sees the halo (b, 2 (w - 1), d)."""
    k = halo.shape[1] // 2
    if k:
        ends = ends_of(x, halo)
        of_ends = MixerInputs.empty(ends, *weights.padded, low=inputs.low is not None)
        mixer_inputs(ends, weights, tokens_of(ends, None), of_ends, None)
        whole, again = ([t for t in each if t is not None] for each in (inputs, of_ends))
        write_ends(whole, again, x.shape[1], k)


def project(inputs: MixerInputs, weights: MixerWeights, gaps: Tensor | None = None) -> None:
    """Fill all of `inputs` but u: x_proj, dt_proj, softplus and `gaps` (2, b, l) of both directions."""
    u, dt, bc, low = inputs
    _, rows, d = u.shape
    states, target = weights.rates.shape[1], plan.target(u.device)
    sizes = plan.mixer(u.device, weights.rank, rows)
    launch(projections_forward_kernel, (cdiv(rows, sizes.rows), 2),
        u, weights.projections, *weights.dt_biases, dt, bc, low if low is not None else u,
        u if gaps is None else gaps.contiguous(), rows, d, rows * d, rows * 2 * states, rows * weights.rank,
        GAPS=gaps is not None, STORE_LOW=low is not None,
        STATES=states, RANK_BLOCK=weights.rank, COLUMNS=weights.projections.shape[2],
        ROWS=sizes.rows, BLOCK=sizes.block, EVEN=d % sizes.block == 0,
        DOT=plan.dot_dtype(u), PRECISION="ieee", HARDWARE=target == "cuda",
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip


def projections_backward(grads: ScanGradients, inputs: MixerInputs, weights: MixerWeights) -> Tensor:
    """The path through x_proj, added to grads.u in place, and the gradients of x_proj and dt_proj in partial sums.

    These are (2, programs, 2 n' + 2 r', d) float32 for n' states and a rank of r', padded: the rows of B, C and the low
    rank of x_proj, and dt_proj transposed.
    """
    u, low = inputs.u, inputs.low
    assert low is not None
    _, rows, d = u.shape
    _, parts, _, pair = grads.bc.shape
    rank, states, target = weights.rank, pair // 2, plan.target(u.device)
    dot = {"DOT": plan.dot_dtype(u), "PRECISION": "ieee"}
    dprojected = u.new_empty(2, rows, pair + rank)
    sizes = plan.projections_backward(u.device, rows)
    launch(projections_backward_kernel, (cdiv(rows, sizes.rows), 2),
        grads.dt, grads.bc, weights.projections, grads.u, dprojected, rows, d, parts, rows * pair, rows * d,
        STATES=states, RANK_BLOCK=rank, COLUMNS=weights.projections.shape[2], ROWS=sizes.rows, BLOCK=sizes.block,
        AHEAD=plan.PARTS_AHEAD, EVEN=d % sizes.block == 0, **dot, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    sizes = plan.PROJECTION_SUMS[target]
    programs = min(plan.PROJECTION_PROGRAMS, cdiv(rows, sizes.rows))
    partial = u.new_empty(2, programs, pair + 2 * rank, d, dtype=torch.float32)
    launch(projection_sums_kernel, (cdiv(d, sizes.block), programs, 2),
        u, grads.dt, dprojected, low, partial, rows, d, rows * d,
        STATES=states, RANK_BLOCK=rank, ROWS=sizes.rows, BLOCK=sizes.block, EVEN=d % sizes.block == 0, **dot,
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return partial


def parameter_gradients(
    forward: ScanWeights,
    backward: ScanWeights,
    dprojections: Tensor,
    grads: ScanGradients,
    dtaps: Tensor,
    weights: MixerWeights,
) -> tuple[ScanWeights, ScanWeights]:
    """The partial sums as gradients like the parameters, each in memory of its own: ops may not return views.

    dtaps (2, programs, w + 1, d) are of taps and bias; where a row more is there, it is of D, in place of the scan's.
    """
    d, n = forward.A_log.shape
    rank, width, states = forward.dt_proj.shape[1], forward.conv_weight.shape[1], weights.rates.shape[1]
    two = [_empty(forward), _empty(backward)]
    # a direction without a bias beside one that has: what is summed for it is never read
    biases = [forward.D.new_empty(d) if t.conv_bias is None else t.conv_bias for t in two]
    filled = [t for name in ("x_proj", "dt_proj", "dt_bias", "A_log", "D") for t in (getattr(g, name) for g in two)]
    sizes = plan.GRADIENTS
    launch(mixer_gradients_kernel, (cdiv(d, sizes.block), 2 * rank + 3 * n + 3 + width, 2),
        dprojections, grads.rates, grads.sums, dtaps, weights.rates, *(t.conv_weight for t in two), *biases, *filled,
        d, dprojections.shape[1], grads.rates.shape[1], dtaps.shape[1],
        N=n, STATES=states, WIDTH=width, RANK=rank, RANK_BLOCK=weights.rank, PARTS=sizes.rows, BLOCK=sizes.block,
        SKIP_WITH_TAPS=dtaps.shape[2] > width + 1, num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return two[0], two[1]


def padded(size: int) -> int:
    """A rank or number of states padded to what a product of tiles takes."""
    return max(16, power_of_two(size))


def _contiguous(weights: ScanWeights) -> ScanWeights:
    return ScanWeights._make(None if t is None else t.contiguous() for t in weights)


def zeros(weights: ScanWeights) -> ScanWeights:
    """Gradients of a scan of no tokens."""
    return ScanWeights._make(None if t is None else torch.zeros_like(t) for t in weights)


def _empty(weights: ScanWeights) -> ScanWeights:
    like = torch.contiguous_format
    return ScanWeights._make(None if t is None else torch.empty_like(t, memory_format=like) for t in weights)


def conv_biases(forward: ScanWeights, backward: ScanWeights) -> tuple[Tensor, Tensor] | None:
    """Of both directions; zeros for the one that has none beside one that has."""
    f, b = forward.conv_bias, backward.conv_bias
    if f is None and b is None:
        return None
    nothing = torch.zeros_like(forward.D)
    return (nothing if f is None else f).contiguous(), (nothing if b is None else b).contiguous()
