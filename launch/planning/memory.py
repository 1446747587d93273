"""What one process holds while it pretrains: parameters, gradients and optimizer by strategy, activations by sizes.

It counts a masked autoencoder without knowing it: encoder blocks over the visible tokens, decoder blocks over all.
Shape letters: d width, e inner width, n states, r rank of dt, l patches, v visible tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from launch.run.accelerator import BUCKET
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.block import Block

FLOAT = 4
BACKWARD_FLOATS = 8
"""Numbers a token and inner channel that the backward pass of a block needs beside what was saved, on any backend: the
recomputed convolutions and the gradients of both directions. Measured: 7.7 on CPU, 8.0 on an H200."""


@dataclass(frozen=True)
class Task:
    """What is pretrained: the backbone, how much of a picture it sees, and the decoder."""

    encoder: VimConfig
    mask_ratio: float = 0.75
    decoder_width: int = 512
    decoder_depth: int = 2
    half: bool = True
    """Products in bfloat16 (`precision: bf16`)."""
    recompute: bool = False
    """Blocks of the encoder are computed again in the backward pass (`model.grad_checkpointing`)."""
    gpu: bool = True
    """The Triton backend, which saves the sum before the gate, and not projections as the CPU's does."""

    @property
    def patches(self) -> int:
        """Of a picture."""
        rows, columns = self.encoder.grid(*self.encoder.img_size)
        return rows * columns

    @property
    def visible(self) -> int:
        """Tokens of the encoder: the patches that are not hidden, class token and registers."""
        return self.patches - round(self.patches * self.mask_ratio) + self.special

    @property
    def special(self) -> int:
        """Tokens that are no patches."""
        return (self.encoder.class_token != "none") + self.encoder.num_registers


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
    decoder_backward: float
    """Bytes that the first block of the backward pass needs beside them."""
    encoder_backward: float
    """The same of its last block, when all gradients are there."""
    casts: float
    """Bytes of the weights in 16 bits, kept for a whole step."""


def footprint(task: Task) -> Footprint:
    """Counted on the model itself, on the meta device, and from the sizes of what its blocks save."""
    config, l, w = task.encoder, task.patches, task.decoder_width
    decoder = VimConfig(d_model=w, depth=task.decoder_depth, norm_eps=config.norm_eps)
    with torch.device("meta"):
        encoder = VisionMamba(config)
        blocks = nn.ModuleList(Block(decoder, drop_path=0.0) for _ in range(task.decoder_depth))
    pixels = config.patch_size**2 * config.in_chans
    head = (config.d_model + 1) * w + 2 * w + (w + 1) * pixels  # embedding, mask token and norm, prediction
    trained = sum(p.numel() for p in (*encoder.parameters(), *blocks.parameters()) if p.requires_grad) + head
    fixed = sum(p.numel() for p in encoder.parameters() if not p.requires_grad) + l * w
    sizes = [sum(p.numel() for p in m.parameters()) for m in (*encoder.modules(), *blocks) if isinstance(m, Block)]

    half = 2 if task.half else FLOAT
    kept = (half + FLOAT) * config.d_model if task.recompute else saved_by_block(config, task.half, task.gpu)
    hidden = l - task.visible + task.special
    ends = FLOAT * (task.visible * config.d_model + 2 * l * w + 2 * hidden * pixels) + half * hidden * (w + pixels)
    saved = kept * task.visible * config.depth + saved_by_block(decoder, task.half, task.gpu) * l * decoder.depth + ends
    again = saved_by_block(config, task.half, task.gpu) if task.recompute else 0
    return Footprint(
        parameters=trained + fixed,
        trained=trained,
        block=max(sizes),
        outside=trained + fixed - sum(sizes),
        saved=saved,
        decoder_backward=BACKWARD_FLOATS * FLOAT * l * decoder.d_inner,
        encoder_backward=(BACKWARD_FLOATS * FLOAT * config.d_inner + again) * task.visible,
        casts=2 * trained if task.half else 0,
    )


def saved_by_block(config: VimConfig, half: bool, gpu: bool) -> float:
    """Bytes a token: residual stream, input of in_proj, its output, what the scan saves, input of out_proj.

    The scan saves a state every 32 tokens for both directions; docs/kernels.md and docs/kernels-cpu.md have the rest.
    """
    d, e, n, size = config.d_model, config.d_inner, config.d_state, 2 if half else FLOAT
    filled_up = -(-(config.dt_rank + 2 * n) // 16) * 16
    scan = 2 * FLOAT * e * n / 32 + (size * e if gpu else 2 * FLOAT * filled_up)
    return FLOAT * d + size * d + size * 2 * e + scan + size * e


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
    def held(self) -> float:
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
    start = share.early + pictures * (model.saved + model.decoder_backward)
    end = share.gradients + pictures * model.encoder_backward
    return share.parameters + share.optimizer + model.casts + max(start, end)


def fitting(model: Footprint, share: Share, memory: float) -> int:
    """Pictures of one forward pass that fit into so many bytes; 0 where none does."""
    most = 0
    while peak(model, share, 2 * most or 1) <= memory:
        most = 2 * most or 1
    step = most
    while step := step // 2:
        most += step if peak(model, share, most + step) <= memory else 0
    return most
