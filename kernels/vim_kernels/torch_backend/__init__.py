"""The ops in plain PyTorch, as fast as that gets, forward and backward: for CPUs where Numba is not installed."""

import torch


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001 - one signature for all backends
    """Runs wherever PyTorch does."""
    return None
