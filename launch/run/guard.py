"""Steps that must not be taken: a loss or gradient that is not finite, a loss far above the recent ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

from vim_backbone.errors import require

WINDOW = 64
"""Good steps whose median loss is what a spike is measured against."""
LOWERED_STEPS = 100
"""Steps for which a bad step keeps the learning rate halved, with `on_bad_step: lower`."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do about a bad step. It is never taken: parameters and optimizer stay as they were."""

    on_bad_step: Literal["skip", "lower", "stop"] = "skip"
    """skip: go on with the next batch. lower: also halve the learning rate for 100 steps. stop: save and end the run.
    All write the step and its pictures to bad_steps.jsonl."""
    spike: float = 0.0
    """A loss above this multiple of the median of the last 64 good steps is bad, such as 3; 0 looks for nan and inf."""
    max_bad_steps: int = 10
    """Bad steps in a row that end the run whatever on_bad_step says."""

    @property
    def looks_back(self) -> bool:
        """Whether what is done with a step depends on the losses of those before it."""
        return bool(self.spike) or self.on_bad_step == "lower"

    def __post_init__(self) -> None:
        require(self.spike == 0 or self.spike > 1, "guard.spike", self.spike, "it must be 0 or more than 1")
        require(self.max_bad_steps >= 1, "guard.max_bad_steps", self.max_bad_steps, "it must be at least 1")


class Guard:
    """Checks each step by numbers that all processes share, so that all come to the same result."""

    def __init__(self, config: GuardConfig, saved: dict[str, Any] | None = None) -> None:
        self.config = config
        self.losses: list[float] = list((saved or {}).get("losses", []))
        self.bad: list[int] = list((saved or {}).get("bad", []))
        self.in_a_row: int = (saved or {}).get("in_a_row", 0)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as plain data."""
        return {"losses": self.losses, "bad": self.bad, "in_a_row": self.in_a_row}

    def wrong(self, loss: float, grad_norm: float | None) -> str | None:
        """What is wrong with a step, None for a good one."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"its gradient norm is {grad_norm}"
        usual = median(self.losses) if len(self.losses) >= WINDOW // 4 else math.inf
        if self.config.spike and loss > self.config.spike * usual:
            return f"its loss {loss:.4g} is over {self.config.spike:g} times the usual {usual:.4g}"
        return None

    def note(self, step: int, loss: float, bad: bool) -> None:
        """Take a checked step into account."""
        if bad:
            self.bad = [*(s for s in self.bad if step - s < LOWERED_STEPS), step]
            self.in_a_row += 1
        else:
            self.losses = [*self.losses[1 - WINDOW :], loss]
            self.in_a_row = 0

    def must_stop(self) -> bool:
        """Whether the bad step just noted ends the run."""
        return self.config.on_bad_step == "stop" or self.in_a_row >= self.config.max_bad_steps

    def rate_factor(self, step: int) -> float:
        """What the learning rate of a step is multiplied with."""
        if self.config.on_bad_step != "lower":
            return 1.0
        return 0.5 ** sum(step - bad < LOWERED_STEPS for bad in self.bad)


def take_only(optimizer: torch.optim.Optimizer, is_good: Callable[[], bool]) -> None:
    """Let the optimizer change nothing where `is_good()` is False when its step begins.

    For an optimizer inside ZeRO, which computes the gradient's norm and takes the step at one go. Its gradients are
    hidden and not dropped, because offloading keeps them in buffers of its own.
    """
    hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def hide(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if not is_good():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            hidden.extend((p, p.grad) for p in parameters)
            for p in parameters:
                p.grad = None

    def restore(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        for p, gradient in hidden:
            p.grad = gradient
        hidden.clear()

    optimizer.register_step_pre_hook(hide)
    optimizer.register_step_post_hook(restore)
