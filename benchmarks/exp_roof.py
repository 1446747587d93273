"""How many exponentials a second a GPU makes from registers: the roof of the scan."""

# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl

PROGRAMS, STEPS, LANES = 4096, 512, 1024


@triton.jit
def _exp_kernel(out_ptr, STEPS: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    x = lane * 1e-4
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + tl.program_id(0) * LANES + lane, x)


def run() -> None:
    """PROGRAMS x LANES chains of STEPS exponentials."""
    out = torch.empty(PROGRAMS * LANES, device="cuda")
    _exp_kernel[(PROGRAMS,)](out, STEPS, LANES, num_warps=4)


def total() -> float:
    """Exponentials of one `run`."""
    return float(PROGRAMS * STEPS * LANES)
