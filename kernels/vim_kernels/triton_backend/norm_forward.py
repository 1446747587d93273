"""Forward kernel of the residual add and RMS norm, in core Triton."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


@triton.jit
def add_rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, rows, channels, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows,). BLOCK >= channels. total = residual + x, float32; normed = total / rms(total) weight."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    ok = d < channels
    tile = (row < rows)[:, None] & ok[None, :]
    at = row.to(tl.int64)[:, None] * channels + d[None, :]
    total = tl.load(x_ptr + at, mask=tile, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=tile, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(total * total, axis=1) / channels + eps)
    weight = tl.load(weight_ptr + d, mask=ok, other=0.0).to(tl.float32)
    normed = total * scale[:, None] * weight[None, :]
    tl.store(total_ptr + at, total, mask=tile)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=tile)
