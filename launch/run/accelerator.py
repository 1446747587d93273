"""One Accelerator for every launcher, and refusals where a launcher would silently train unsynchronised copies."""

import importlib
import os
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch import Tensor, nn

from launch.run.config import RunConfig
from launch.state.sharding import shape_of, zero_stage
from vim_backbone.errors import UserError

Result = TypeVar("Result")
BUCKET = 50_000_000
"""Gradients that ZeRO sends at a time, at most."""


class ZeroPlugin(DeepSpeedPlugin):
    """Accelerate's settings of DeepSpeed, without its link to transformers, which a run here does not need."""

    def set_deepspeed_weakref(self) -> None:
        """Nothing: transformers' models alone look for it."""


class SilentError(UserError):
    """A user's error that the main process prints; the others end with it in silence."""


def build_accelerator(config: RunConfig, accumulation: int) -> Accelerator:
    """The Accelerator of this process, whether started by python, torchrun or accelerate launch.

    Raises UserError where the launcher asked for what is not there, or for what Accelerate did not set up.
    """
    refuse_what_is_missing()
    zero = _is_set("ACCELERATE_USE_DEEPSPEED")
    # gradients that are views of DDP's buckets, not copies
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if "LOCAL_RANK" in os.environ:
        backend = "nccl" if torch.cuda.is_available() and not _is_set("ACCELERATE_USE_CPU") else "gloo"
        # longer than the watchdog, which can name the process that hangs
        timeout = timedelta(seconds=2 * max(config.hang_seconds, config.start_seconds) + 60)
        if zero and backend == "gloo":
            compile_no_communication()
        join_attempt(backend, timeout)
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    plugin = ZeroPlugin() if zero else None
    accelerator = Accelerator(
        # DeepSpeed's own bf16 casts the parameters; its torch_autocast, set below, leaves them float32
        mixed_precision="bf16" if config.precision == "bf16" and not zero else "no",
        gradient_accumulation_steps=accumulation,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(config.folder), logging_dir=str(config.folder)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        kwargs_handlers=handlers,
        deepspeed_plugin=plugin,
        step_scheduler_with_optimizer=False,
    )
    kind = str(accelerator.distributed_type).split(".")[-1]
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started or (started > 1 and kind == "NO"):
        raise _printed_once(
            f"the launcher started {started} processes but Accelerate sees {accelerator.num_processes} ({kind}): "
            "on CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or use --use_deepspeed"
        )
    for variable, strategy in (("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if _is_set(variable) and kind != strategy:
            raise _printed_once(
                f"the launcher asked for {strategy} but Accelerate set up {kind}: unset ACCELERATE_USE_CPU"
            )
    return accelerator


def refuse_what_is_missing() -> None:
    """Raise UserError where the launcher's environment asks for a package or a GPU that is not there.

    All processes of a host come to the same answer; the first process prints it.
    """
    wrong = _missing()
    if wrong is not None:
        raise _printed_once(wrong)


def _printed_once(wrong: str) -> UserError:
    """For what every process finds out by itself: the first one prints it."""
    return (UserError if os.environ.get("RANK", "0") == "0" else SilentError)(wrong)


def _missing() -> str | None:
    launched, local_world = "LOCAL_RANK" in os.environ, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_cpu = _is_set("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        if find_spec("deepspeed") is None:
            return "the launcher asked for DeepSpeed, which is not installed: pip install deepspeed"
        if _is_set("ACCELERATE_USE_CPU"):
            return "ACCELERATE_USE_CPU makes Accelerate run DDP in place of DeepSpeed: unset it"
    if _is_set("ACCELERATE_USE_FSDP") and on_cpu:
        return "Accelerate does not run FSDP on CPU: use launch/accelerate/zero3.yaml"
    if on_cpu and not _is_set("ACCELERATE_USE_CPU") and (visible := os.environ.get("CUDA_VISIBLE_DEVICES")):
        return f"CUDA_VISIBLE_DEVICES asks for GPU {visible} but PyTorch finds none: unset it, or mend the driver"
    if not on_cpu and local_world > torch.cuda.device_count():
        return (
            f"{local_world} processes were started on this host but it has {torch.cuda.device_count()} GPU(s): "
            "lower num_processes, or set CUDA_VISIBLE_DEVICES"
        )
    if launched and not on_cpu and not dist.is_nccl_available():
        return "this build of PyTorch has no NCCL: install one that has, or train on CPU with use_cpu: true"
    return None


def compile_no_communication() -> None:
    """Keep DeepSpeed from compiling exchanges through shared memory, which training does not use (inference does).

    It does so at every first start on CPU if its table of operations has that one, and would need a C++ compiler.
    """
    vars(importlib.import_module("deepspeed.ops"))["__compatible_ops__"] = defaultdict(bool)


def join_attempt(backend: str, timeout: timedelta) -> None:
    """Meet the other processes of this attempt of torchrun, and of no earlier one (`--max_restarts`).

    torchrun's static rendezvous keeps one store for all attempts, and PyTorch (2.15) puts nothing of the attempt into
    its keys: processes started again find the addresses of dead ones, and hang or are refused.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, world, is_master=False, timeout=timeout)  # pyright: ignore
    attempt = dist.distributed_c10d.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world, timeout=timeout)


def configure_zero(accelerator: Accelerator, precision: str, micro_batch: int, clip_grad: float) -> None:
    """Fill in the DeepSpeed config what the run knows; without DeepSpeed, nothing."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    config: dict[str, Any] = plugin.deepspeed_config
    if plugin.zero_stage == 0:
        raise UserError("zero_stage is 0, which is DDP: use launch/accelerate/ddp.yaml, or stage 1, 2 or 3")
    for section in ("bf16", "fp16"):
        if config.get(section, {}).get("enabled") is True:
            raise UserError(
                f"the DeepSpeed config enables {section}, which casts the parameters: use --precision bf16 instead"
            )
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["gradient_clipping"] = clip_grad
    # DeepSpeed would compile an optimizer of its own for what is offloaded, no faster on CPU than PyTorch's fused one
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.pop("train_batch_size", None)
    # blocks are collected whole, so that keeping their small tensors everywhere would save nothing
    config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    config["torch_autocast"] = {
        "enabled": precision == "bf16",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],  # gradients travel in float32, as they do under DDP
    }


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What a training step of this precision runs under, for what is evaluated outside of it, on any strategy.

    `Accelerator.autocast` does nothing under DeepSpeed, which is told of the precision by `configure_zero` alone.
    """
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16")


def gather_in_order(accelerator: Accelerator, numbers: Tensor, *values: Tensor) -> list[Tensor]:
    """Numbers of samples (n,) of all processes, rising, and their values; without those whose number is negative."""
    shares: Any = [accelerator.gather(accelerator.pad_across_processes(s, pad_index=-1)) for s in (numbers, *values)]
    order = shares[0].argsort()[(shares[0] < 0).sum() :]
    return [share[order] for share in shares]


def fit_buffers(accelerator: Accelerator, model: nn.Module, unit: type[nn.Module]) -> None:
    """Sizes of DeepSpeed's buffers for this model, where the config does not give them.

    Its own are for larger models: 500 M gradients waiting to be sent, 2 GB on every process whatever the model, and
    under ZeRO-3 up to 1,000 M parameters kept whole for use again, which is all of Vim-H between its two passes.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    zero = plugin.deepspeed_config["zero_optimization"]
    whole = sum(shape_of(p).numel() for p in model.parameters())
    trained = sum(shape_of(p).numel() for p in model.parameters() if p.requires_grad)
    zero.setdefault("reduce_bucket_size", min(BUCKET, trained))
    units = [sum(shape_of(p).numel() for p in m.parameters()) for m in model.modules() if isinstance(m, unit)]
    if plugin.zero_stage == 3:
        zero.setdefault("stage3_max_reuse_distance", 0)
        zero.setdefault("stage3_prefetch_bucket_size", max(units))
        zero.setdefault("stage3_max_live_parameters", whole - sum(units) + 2 * max(units))


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """The result of `work`, done by the main process alone, or its UserError, on all processes."""
    return on_first(accelerator.is_main_process, work, broadcast_object_list)


def on_first(first: bool, work: Callable[[], Result], broadcast: Callable[[list[Any]], object]) -> Result:
    """As `on_main`: whether this is the process that works, and what hands its list to all others, in place."""
    outcome: list[Any] = [None, None]
    if first:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    broadcast(outcome)
    if outcome[1] is not None:
        raise (UserError if first else SilentError)(outcome[1])
    return outcome[0]


def strategy(accelerator: Accelerator) -> str:
    """The strategy in a word or two."""
    if stage := zero_stage(accelerator):
        return f"ZeRO-{stage}"
    return "DDP" if accelerator.num_processes > 1 else "alone"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
