"""The optimizer's state by parameter name, the same on one process, under DDP and under every stage of ZeRO.

Each entry is a whole tensor `PARAMETER/KEY`; ZeRO's flat slices are put together and taken apart here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from launch.state.host_copies import host_copy


def whole_state(model: nn.Module, optimizer: Any, keep: bool) -> dict[str, Tensor]:
    """`host_copy`s where `keep`, empty elsewhere. For all processes.

    `optimizer` is a plain one, or the ZeRO optimizer of DeepSpeed.
    """
    tensors: dict[str, Tensor] = {}
    if not _is_zero(optimizer):
        for name, p in model.named_parameters():
            for key, value in optimizer.state.get(p, {}).items() if keep else ():
                tensors[f"{name}/{key}"] = host_copy(torch.as_tensor(value))
        return tensors
    from deepspeed.utils import safe_get_full_optimizer_state

    states = [entry for entry in optimizer.optimizer.state.values() if entry]
    if not states:
        return tensors
    _link_slices(optimizer)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # in one order everywhere: each key is an exchange, and processes in different orders would mix the averages up
        for key, value in sorted(states[0].items()):
            if isinstance(value, Tensor) and value.ndim:
                whole = safe_get_full_optimizer_state(p, key)
                assert whole is not None
                if keep:
                    tensors[f"{name}/{key}"] = host_copy(whole)
            elif keep:
                tensors[f"{name}/{key}"] = torch.as_tensor(value, dtype=torch.float32).clone()  # one count for all
    return tensors


def restore_state(model: nn.Module, optimizer: Any, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Put the tensors of `whole_state` back, `read(name)` giving each. For all processes, each reading all tensors."""
    names = sorted(names)
    parameters = dict(model.named_parameters())
    fused = bool(getattr(optimizer, "defaults", {}).get("fused"))  # such an optimizer counts its steps on the device
    if not _is_zero(optimizer):
        for name in names:
            parameter, _, key = name.rpartition("/")
            p, value = parameters[parameter], read(name)
            optimizer.state[p][key] = value.to(p.device) if fused or value.shape == p.shape else value
        return
    if not names:
        return
    scalars = {name.rpartition("/")[2]: value for name in names if (value := read(name)).ndim == 0}
    keys = sorted({name.rpartition("/")[2] for name in names} - scalars.keys())
    counts_in_ints = "CPUAdam" in type(optimizer.optimizer).__name__
    for flat in _flat_parts(optimizer):
        fresh = {
            key: int(value) if counts_in_ints else value.to(flat.device if fused else "cpu", copy=True)
            for key, value in scalars.items()
        }
        optimizer.optimizer.state[flat] = fresh | {key: torch.zeros_like(flat) for key in keys}
    _link_slices(optimizer)
    for name in names:
        parameter, _, key = name.rpartition("/")
        if key in keys:
            _fill_slice(parameters[parameter], key, read(name).to(_flat_parts(optimizer)[0].device))


def _is_zero(optimizer: Any) -> bool:
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat")


def _link_slices(optimizer: Any) -> None:
    """Show ZeRO-1 and -2 which slice of the state is whose; by itself it does so when only the first group has any."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _fill_slice(p: Any, key: str, whole: Tensor) -> None:
    """Keep this process's slice of one whole tensor of the state."""
    if not hasattr(p, "ds_id"):
        p.set_full_hp_param(whole, key)
        return
    # DeepSpeed's own way fails where the size does not divide by the processes, which it pads when it spreads
    size, rank = p.ds_tensor.numel(), dist.get_rank(p.ds_process_group)
    part = whole.flatten()[size * rank : size * (rank + 1)]
    p._z3_optimizer.set_local_hp_param(F.pad(part, (0, size - part.numel())), p, key)


def _flat_parts(optimizer: Any) -> list[Tensor]:
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_partitioned_groups_flat
