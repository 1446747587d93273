"""What the gradients of a mixer lose where the states that a forward pass saves are rounded or lie further apart.

`python -m benchmarks.saved_states` prints, for float32 and bfloat16 tokens, the largest relative RMS error of the
gradients of the torch backend against the reference in float64, for states of three dtypes every 16 to 128 tokens.
"""

import argparse

import torch
from torch import Tensor

from vim_kernels import ScanWeights, reference
from vim_kernels.dispatch.contract import BidirectionalScan
from vim_kernels.torch_backend import mixer, recurrence

STATES = (torch.float32, torch.float16, torch.bfloat16)
INTERVALS = (16, 32, 64, 128)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, channels: int, states: int = 16, rank: int = 12) -> ScanWeights:
    """Of one direction: decays and time steps spread as a trained model's."""
    return ScanWeights(
        conv_weight=draw(channels, 4, seed=seed),
        conv_bias=draw(channels, seed=seed + 1),
        x_proj=draw(rank + 2 * states, channels, seed=seed + 2) / channels**0.5,
        dt_proj=draw(channels, rank, seed=seed + 3) / rank**0.5,
        dt_bias=draw(channels, seed=seed + 4) - 2,
        A_log=draw(channels, states, seed=seed + 5) / 2 + 1,
        D=draw(channels, seed=seed + 6),
    )


def exact_gradients(arguments: BidirectionalScan, dy: Tensor) -> list[Tensor]:
    """In float64: of xz, then of the parameters of both directions."""
    leaves = [t.double().requires_grad_() for t in (arguments.xz, *arguments.forward, *arguments.backward)]  # pyright: ignore[reportOptionalMemberAccess]
    count = len(ScanWeights._fields)
    two = ScanWeights(*leaves[1 : 1 + count]), ScanWeights(*leaves[1 + count :])
    y = reference.bidirectional_scan(leaves[0], *two, gated=True, cu_seqlens=None)
    return list(torch.autograd.grad(y, leaves, dy.double()))


def worst_error(arguments: BidirectionalScan, dy: Tensor, exact: list[Tensor], states: torch.dtype) -> float:
    """Largest relative RMS error of a gradient, with saved states rounded to `states`."""
    _, saved = mixer.bidirectional_scan_forward(arguments, save=True)
    saved = [each.to(states).float() for each in saved]
    made = mixer.bidirectional_scan_backward(arguments, dy, saved)
    pairs = zip((made.xz, *made.forward, *made.backward), exact, strict=True)
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs if got is not None)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1025, help="tokens of a picture")
    parser.add_argument("--channels", type=int, default=64)
    options = parser.parse_args()
    for tokens in (torch.float32, torch.bfloat16):
        xz = draw(2, options.length, 2 * options.channels, seed=0).to(tokens)
        two = weights(10, options.channels), weights(20, options.channels)
        arguments = BidirectionalScan(xz, *two, cu_seqlens=None, gaps=None, gated=True)
        dy = draw(2, options.length, options.channels, seed=1).to(tokens)
        exact = exact_gradients(arguments, dy)
        print(f"\n{tokens} tokens\n| states | " + " | ".join(f"every {interval}" for interval in INTERVALS) + " |")
        print("|---" * (len(INTERVALS) + 1) + "|")
        for states in STATES:
            errors = []
            for interval in INTERVALS:
                recurrence.TILE = interval
                errors.append(f"{worst_error(arguments, dy, exact, states):.2e}")
            print(f"| {states} | " + " | ".join(errors) + " |", flush=True)


if __name__ == "__main__":
    main()
