"""One Accelerator for every launcher, and refusals where a launcher would silently train unsynchronised copies."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration

from launch.config import RunConfig
from vim_backbone.errors import UserError


def build_accelerator(config: RunConfig, accumulation: int) -> Accelerator:
    """The Accelerator of this process, whether started by python, torchrun or accelerate launch.

    Raises UserError where the launcher asked for processes or a strategy that Accelerate did not set up.
    """
    handlers = []
    if "LOCAL_RANK" in os.environ:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=30)))
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        gradient_accumulation_steps=accumulation,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(config.folder), logging_dir=str(config.folder)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        kwargs_handlers=handlers or None,
        step_scheduler_with_optimizer=False,
    )
    kind = str(accelerator.distributed_type).split(".")[-1]
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted or (wanted > 1 and kind == "NO"):
        raise UserError(
            f"the launcher started {wanted} processes but Accelerate sees {accelerator.num_processes} ({kind}): "
            "on CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu, or use --use_deepspeed"
        )
    for variable, strategy in (("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "false").lower() == "true" and kind != strategy:
            raise UserError(f"the launcher asked for {strategy} but Accelerate set up {kind}: unset ACCELERATE_USE_CPU")
    return accelerator
