"""What Python hands to the kernels: C-like records of addresses, strides and sizes, int64 but where said.

An address is 0 where its array is absent; strides are in elements. "Tokens" are the rows of a batch or of a packed row,
one after the other; `bf16` says that what has the dtype of the tokens is bfloat16, else float32.
"""

import numpy as np

TILE = 32
"""Tokens per tile: their dt, drive, output and, in the backward, states stay in the L1 and L2 caches."""


def _record(names: str, floats: str = "") -> np.dtype:
    return np.dtype([(name, np.int64) for name in names.split()] + [(name, np.float32) for name in floats.split()])


SCAN = _record(
    "channels states rank reverse softplus bf16"
    # All by tokens and channels; dt is float32, or absent and made from float32 rows `low` of `rank` elements.
    " u u_stride dt dt_stride low low_stride gate gate_stride"
    # float32 rows of `states` elements
    " B C bc_stride"
    # float32 (tokens,), or absent: what dt is multiplied by after softplus
    " gaps"
    # float32: dt_proj (rank, channels); dt_bias, skip (channels,); decay = A log2(e), (channels / 16, states, 16)
    " dt_proj dt_bias skip decay"
    # float32 (sequences or tiles, channels / 16, states, 16)  # noqa: ERA001
    " initial final checkpoints"
    # All by tokens and channels; partial is float32 and added before the gate.
    " partial out out_stride out_bf16",
    floats="scale",
)
"""One direction of the scan: out = scale (y + partial) silu(gate), y = <C, h> + skip u."""

SCAN_GRADIENT = _record(
    # (tokens, channels): dout and dgate in the dtype of the tokens; y_out float32: where the ungated y goes
    "dout dout_stride dgate dgate_stride y_out"
    # float32 (tokens, channels); ddt is before softplus
    " du ddt"
    # float32 (groups, tokens, ...): dB | dC rows
    " dbc dbc_stride dbc_group_stride"
    # float32 (sequences, states + 2, channels): dA blocked like decay, then skip, then dt_bias
    " dweights"
    # float32 (sequences, channels / 16, states, 16)  # noqa: ERA001
    " dfinal dinitial"
)
"""The gradients that go with a SCAN record."""

CONV = _record(
    "channels taps reverse silu bf16"
    # x, out, dx: (tokens, channels) in the dtype of the tokens; weight float32 (taps, channels), bias (channels,)
    " x x_stride weight bias out out_stride"
    # dout and dx have flags of their own; dx_partial is float32 (tokens, channels) and added to dx
    " dout dout_stride dout_bf16 dx dx_stride dx_bf16 dx_partial dx_partial_stride"
    # float32 (sequences, taps + 1, channels), the bias last
    " dweights"
)
"""One direction of the convolution, and its gradients."""

POOLED = _record(
    # `size` channels, filled up to `channels`; in the dtype of the tokens (rows, 2 channels): x | z and their gradient,
    # and (rows, channels): out, dout
    "size channels taps bf16 xz dxz out dout"
    # float32, of the direction forwards, then backwards: weight (taps, channels), bias and skip (channels,)
    " weight bias skip weight_b bias_b skip_b"
    # float32: y (lines, channels), the mean of both directions; weight and bias (channels,) of the norm, statistics of
    # its rows (rows, 2): mean and 1 / deviation
    " y norm_weight norm_bias stats"
    # (2, lines, channels): the sums of lines in the dtype of the tokens, their gradient float32
    " pooled dpooled"
    # float32: (rows, channels), the gradient of the sum of the directions; (lines, channels), its sums over lines
    " dsum dy"
    # float32: (workers, 2, channels) of the norm; (2, sequences, taps + 2, channels): taps, bias, skip
    " dnorm dweights lines sequences",
    floats="eps",
)
"""What the pooled scan does token by token; 0 for norm_weight: without a norm."""

NORM = _record(
    # (rows, channels): x and normed in the dtype of the tokens; residual, total, dtotal, dsum float32
    "rows channels bf16 x residual total weight normed dnormed dtotal dsum dweight",
    floats="eps",
)
"""Residual add and RMS norm, and its gradients; dweight is (workers, channels)."""

WEIGHTS = _record(
    # given: `size` channels, `x_proj_rows` rows of x_proj; made: `channels` and `columns`
    "size channels taps rank states columns x_proj_rows"
    # float32: conv_weight (size, taps), dt_proj (size, rank), A_log (size, states), the others (size,)
    " conv_weight conv_bias dt_proj dt_bias skip A_log x_proj"
    " target"
)
"""One direction's weights as PyTorch has them, and where they go, in the order and layouts of `DirectionWeights`."""
