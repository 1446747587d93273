"""Copies of tensors in CPU memory, for a checkpoint that is written while the training goes on."""

import torch
from torch import Tensor


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in CPU memory, apart from the graph; of a GPU's tensor it is whole after `finish_copies`.

    A GPU copies into pinned memory, of which PyTorch keeps what is free, so that the next checkpoint finds it.
    """
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def finish_copies() -> None:
    """Wait for the copies that a GPU is making."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
