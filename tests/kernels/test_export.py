"""The ops as a program makes them: the backend "export", traced once with an open length, against the oracles."""

import numpy as np
import pytest
import torch

import vim_kernels
from tests.kernels import oracle
from tests.kernels.pooled_cases import draw_picture, lines_of
from vim_kernels import NormWeights, ScanWeights, bidirectional_scan, causal_conv1d, pooled_scan, selective_scan

D, N, R = 6, 3, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(seed):
    shapes = ScanWeights((D, 4), (D,), (R + 2 * N, D), (D, R), (D,), (D, N), (D,))  # pyright: ignore
    return ScanWeights(*(0.5 * draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)))


class Ops(torch.nn.Module):
    """With weights that are drawn before it is traced."""

    def __init__(self):
        super().__init__()
        self.A, self.D, self.bias, self.taps = -draw(D, N).exp(), draw(D, seed=1), draw(D, seed=2), draw(D, 3)
        self.forwards, self.backwards = weights(0), weights(9)

    def forward(self, x, dt, B, C, z, h0):
        options = {"dt_softplus": True, "reverse": True, "initial_state": h0, "return_final_state": True}
        y, state = selective_scan(x, dt, self.A, B, C, self.D, z, self.bias, **options)
        plain = selective_scan(x, dt.exp(), self.A, B, C)
        taps = causal_conv1d(x, self.taps, None, None, reverse=True)
        ungated = bidirectional_scan(x, self.forwards, self.backwards, gated=False)
        return y, state, plain, taps, ungated


def test_scan_and_convolution_of_any_length():
    example = (draw(2, 7, D), draw(2, 7, D), draw(2, 7, N), draw(2, 7, N), draw(2, 7, D), draw(2, D, N))
    length = torch.export.Dim("length", min=2)
    shapes = {name: {1: length} for name in ("x", "dt", "B", "C", "z")} | {"h0": None}
    with torch.no_grad(), vim_kernels.use_backend("export"):
        program = torch.export.export(Ops(), example, dynamic_shapes=shapes).module()
    for l in (2, 13):
        x, dt, B, C, z = (draw(2, l, n, seed=i) for i, n in enumerate((D, D, N, N, D)))
        h0, A = draw(2, D, N), -draw(D, N).exp()
        outputs = program(x, dt, B, C, z, h0)
        for row in range(2):
            per_row = [t[row] for t in (x, dt, A[None].expand(2, -1, -1), B, C)]
            y, state = oracle.scan(
                *per_row, draw(D, seed=1), z[row], draw(D, seed=2), softplus=True, reverse=True, h0=h0[row]
            )
            plain, _ = oracle.scan(x[row], dt[row].exp(), *per_row[2:])
            taps = oracle.conv(x[row], draw(D, 3), silu=False, reverse=True)
            ungated = oracle.mixer_core(x[row], None, weights(0), weights(9))
            for got, want in zip(outputs, (y, state, plain, taps, ungated), strict=True):
                np.testing.assert_allclose(got[row].numpy(), want, rtol=1e-5, atol=1e-5)


def test_masked_lines_of_the_pooled_scan():
    """A program of whole pictures has lines of one length; the op takes any."""
    pictures = [draw_picture(3, 4, 7, seed=seed) for seed in range(2)]
    xz, norm = draw(2, 7, 2 * D), NormWeights(draw(D), draw(D, seed=1))
    for by_column in (False, True):
        lines = lines_of(pictures, by_column=by_column)
        got, want = (
            pooled_scan(xz, weights(0), weights(9), lines, norm=norm, backend=name) for name in ("export", "reference")
        )
        torch.testing.assert_close(got, want)


def test_packed_rows_are_refused():
    with pytest.raises(ValueError, match="takes no packed rows: give a batch of one size"):
        causal_conv1d(draw(1, 5, D), draw(D, 3), cu_seqlens=torch.tensor([0, 2, 5]).int(), backend="export")
