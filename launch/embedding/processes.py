"""The processes of `launch.embed`: each takes its share, the first one begins and ends the work."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from launch.run.accelerator import join_attempt, on_first, refuse_what_is_missing
from vim_backbone.embedding.work import Share

Result = TypeVar("Result")
PATIENCE = timedelta(days=7)
"""How long a process that is done waits for the others: the launcher ends all of them when one is lost."""


class Processes:
    """Those that a launcher started, or this one alone. They exchange a few words, by gloo on any device."""

    def __init__(self) -> None:
        """Raises UserError where there are fewer GPUs than processes."""
        self.share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        if self.share.processes > 1:
            refuse_what_is_missing()
            join_attempt("gloo", PATIENCE)
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=PATIENCE)

    def device(self, device: str) -> str:
        """The GPU of this process, where one is asked for."""
        if device == "cuda" and self.share.processes > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        return device

    def on_first(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, done by the first process alone, or its UserError, on all processes."""
        return on_first(self.share.rank == 0, work, self._broadcast)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.share.processes > 1:
            dist.barrier()

    def _broadcast(self, values: list[object]) -> None:
        if self.share.processes > 1:
            dist.broadcast_object_list(values)
