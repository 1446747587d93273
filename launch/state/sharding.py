"""Models that ZeRO-3 spreads over processes: built block by block, then read and filled one whole tensor at a time.

Everything here serves an ordinary model as well, so that the code of a run does not ask which strategy it has. What is
said to be for all processes must be called by all of them, because ZeRO-3 collects a tensor from all.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from launch.state.host_copies import finish_copies, host_copy


def zero_stage(accelerator: Accelerator) -> int:
    """Stage of ZeRO, 0 without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return int(plugin.zero_stage) if plugin is not None else 0


def shape_of(p: Tensor) -> torch.Size:
    """Shape of a parameter, also while it is spread over processes."""
    return getattr(p, "ds_shape", p.shape)


def local_part(p: Tensor) -> Tensor:
    """What this process keeps of a parameter between steps: its shard, or all of it."""
    return getattr(p, "ds_tensor", p).data


def gathered(p: Tensor, *, write: bool = False) -> AbstractContextManager[Any]:
    """The parameter whole inside the block; with `write`, the main process's change reaches all shards."""
    if not hasattr(p, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([p], modifier_rank=0 if write else None)


def build_sharded(accelerator: Accelerator, build: Callable[[], nn.Module], unit: type[nn.Module]) -> nn.Module:
    """The model that `build` makes; under ZeRO-3 each `unit` is spread over the processes before the next is made.

    All processes draw the same weights, so that a shard is a slice of what one process alone would have. `unit`s are
    collected and let go as one; what is outside of them is collected for the model's whole `forward`.
    """
    if zero_stage(accelerator) != 3:
        return build()
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    plugin: Any = accelerator.state.deepspeed_plugin
    config = {key: value for key, value in plugin.deepspeed_config.items() if value != "auto"}

    def spread(module: nn.Module) -> None:
        deepspeed.zero.Init(module=module, config_dict_or_path=config, mem_efficient_linear=False)

    def on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        del parent, name
        if isinstance(module, unit):
            spread(module)

    handle = register_module_module_registration_hook(on_registration)
    try:
        model = build()
    finally:
        handle.remove()
    spread(model)
    set_z3_leaf_modules(model, [unit])
    inside = {id(p) for module in model.modules() if isinstance(module, unit) for p in module.parameters()}
    for module in model.modules():  # each that is called by itself, as the encoder is outside of a training step
        if not isinstance(module, unit) and any(isinstance(part, unit) for part in module.modules()):
            for p in module.parameters():
                if id(p) not in inside:
                    deepspeed.zero.register_external_parameter(module, p)
    return model


def whole_tensors(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict as `host_copy`s where `keep`, empty elsewhere. For all processes."""
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered(value):
            if keep:
                tensors[name] = host_copy(value)
                if hasattr(value, "ds_id"):
                    finish_copies()  # ZeRO-3 frees what it collected
    return tensors


@torch.no_grad()
def fill(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Put `read(name)` into every tensor of the state dict. For all processes."""
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered(value, write=True):
            value.copy_(read(name))


class WeightAverage:
    """An exponential average of a model's parameters, each process keeping that of its own part of them.

    The factor warms up as 1 - step^(-2/3) until it reaches `decay`, as timm's ModelEmaV3 has it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._values = {name: local_part(p).clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters as they are after optimiser step `step`, counted from 1."""
        decay = min(self.decay, 1 - max(1, step) ** (-2 / 3))
        for name, p in self._parameters.items():
            self._values[name].lerp_(local_part(p).to(self._values[name].device), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._parameters.items():
            part = local_part(p)
            current = part.clone()
            part.copy_(self._values[name])
            self._values[name].copy_(current)
