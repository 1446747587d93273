"""Kernels that take every element by itself, in core Triton: softplus of dt, and the gate's backward."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from vim_kernels.triton_backend.elementary import sigmoid, softplus


@triton.jit
def softplus_forward_kernel(
    dt_ptr, bias_ptr, out_ptr, rows, channels, dt_stride,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of channels). softplus(dt + bias) (rows, d), in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < channels
    tile = (row < rows)[:, None] & ok[None, :]
    v = tl.load(dt_ptr + row.to(tl.int64)[:, None] * dt_stride + d[None, :], mask=tile, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        v = softplus(v)
    at = row.to(tl.int64)[:, None] * channels + d[None, :]
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=tile)


@triton.jit
def gate_backward_kernel(
    dout_ptr, z_ptr, ungated_ptr, dy_ptr, dz_ptr, rows, channels, z_stride, dz_stride,
    GATE: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, blocks of channels). out = SCALE y silu(z): dy, and dz from the saved y (rows, d)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tile = (row < rows)[:, None] & (d < channels)[None, :]
    row = row.to(tl.int64)
    at = row[:, None] * channels + d[None, :]
    dy = SCALE * tl.load(dout_ptr + at, mask=tile, other=0.0).to(tl.float32)
    if GATE:
        z = tl.load(z_ptr + row[:, None] * z_stride + d[None, :], mask=tile, other=0.0).to(tl.float32)
        y = tl.load(ungated_ptr + at, mask=tile, other=0.0).to(tl.float32)
        gate = sigmoid(z)
        dz = dy * y * gate * (1.0 + z * (1.0 - gate))
        tl.store(dz_ptr + row[:, None] * dz_stride + d[None, :], dz.to(dz_ptr.dtype.element_ty), mask=tile)
        dy = dy * z * gate
    tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=tile)
