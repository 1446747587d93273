"""benchmarks.one_picture where a process is out of memory at 96 pixels: OUT_OF_MEMORY is NET:RANK."""

import os

import torch

from benchmarks import one_picture

NET, RANK = os.environ["OUT_OF_MEMORY"].split(":")


def spoil(model, grid, *args):
    """For `embed_by_window`, which takes the rows of a stretch too."""
    net = "ranks" if len(args) > 2 else "row"
    if (net, os.environ["RANK"], grid) == (NET, RANK, (6, 6)):
        if not torch.cuda.is_available():
            raise torch.OutOfMemoryError("planted")
        torch.empty(2**45, device="cuda")
    return original(model, grid, *args)


original, one_picture.embed_by_window = one_picture.embed_by_window, spoil

if __name__ == "__main__":
    one_picture.main()
