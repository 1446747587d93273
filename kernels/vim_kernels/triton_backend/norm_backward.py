"""Backward kernel of the residual add and RMS norm, in core Triton."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl


@triton.jit
def add_rms_norm_backward_kernel(
    dnormed_ptr, dtotal_ptr, total_ptr, weight_ptr, dsum_ptr, partial_ptr, rows, channels, eps, blocks_of_rows,
    HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). Gradient (rows, d) of x + residual, and partial (programs, d) sums for the weight."""
    d = tl.arange(0, BLOCK)
    ok = d < channels
    weight = tl.load(weight_ptr + d, mask=ok, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)  # summed over rows at the end: in the loop threads would have to meet
    for i in range(0, blocks_of_rows):
        row = (i * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        tile = (row < rows)[:, None] & ok[None, :]
        at = row.to(tl.int64)[:, None] * channels + d[None, :]
        total = tl.load(total_ptr + at, mask=tile, other=0.0)
        g = tl.load(dnormed_ptr + at, mask=tile, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(total * total, axis=1) / channels + eps)
        unit = total * scale[:, None]
        dweight += g * unit
        g = g * weight[None, :]
        along = tl.sum(g * unit, axis=1) / channels
        dsum = (g - unit * along[:, None]) * scale[:, None]
        if HAS_DTOTAL:
            dsum += tl.load(dtotal_ptr + at, mask=tile, other=0.0)
        tl.store(dsum_ptr + at, dsum, mask=tile)
    tl.store(partial_ptr + tl.program_id(0) * channels + d, tl.sum(dweight, axis=0), mask=ok)
