"""The contract between the public ops and the backends: every op's arguments, written once, and what a backend is.

Letters of axes, the same in all files of `vim_kernels`: b batch, l tokens, d inner channels (d_inner), n states
(d_state), r rank of dt (dt_rank), w taps of the convolution (d_conv), s sequences (b, or the images of a packed row).

A backend is a package with `unavailable(device)`, which says why it cannot run there or returns None, and a module for
every room that `OPS` names. A room has plain functions of tensors, without autograd, for each of its ops:

    <op>_forward(arguments, save) -> (*outputs, saved)    and, for an op that saves nothing,
    <op>_forward(arguments) -> the output, or a tuple of them
    <op>_saved(arguments) -> empty tensors that the forward fills for the backward
    <op>_backward(arguments, *gradients of the outputs, saved) -> arguments with gradients in the place of the tensors

Inputs are never written, but for xz where `bidirectional_scan_forward(arguments, save, overwrite=True)` allows it; all
scratch is allocated inside. Tensors may differ in float dtype (no float64). The gradient of the first output is always
given, those of the others may be None; all are contiguous and like the outputs. Gradients come back contiguous,
unaliased, in the shape and dtype of their tensors; None where the tensor is None; for a `Constant` anything. What
`<op>_saved` allocates depends on the shapes of the arguments only, since fake kernels call it too; a forward that does
not save returns [] in its place. The backward of `add_rms_norm` has the arguments `RmsNorm`.

A backend of `choice.TAKES_PARTS` takes a `Part` of longer sequences too, as the argument `part` of
`bidirectional_scan_forward`, and in `part_backward(arguments, dy, saved, part) -> gradients of arguments, of the halo`.
"""

import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Constant = Annotated[Tensor, "without a gradient"]
"""As cu_seqlens, whose gradient nobody asks for."""

Recompute = Literal["none", "inputs", "states"]
"""What the backward pass of a mixer makes again: `vim_kernels.ops.bidirectional_scan` explains it."""


class ScanWeights(NamedTuple):
    """Parameters of one scan direction of a Vim mixer."""

    conv_weight: Tensor
    """(d, w) depthwise taps; the last one meets the token itself."""
    conv_bias: Tensor | None
    """(d,)"""
    x_proj: Tensor
    """(r + 2 n, d), rows in the order dt low rank, B, C."""
    dt_proj: Tensor
    """(d, r)"""
    dt_bias: Tensor
    """(d,), added before softplus."""
    A_log: Tensor
    """(d, n); A = -exp(A_log)."""
    D: Tensor
    """(d,) skip."""


class NormWeights(NamedTuple):
    """Parameters of a LayerNorm over d channels."""

    weight: Tensor
    """(d,)"""
    bias: Tensor
    """(d,)"""


class Lines(NamedTuple):
    """Lines of tokens, the rows or columns of pictures, as offsets: which positions make a line.

    A position is a place in scan order among the tokens of all sequences, one sequence after the other. Hidden tokens
    have no position, and a line may be empty.
    """

    starts: Constant
    """(lines + 1,) int32: line i holds the positions from starts[i] to starts[i + 1]."""
    line_of: Constant
    """(b l,) int32: the line of every position."""
    weights: Constant
    """(lines,) float32: what the sum over a line is multiplied by, 1 / tokens of a whole line for the mean."""
    order: Constant | None = None
    """(b l,) int32: the token at every position, a row of the sequences one after the other; None where tokens lie in
    scan order."""
    cu_lines: Constant | None = None
    """(s + 1,) int32: borders of packed sequences, in lines; None where every row of a batch has as many lines."""

    @property
    def total(self) -> int:
        """Lines of all sequences."""
        return self.starts.shape[0] - 1

    def cu_seqlens(self) -> Tensor | None:
        """(s + 1,) int32 borders of packed sequences in positions; None for a batch."""
        return None if self.cu_lines is None else self.starts[self.cu_lines]


class SelectiveScan(NamedTuple):
    """Arguments of `selective_scan`: `vim_kernels.ops.selective_scan` explains them."""

    x: Tensor  # (b, l, d), as dt and z
    dt: Tensor
    A: Tensor  # (d, n)
    B: Tensor  # (b, l, n), as C
    C: Tensor
    D: Tensor | None  # (d,), as dt_bias
    z: Tensor | None
    dt_bias: Tensor | None
    cu_seqlens: Constant | None  # (s + 1,)
    initial_state: Tensor | None  # (s, d, n)
    dt_softplus: bool
    reverse: bool

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Empty y like x, and final state (s, d, n) float32."""
        sequences = self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return self.x.new_empty(self.x.shape), self.x.new_empty((sequences, *self.A.shape), dtype=torch.float32)


class BidirectionalScan(NamedTuple):
    """Arguments of `bidirectional_scan`: `vim_kernels.ops.bidirectional_scan` explains them."""

    xz: Tensor  # (b, l, 2 d) contiguous, x and z side by side; (b, l, d), x alone, where not gated
    forward: ScanWeights
    backward: ScanWeights
    cu_seqlens: Constant | None
    gaps: Constant | None  # (2, b, l) float32, of either direction
    gated: bool
    keep_inputs: bool = False
    """A forward that saves keeps what convolutions and projections made too; the Triton backend alone can."""

    def outputs(self) -> tuple[Tensor]:
        """Empty y (b, l, d) like x."""
        x, _ = self.halves()
        return (x.new_empty(x.shape),)

    def halves(self) -> tuple[Tensor, Tensor | None]:
        """Views x and z of xz, or xz itself and None."""
        if not self.gated:
            return self.xz, None
        x, z = self.xz.chunk(2, dim=-1)
        return x, z


class Part(NamedTuple):
    """What the scan of a part of every sequence of a batch needs of the rest, which others scan at the same time."""

    halo: Tensor
    """(b, 2 (w - 1), d): x of the tokens before the part, then of those behind it; 0 where the sequence has none."""
    entering: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    """`entering(state, steps, rates, reverse)`: the state (2, b, n, d) that enters the part in either direction.

    All are float32, n may be padded. `state` (2, b, n, d) is what would leave the part if zeros entered; what enters is
    multiplied on its way by exp2(steps rates), for steps (2, b, d) and rates (2, n, d). Direction 0 runs from the first
    token to the last, or where `reverse` from the last to the first, as adjoint states do; direction 1 the other way.
    It is called once by every forward and once by every backward pass."""


class PooledScan(NamedTuple):
    """Arguments of `pooled_scan`: `vim_kernels.ops.pooled_scan` explains them."""

    xz: Tensor  # (b, l, 2 d) contiguous, x and z side by side
    forward: ScanWeights
    backward: ScanWeights
    lines: Lines
    norm: NormWeights | None
    eps: float

    def outputs(self) -> tuple[Tensor]:
        """Empty y (b, l, d) like xz."""
        b, l, width = self.xz.shape
        return (self.xz.new_empty(b, l, width // 2),)

    def like_lines(self) -> Tensor:
        """An empty tensor (b, lines of a row of the batch, 0) in the dtype of the tokens."""
        b = self.xz.shape[0]
        return self.xz.new_empty(b, self.lines.total // max(b, 1), 0)


class CausalConv1d(NamedTuple):
    """Arguments of `causal_conv1d`: `vim_kernels.ops.causal_conv1d` explains them."""

    x: Tensor  # (b, l, d)
    weight: Tensor  # (d, w)
    bias: Tensor | None  # (d,)
    cu_seqlens: Constant | None
    activation: str | None  # "silu"
    reverse: bool

    def outputs(self) -> tuple[Tensor]:
        """Empty y like x."""
        return (self.x.new_empty(self.x.shape),)


class AddRmsNorm(NamedTuple):
    """Arguments of `add_rms_norm`: `vim_kernels.ops.add_rms_norm` explains them."""

    x: Tensor  # (..., d)
    residual: Tensor | None  # the same
    weight: Tensor  # (d,)
    eps: float

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Empty normed like x, and residual + x in float32: never an alias of x."""
        return self.x.new_empty(self.x.shape), self.x.new_empty(self.x.shape, dtype=torch.float32)


class RmsNorm(NamedTuple):
    """What the backward of `add_rms_norm` needs of its arguments, which share the gradient of their sum."""

    total: Tensor  # (..., d) float32, residual + x
    weight: Tensor  # (d,)
    eps: float


class OpSpec(NamedTuple):
    """What `dispatch` has to know of an op."""

    name: str
    room: str
    """Module of every backend that computes it."""
    arguments: Any
    """Named tuple: tensors and named tuples of tensors first, then options."""
    outputs: tuple[str, ...]
    saves: bool = True
    """Whether its forward can leave tensors for its backward."""
    backward: Any = None
    """Named tuple of arguments of the backward, where it has others."""


OPS = {
    spec.name: spec
    for spec in (
        OpSpec("selective_scan", "scan", SelectiveScan, ("y", "final_state")),
        OpSpec("bidirectional_scan", "mixer", BidirectionalScan, ("y",)),
        OpSpec("pooled_scan", "pooled", PooledScan, ("y",)),
        OpSpec("causal_conv1d", "conv", CausalConv1d, ("y",), saves=False),
        OpSpec("add_rms_norm", "norm", AddRmsNorm, ("normed", "total"), saves=False, backward=RmsNorm),
    )
}


class Place(NamedTuple):
    """Where the value of a field is among the flat ones."""

    start: int
    stop: int
    bundle: Any
    """The named tuple that the values make, or None for a single one."""
    absent: tuple[None, ...]
    """The values of a tuple that is None; () where it cannot be."""

    def of(self, flat: Sequence[Any]) -> Any:
        """The named tuple among the flat values of all fields."""
        values = flat[self.start : self.stop]
        return None if self.absent and values[0] is None else self.bundle(*values)


class Layout:
    """A named tuple of arguments, which may have others in it, as single values one after the other."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.places: list[Place] = []
        for hint in get_type_hints(kind).values():
            bundle, is_optional = _bundle(hint)
            start = self.places[-1].stop if self.places else 0
            width = len(bundle._fields) if bundle else 1
            self.places.append(Place(start, start + width, bundle, (None,) * width if is_optional else ()))
        if not any(place.bundle for place in self.places):
            self.flatten, self.unflatten = tuple, kind._make

    def flatten(self, arguments: Any, /) -> Sequence[Any]:
        """Single values, in order: those of a tuple within in its place, or as many Nones where it is None."""
        values = zip(arguments, self.places, strict=True)
        return [leaf for value, at in values for leaf in ((value,) if at.bundle is None else value or at.absent)]

    def unflatten(self, flat: Sequence[Any], /) -> Any:
        """The inverse of `flatten`."""
        return self.kind(*[flat[at.start] if at.bundle is None else at.of(flat) for at in self.places])


def _bundle(hint: Any) -> tuple[Any, bool]:
    """The named tuple of an annotation or None, and whether the value may be None."""
    choices = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    return next((c for c in choices if hasattr(c, "_fields")), None), types.NoneType in choices


class Leaf(NamedTuple):
    """A single value among the arguments of an op."""

    name: str
    kind: Any
    """Type, as PyTorch reads it to make the schema of an op."""
    is_tensor: bool
    has_gradient: bool


def leaf(name: str, kind: Any, *, is_constant: bool = False) -> Leaf:
    """`is_constant`: a tensor without a gradient."""
    is_tensor = kind is Tensor or Tensor in get_args(kind)
    return Leaf(name, kind, is_tensor, is_tensor and not is_constant)


def leaves(kind: Any) -> list[Leaf]:
    """What `Layout.flatten` makes of a named tuple; the fields of one within carry its name, as `forward_D`."""
    result, marked = [], get_type_hints(kind, include_extras=True)
    for name, hint in get_type_hints(kind).items():
        bundle, is_optional = _bundle(hint)
        if bundle is None:
            result.append(leaf(name, hint, is_constant=marked[name] != hint))
        for part in leaves(bundle) if bundle else ():
            plain = part.kind | None if is_optional else part.kind
            result.append(part._replace(name=f"{name}_{part.name}", kind=plain))
    return result
