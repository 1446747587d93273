"""What one process holds while it trains: parameters, gradients and optimizer by strategy, activations by sizes."""

from dataclasses import dataclass

import torch
from torch import nn

from launch.run.accelerator import BUCKET
from vim_backbone import VimConfig
from vim_backbone.block import Block
from vim_backbone.memory import FLOAT as FLOAT
from vim_backbone.memory import Recompute, block_backward_bytes, block_saved_bytes


@dataclass(frozen=True)
class Stack:
    """Blocks in a row, and the tokens of one picture that they scan."""

    config: VimConfig
    tokens: int
    recompute: Recompute = "inputs"
    """What of a block the backward pass makes again."""
    apart: bool = False
    """Each token is scanned twice, once in each direction, by blocks whose directions are apart."""


@dataclass(frozen=True)
class Work:
    """What one picture costs a model."""

    stacks: tuple[Stack, ...]
    """In the order of the forward pass."""
    ends: float
    """Bytes that are saved outside of them."""
    freed: float = 0.0
    """Of these, what a decoder without blocks has given back before the backward pass of the blocks begins."""
    ends_backward: float = 0.0
    """Bytes that the backward pass of such a decoder needs beside what was saved."""
    frozen: float = 0.0
    """Bytes of a model that is not trained, such as a teacher: whole on every process, however many pictures there
    are. Its forward pass comes first and leaves nothing but what `ends` has."""
    frozen_forward: float = 0.0
    """Bytes of one picture at the height of that pass."""


@dataclass(frozen=True)
class Footprint:
    """Numbers of parameters, and bytes of activations of one picture."""

    parameters: int
    trained: int
    block: int
    """Parameters of the largest block; ZeRO-3 holds one whole while it fetches the next."""
    outside: int
    """Parameters outside of the blocks, which ZeRO-3 holds whole for the length of a pass."""
    saved: float
    """Bytes that the forward pass of a picture leaves for the backward pass."""
    first_backward: float
    """Bytes that the first block of the backward pass needs beside them."""
    last_backward: float
    """The same of its last block, when all gradients are there."""
    casts: float
    """Bytes of the weights in 16 bits, kept for a whole step."""
    frozen: float = 0.0
    """Bytes of a model that is not trained."""
    frozen_forward: float = 0.0
    """Bytes of one picture at the height of its forward pass, before all others."""


def footprint(model: nn.Module, work: Work, dtype: torch.dtype, backend: str = "triton") -> Footprint:
    """Of a model, which may be on the meta device, and of what one picture costs it.

    Args:
        dtype: of the products; parameters are float32.
        backend: fast backend of `vim_kernels` that runs the scans.
    """

    def saved_by_block(stack: Stack, recompute: Recompute) -> float:
        return block_saved_bytes(stack.config, backend, dtype, stack.tokens, recompute, apart=stack.apart)

    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block)]
    saved = work.ends
    for stack in work.stacks:
        saved += saved_by_block(stack, stack.recompute) * stack.tokens * stack.config.depth

    def backward(stack: Stack) -> float:
        if stack.apart:  # one direction after the other; of a whole mixer that is made again both are there
            again = saved_by_block(stack, "none") - saved_by_block(stack, stack.recompute)
            again = again if stack.recompute == "products" else again / 2
            return (block_backward_bytes(stack.config, backend, dtype, stack.tokens) / 2 + again) * stack.tokens
        # of what is made again, block_backward_bytes has the inputs of the scan
        again = saved_by_block(stack, "inputs") - saved_by_block(stack, stack.recompute)
        return (block_backward_bytes(stack.config, backend, dtype, stack.tokens) + again) * stack.tokens

    return Footprint(
        parameters=parameters,
        trained=trained,
        block=max(sizes),
        outside=parameters - sum(sizes),
        saved=saved,
        first_backward=max(work.ends_backward, backward(work.stacks[-1]) - work.freed),
        last_backward=backward(work.stacks[0]),
        casts=2 * trained if dtype.itemsize == 2 else 0,
        frozen=work.frozen,
        frozen_forward=work.frozen_forward,
    )


@dataclass(frozen=True)
class Share:
    """Bytes on one of `processes`, by strategy, without activations, and what one step sends."""

    strategy: str
    parameters: float
    gradients: float
    early: float
    """Those of the gradients that take their place before the backward pass has made any."""
    optimizer: float
    sent: float

    @property
    def total(self) -> float:
        """All of them, as at the end of the backward pass."""
        return self.parameters + self.gradients + self.optimizer


def shares(model: Footprint, processes: int) -> list[Share]:
    """The strategies, in the order of what they hold, for float32 parameters and AdamW.

    DDP's gradients lie in its buckets for good. DeepSpeed keeps its own copy of the share of the parameters that it
    updates, counted with the optimizer, and a buffer of gradients to send, counted with the gradients. Sent is what one
    process sends in ring collectives: gradients are reduced and parameters or gradients gathered, (n - 1) / n of the
    model each; ZeRO-3 gathers the parameters twice.
    """
    n, total, trained = processes, float(model.parameters * FLOAT), float(model.trained * FLOAT)
    hop, bucket = (n - 1) / n * trained, float(min(BUCKET * FLOAT, trained))
    whole = FLOAT * (model.outside + 2 * model.block)
    part = trained / n
    return [
        Share("ddp", total, trained, trained if n > 1 else 0.0, 2 * trained, 2 * hop),
        Share("zero1", total, trained + bucket, bucket, 3 * part, 2 * hop),
        Share("zero2", total, part + bucket, bucket, 3 * part, 2 * hop),
        Share("zero3", total / n + whole, part + bucket, part + bucket, 3 * part, 3 * hop),
    ]


def peak(model: Footprint, share: Share, pictures: int) -> float:
    """Most bytes at a time while a process trains on so many pictures at once.

    Either at the start of the backward pass, when all activations are there, or at its end, when all gradients are.
    """
    start = share.early + pictures * (model.saved + model.first_backward)
    end = share.gradients + pictures * model.last_backward
    busiest = max(start, end, pictures * model.frozen_forward)
    return share.parameters + share.optimizer + model.casts + model.frozen + busiest


def fitting(model: Footprint, share: Share, memory: float) -> int:
    """Pictures of one forward pass that fit into so many bytes; 0 where none does."""
    most = 0
    while peak(model, share, 2 * most or 1) <= memory:
        most = 2 * most or 1
    step = most
    while step := step // 2:
        most += step if peak(model, share, most + step) <= memory else 0
    return most
