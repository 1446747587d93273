"""AdamW with the right parameters undecayed, and the learning-rate schedule as a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from launch.state.sharding import shape_of
from vim_backbone.errors import require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, base learning rate scaled by batch / 256, linear warm-up, cosine decay."""

    base_lr: float = 1.5e-4
    """Learning rate per 256 images of a step; the rate used is base_lr * batch_size / 256."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay; norms, biases, tokens, positions, A and D have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors."""
    clip_grad: float = 0.0
    """Largest gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        require(self.base_lr > 0, "optim.base_lr", self.base_lr, "it must be positive")
        require(self.min_lr >= 0, "optim.min_lr", self.min_lr, "it cannot be negative")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "it cannot be negative")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "it cannot be negative")
        require(self.clip_grad >= 0, "optim.clip_grad", self.clip_grad, "it cannot be negative")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "each must lie in [0, 1)")

    def peak(self, batch_size: int) -> float:
        """The highest rate, at the end of the warm-up."""
        return self.base_lr * batch_size / 256


def build_optimizer(
    model: nn.Module, config: OptimConfig, batch_size: int, scale_of: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; `model.no_weight_decay()` names those of two axes or more to leave alone.

    `scale_of` gives the factor on the learning rate of a parameter by its name; groups keep it as `lr_scale`.
    """
    undecayed = model.no_weight_decay() if callable(getattr(model, "no_weight_decay", None)) else set()  # pyright: ignore
    # as timm's param_groups_weight_decay, which takes a parameter that ZeRO-3 has spread out for one of no axis
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = len(shape_of(p)) > 1 and name not in undecayed
            groups.setdefault((scale_of(name) if scale_of else 1.0, decayed), []).append(p)
    options = [
        {"params": groups[scale, decayed], "weight_decay": config.weight_decay * decayed, "lr_scale": scale}
        for scale, decayed in sorted(groups)
    ]
    # one kernel for a step, a third of the time of PyTorch's own choice on a GPU, an eighth on a CPU
    return torch.optim.AdamW(options, lr=config.peak(batch_size), betas=config.betas, fused=True)


def learning_rate(step: int, config: OptimConfig, batch_size: int, total_steps: int) -> float:
    """The rate of step 0 .. total_steps - 1: linear warm-up, then cosine from the peak to min_lr."""
    peak = config.peak(batch_size)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (peak - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate, times its own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
