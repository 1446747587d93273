"""Hands a tensor to a module that is the last to need it, so that its memory is free as soon as it is used up.

A caller's arguments live as long as the call. Out of a list they can be taken: a forward pass without gradients then
keeps nothing of a block's input while the scan runs, which takes most memory. With gradients, where autograd keeps what
it needs in any case, and for a module with hooks, which may want to look at its input, arguments stay plain tensors.
"""

from typing import TypeVar, cast

import torch
from torch import nn

T = TypeVar("T")
Handed = T | list[T]
"""A value, or a list from which it is taken."""


def hand_over(value: T, module: nn.Module) -> Handed[T]:
    """To be passed to `module` in place of `value`, of which the caller keeps nothing."""
    return value if torch.is_grad_enabled() or hooked(module) else [value]


def take(handed: Handed[T]) -> T:
    """What was passed."""
    return cast(T, handed.pop() if isinstance(handed, list) else handed)


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what comes into or out of the module, and may keep it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
