"""What the Gluon kernels share: names that changed between releases of Triton, and where a chunk lies."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Two names changed between Triton 3.6 and 3.9.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_descriptor = gl.shared_memory_descriptor
view_of = _descriptor.reinterpret if hasattr(_descriptor, "reinterpret") else _descriptor._reinterpret


@gluon.jit
def chunk_rows(
    chunk, table_ptr, length, chunk_size, chunks_per_sequence, slots_per_sequence,
    INTERVAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """See `scan_forward.chunk_rows`."""
    if PACKED:
        first = gl.load(table_ptr + chunk * 3).to(gl.int64)
        count = gl.load(table_ptr + chunk * 3 + 1)
        slot = gl.load(table_ptr + chunk * 3 + 2).to(gl.int64)
    else:
        sequence = chunk // chunks_per_sequence
        start = (chunk % chunks_per_sequence) * chunk_size
        first = sequence.to(gl.int64) * length + start
        count = gl.minimum(chunk_size, length - start)
        slot = sequence.to(gl.int64) * slots_per_sequence + start // INTERVAL
    return first, count, slot


@gluon.jit
def reciprocal(v):
    """One instruction to one unit in the last place, where a division takes eight."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=gl.float32, is_pure=True, pack=1)
