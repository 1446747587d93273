"""A sequence scanned in parts that ask for each other's states: values and gradients of the reference, in float64."""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from tests.kernels.test_backends import (
    DEVICES,
    GRADIENT,
    INTERPRETED,
    LOW_GRADIENT,
    LOW_VALUE,
    VALUE,
    assert_close,
    draw,
)
from vim_kernels import Part, ScanWeights, bidirectional_scan, bidirectional_scan_part, takes_parts
from vim_kernels.triton_backend import plan

DEVICE = DEVICES["triton"]


def weights_of(d, n, r, w, *, bias=True):
    """Of one direction; decays are slow, so that a state lasts for more than a part."""
    A_log = torch.arange(1.0, n + 1).log().repeat(d, 1) - 2.0
    conv_bias = 0.1 * draw(d, seed=1) if bias else None
    projections = draw(r + 2 * n, d, seed=2) / d**0.5, draw(d, r, seed=3) / r**0.5
    return ScanWeights(draw(d, w) / 2, conv_bias, *projections, draw(d, seed=4) / 10 - 3, A_log, draw(d, seed=5))


class NotYetError(Exception):
    """A part asks for what the others have not said yet."""


class Parts:
    """All parts in one process: each goes as far as its question, then all go on with the answers."""

    def __init__(self, xz, weights, lengths, **options):
        self.xz, self.weights, self.options = xz, weights, options
        self.stops = torch.tensor(lengths).cumsum(0).tolist()
        self.starts = [0, *self.stops[:-1]]
        self.said = {}
        """(part, whether reverse) -> state, steps and rates."""

    def entering(self, number, state, steps, rates, reverse):
        self.said[number, reverse] = state.clone(), steps.clone(), rates.clone()
        parts = range(len(self.stops))
        if any((other, reverse) not in self.said for other in parts):
            raise NotYetError
        entering = torch.zeros_like(state)
        for direction in range(2):
            before = parts[:number] if (direction == 1) == reverse else parts[:number:-1]
            for other in before:
                left, over, each = (tensor[direction] for tensor in self.said[other, reverse])
                entering[direction] = entering[direction] * torch.exp2(over[:, None] * each) + left
        return entering

    def scan(self, number, **options):
        forward, backward = self.weights
        k, d = forward.conv_weight.shape[1] - 1, forward.D.shape[0]
        padded = torch.nn.functional.pad(self.xz[..., :d], (0, 0, k, k))
        start, stop = self.starts[number], self.stops[number]
        halo = torch.cat([padded[:, start : start + k], padded[:, stop + k : stop + 2 * k]], dim=1)
        part = Part(halo, lambda *asked: self.entering(number, *asked))
        own = self.xz[:, start:stop].clone()
        return bidirectional_scan_part(own, forward, backward, part, backend="triton", **self.options, **options)

    def all(self, work):
        """What `work` gives for each part, in order; all but the last begin twice."""
        results = {}
        for number in 2 * [*range(len(self.stops))]:
            try:
                if number not in results:
                    results[number] = work(number)
            except NotYetError:
                continue
        return [results[number] for number in sorted(results)]


CASES = {
    "uneven": ((5, 3, 7), {}),
    "not gated, a batch, all kept": ((4, 6), {"gated": False, "batch": 2, "recompute": "none"}),
    "all made again, 16 states": ((2, 7), {"n": 16, "w": 2, "batch": 2, "recompute": "states"}),
    "one tap": ((1, 6, 1), {"w": 1}),
    "no bias": ((3, 4), {"bias": False}),
    "shorter than the halo at both ends": ((4, 3, 4), {"w": 4}),
    "in chunks": ((70, 66), {"chunks": True}),
    "bf16": ((40, 33), {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_make_the_whole(case, monkeypatch):
    lengths, changes = CASES[case]
    sizes = {"n": 4, "w": 4, "batch": 1, "gated": True, "bias": True, "dtype": torch.float32, "recompute": "inputs"}
    sizes |= changes
    if "chunks" in changes:
        monkeypatch.setattr(plan, "processors", lambda device: 1000)
        monkeypatch.setattr(plan, "CARRY_CHUNKS", 2)  # the interpreter takes a minute for the shipped 64
    dtype, gated, d = sizes["dtype"], sizes["gated"], 8
    truncates = 4 if INTERPRETED else 1
    low = LOW_VALUE * truncates, LOW_GRADIENT * truncates
    value, gradient = (VALUE, GRADIENT) if dtype == torch.float32 else low
    two = [weights_of(d, sizes["n"], 3, sizes["w"], bias=sizes["bias"]) for _ in range(2)]
    xz = draw(sizes["batch"], sum(lengths), 2 * d if gated else d).to(dtype)
    upstream = draw(sizes["batch"], sum(lengths), d, seed=9).to(dtype)

    def leaves(kind):
        """xz and both weights as leaves."""
        own = [None if t is None else t.float().to(kind).to(DEVICE).requires_grad_() for t in (*two[0], *two[1])]
        count = len(ScanWeights._fields)
        return xz.to(kind).to(DEVICE).requires_grad_(), (ScanWeights(*own[:count]), ScanWeights(*own[count:]))

    exact, exact_weights = leaves(torch.float64)
    expected = bidirectional_scan(exact, *exact_weights, gated=gated, backend="reference")
    expected.backward(upstream.double().to(DEVICE))

    tokens, weights = leaves(torch.float32)
    tokens = tokens.detach().to(dtype).requires_grad_()
    parts = Parts(tokens, weights, lengths, gated=gated, recompute=sizes["recompute"])
    outputs = parts.all(parts.scan)
    assert_close(torch.cat(outputs, dim=1), expected, value, "values")
    with torch.no_grad():
        for overwrite in (False, True):
            alone = parts.all(functools.partial(parts.scan, overwrite=overwrite))
            assert_close(torch.cat(alone, dim=1), expected, value, f"overwrite={overwrite}")
    pieces = upstream.to(DEVICE).split(lengths, dim=1)
    inputs = [tokens, *(t for t in (*weights[0], *weights[1]) if t is not None)]
    gradients = parts.all(
        lambda number: torch.autograd.grad(outputs[number], inputs, pieces[number], retain_graph=True)
    )
    summed = [torch.stack(each).sum(0) for each in zip(*gradients, strict=True)]
    wanted = [exact, *(t for t in (*exact_weights[0], *exact_weights[1]) if t is not None)]
    for number, (one, other) in enumerate(zip(summed, wanted, strict=True)):
        assert_close(one, other.grad, gradient, f"gradient {number}")


def test_what_cannot_be_a_part_is_refused():
    two = weights_of(8, 4, 3, 4), weights_of(8, 4, 3, 4)
    single = [ScanWeights(*(t.float() for t in weights)) for weights in two]
    xz = torch.zeros(1, 5, 16)
    part = Part(torch.zeros(1, 6, 8), lambda state, *_: state)
    assert takes_parts(xz, *single, backend="triton")
    assert not takes_parts(xz, *two, backend="triton")
    assert not takes_parts(xz, *single, backend="cpu")
    with pytest.raises(ValueError, match="takes no part of a sequence"):
        bidirectional_scan_part(xz, *single, part, backend="torch")
    with pytest.raises(ValueError, match=r"part\.halo has shape \(1, 4, 8\), wanted \(1, 6, 8\)"):
        bidirectional_scan_part(xz, *single, part._replace(halo=torch.zeros(1, 4, 8)), backend="triton")
    with pytest.raises(ValueError, match="xz 2 tokens"):
        bidirectional_scan_part(xz[:, :2], *single, part, backend="triton")
