"""Arguments of ops as named tuples: laid flat and back, and the schemas that PyTorch makes of them."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vim_kernels import Lines, ScanWeights
from vim_kernels.dispatch.contract import OPS, BidirectionalScan, Constant, Layout, leaves


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor


class Mixed(NamedTuple):
    """With all that an op's arguments may have: a tuple that may be absent, constants in one, options behind."""

    x: Tensor
    norm: Norm | None
    state: Tensor | None
    borders: Constant | None
    eps: float


WEIGHTS = ScanWeights(*(torch.full((1,), float(i)) for i in range(7)))


@pytest.mark.parametrize(
    ("arguments", "flat"),
    [
        (Mixed(1, Norm(2, 3), 4, 5, 6.0), [1, 2, 3, 4, 5, 6.0]),
        (Mixed(1, None, None, 5, 6.0), [1, None, None, None, 5, 6.0]),
        (Norm(1, 2), [1, 2]),
    ],
)  # pyright: ignore
def test_flat_values_and_back(arguments, flat):
    layout = Layout(type(arguments))
    assert list(layout.flatten(arguments)) == flat
    assert layout.unflatten(flat) == arguments


def test_weights_of_both_directions_keep_their_places():
    arguments = BidirectionalScan(torch.zeros(1), WEIGHTS, WEIGHTS._replace(conv_bias=None), None, None, True)
    flat = Layout(BidirectionalScan).flatten(arguments)
    assert [flat[1 + i] is t for i, t in enumerate(WEIGHTS)] == [True] * 7
    assert flat[9] is None
    again = Layout(BidirectionalScan).unflatten(flat)
    assert all(a is b for a, b in zip(again.backward, arguments.backward, strict=True))
    assert (again.cu_seqlens, again.gated) == (None, True)


def test_leaves_say_what_has_a_gradient():
    assert [(leaf.name, leaf.is_tensor, leaf.has_gradient) for leaf in leaves(Mixed)] == [
        ("x", True, True),
        ("norm_weight", True, True),
        ("norm_bias", True, True),
        ("state", True, True),
        ("borders", True, False),
        ("eps", False, False),
    ]
    assert leaves(Mixed)[1].kind == Tensor | None


@pytest.mark.parametrize("spec", OPS.values(), ids=OPS)
def test_schemas_name_every_argument(spec):
    """PyTorch's own reading of the schema: names in order, and the tensors that may be absent."""
    schema = getattr(torch.ops.vim_kernels, spec.name).default._schema
    expected = [leaf.name for leaf in leaves(spec.arguments)] + ["backend"] + ["save"] * spec.saves
    assert [argument.name for argument in schema.arguments] == expected
    optional = {a.name for a in schema.arguments if a.type.kind() == "OptionalType"} - {"activation"}
    assert optional == {leaf.name for leaf in leaves(spec.arguments) if leaf.is_tensor and leaf.kind is not Tensor}
    backward = getattr(torch.ops.vim_kernels, f"{spec.name}_backward").default._schema
    assert [a.name for a in backward.arguments][: len(spec.outputs)] == [f"d{name}" for name in spec.outputs]


def test_only_borders_gaps_and_lines_have_no_gradient():
    constants = {leaf.name for s in OPS.values() for leaf in leaves(s.arguments) if leaf.is_tensor > leaf.has_gradient}
    assert constants == {"cu_seqlens", "gaps", *(f"lines_{field}" for field in Lines._fields)}
