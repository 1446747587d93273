"""The life of a run on any strategy: prepare, resume, step, judge, save, stop. What is trained is the caller's matter.

A caller's loop:

    with Training(config, accelerator, total_steps, checkpoint) as training:
        training.prepare(build, optimizer_of, unit=Block, ...)
        for step in training.steps():
            for part in training.parts():
                batch = next(batches)
                with part:
                    training.backward(training.model(batch))
            training.update(rate, names)
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from launch.run.accelerator import ToldError, configure_zero, fit_buffers, on_main
from launch.run.config import RunConfig
from launch.run.folder import CHECKPOINTS
from launch.run.guard import Guard
from launch.run.optim import set_learning_rate
from launch.run.signals import Stopped, stop_requests
from launch.run.watchdog import Watchdog
from launch.state.checkpoint import Checkpoint, TrainState, snapshot
from launch.state.sharding import WeightAverage, build_sharded, whole_tensors, zero_stage
from launch.state.writer import CheckpointWriter
from vim_backbone.errors import UserError

BAD_STEPS = "bad_steps.jsonl"


class Training:
    """One run, from its first step or a checkpoint to its last step or an interrupt."""

    model: nn.Module
    """What to call: the model wrapped for the strategy."""
    state: TrainState
    """What is saved: the model itself, its optimizer and average, the number of steps done."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, total_steps: int, checkpoint: Path | None) -> None:
        self.config = config
        self.accelerator = accelerator
        self.total_steps = total_steps
        self.loss, self.grad_norm, self.rate = float("nan"), 0.0, 0.0
        self.notice: str | None = None
        """What the last `update` has to say, such as that the step was bad."""
        self._saved = on_main(accelerator, lambda: Checkpoint(checkpoint)) if checkpoint is not None else None
        self._guard = Guard(config.guard, self._saved.state.get("guard") if self._saved else None)
        folder = config.folder / CHECKPOINTS
        asynchronous = config.async_checkpoints
        self._writer = CheckpointWriter(folder, config.keep_checkpoints, config.keep_every, asynchronous)
        self._watchdog = Watchdog(accelerator, config.hang_seconds)
        self._losses: list[Tensor] = []
        self._verdict: str | None = None
        self._must_stop = False
        self._inside = ExitStack()

    @property
    def start_step(self) -> int:
        """Steps that were done before this process began."""
        return int(self._saved.state["step"]) if self._saved else 0

    def prepare(
        self,
        build: Callable[[], nn.Module],
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        unit: type[nn.Module],
        micro_batch: int,
        clip_grad: float = 0.0,
        ema_decay: float | None = None,
    ) -> None:
        """Build model and optimizer for the strategy and fill them from the checkpoint. For all processes.

        Args:
            build: makes the model, the same on every process.
            optimizer_of: makes its optimizer.
            unit: modules that ZeRO-3 collects as one.
            micro_batch: samples of one forward pass of one process.
            clip_grad: largest gradient norm; 0 does not clip.
            ema_decay: averages the weights with this factor.
        """
        accelerator, saved = self.accelerator, self._saved
        configure_zero(accelerator, self.config.precision, micro_batch, clip_grad)
        self._clip_grad = clip_grad
        model = build_sharded(accelerator, build, unit)
        if zero_stage(accelerator) != 3:
            model.to(accelerator.device)
        ema = WeightAverage(model, ema_decay) if ema_decay else None
        self.state = TrainState(model, optimizer_of(model), ema)
        if saved:
            saved.load_ema(self.state)
            saved.load_model(self.state)
        fit_buffers(accelerator, model, unit)
        self.model, prepared = accelerator.prepare(model, self.state.optimizer)
        if zero_stage(accelerator):
            self.state.optimizer = self._zero = prepared.optimizer
            self._optimizer = self._zero.optimizer
            self._take_step, self._optimizer.step = self._optimizer.step, self._step_if_good
        else:
            self._zero, self._optimizer = None, prepared
        if saved:
            saved.load_rest(self.state)

    def __enter__(self) -> "Training":
        self._stop = self._inside.enter_context(stop_requests())
        self._inside.enter_context(self._watchdog)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._inside.__exit__(*exception)

    def steps(self) -> Iterator[int]:
        """Steps to do, counted from 0; the caller does one with `parts` and `update` before asking for the next.

        Raises Stopped after a signal, and UserError where a checkpoint cannot be written; saves before the first.
        """
        state = self.state
        while state.step < self.total_steps:
            step = state.step
            self._watchdog.beat(step, 0, "reading data")
            self.model.train()
            yield step
            if state.step % self.config.checkpoint_every == 0 or state.step == self.total_steps:
                self.save()
            if self._must_stop and state.step < self.total_steps:
                self._end_on_signal()
        on_main(self.accelerator, self._writer.wait)

    def parts(self) -> Iterator[AbstractContextManager[None]]:
        """Contexts for the forward and backward passes of a step; read a part's data before entering its context."""
        for part in range(count := self.accelerator.gradient_accumulation_steps):
            self._watchdog.beat(self.state.step, 2 * part, "reading data")
            yield self._part(2 * part + 1, last=part == count - 1)

    @contextmanager
    def _part(self, stage: int, last: bool) -> Iterator[None]:
        self._watchdog.beat(self.state.step, stage, "computing")
        self._last_part = last
        with nullcontext() if last or self._zero is not None else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one part's mean loss."""
        self._losses.append(loss.detach())
        if self._zero is None:
            self.accelerator.backward(loss)
        else:
            engine: Any = self.model
            engine.set_gradient_accumulation_boundary(self._last_part)
            engine.backward(loss)

    def update(self, rate: float, names: list[str]) -> None:
        """Take the optimiser step if it is good. `names` are this process's samples. For all processes.

        Raises UserError for a bad step that ends the run, with all before it saved.
        """
        self._watchdog.beat(self.state.step, 1000, "waiting for the other processes")
        self.rate = rate * self._guard.rate_factor(self.state.step)
        set_learning_rate(self._optimizer, self.rate)
        self._share()
        self._verdict, self.grad_norm = None, float("nan")
        if self._zero is not None:
            engine: Any = self.model
            engine.step()
            norm = self._zero._global_grad_norm
            self.grad_norm = float(norm if norm is not None else 0.0)
            bad = self._guard.wrong(self.loss, self.grad_norm)
        else:
            limit = self._clip_grad or float("inf")
            self.grad_norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit) or 0.0)
            bad = self._guard.wrong(self.loss, self.grad_norm)
            if bad is None:
                self._optimizer.step()
            self._optimizer.zero_grad()
        self._guard.note(self.state.step, self.loss, bad is not None)
        self.state.extra["guard"] = self._guard.state()
        self.notice = self._note_bad_step(bad, names) if bad else None
        self.state.step += 1
        if self.state.ema is not None and bad is None:
            self.state.ema.update(self.state.step)

    def _step_if_good(self, *arguments: Any, **named: Any) -> Any:
        """In place of the step of the optimizer inside ZeRO, which takes its own step and the norm at one go."""
        norm = self._zero._global_grad_norm if self._zero is not None else 0.0
        if self._guard.wrong(self.loss, None if norm is None else float(norm)) is None:
            return self._take_step(*arguments, **named)
        return None

    def _share(self) -> None:
        """Mean loss over parts and processes, and whether any process must stop, in one exchange."""
        failed = self._writer.failure()
        mean = torch.stack(self._losses).float().mean()
        self._losses = []
        own = torch.tensor([float(self._stop.received is not None), float(failed is not None)], device=mean.device)
        total = self.accelerator.reduce(torch.cat([mean[None], own]), reduction="sum")
        assert isinstance(total, Tensor)
        loss, stop, failures = total.tolist()
        self.loss = loss / self.accelerator.num_processes
        self._must_stop = stop > 0
        if failures:
            raise UserError(failed) if failed is not None else ToldError("the main process cannot save")

    def _note_bad_step(self, wrong: str, names: list[str]) -> str:
        config, step = self.config, self.state.step
        shares: list[str] = gather_object(names) if self.accelerator.num_processes > 1 else names
        action = "stop" if self._guard.must_stop() else config.guard.on_bad_step
        row = {"step": step + 1, "wrong": wrong, "loss": self.loss, "grad_norm": self.grad_norm,
               "action": action, "samples": shares}  # fmt: skip
        path = config.folder / BAD_STEPS
        if self.accelerator.is_main_process:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        line = f"step {step + 1} is bad: {wrong}; not taken, its {len(shares)} samples are in {path}"
        if not self._guard.must_stop():
            return line + ("; learning rate halved" if action == "lower" else "")
        self._guard.in_a_row = 0
        self.state.extra["guard"] = self._guard.state()
        self.save_now()
        line += f"; the run ends, with {self._guard.config.on_bad_step!r} for bad steps and all before it saved"
        raise (UserError if self.accelerator.is_main_process else ToldError)(line)

    def save(self) -> Path:
        """Copy the state and have it written. For all processes."""
        self._watchdog.beat(self.state.step, 1001, "saving")
        taken = snapshot(self.state, keep=self.accelerator.is_main_process)
        on_main(self.accelerator, lambda: self._writer.write(taken))
        return self._writer.folder / f"step-{taken.step:08d}"

    def save_now(self) -> Path:
        """Save, and return when all of it is on the disk. For all processes."""
        where = self.save()
        on_main(self.accelerator, self._writer.wait)
        return where

    def _end_on_signal(self) -> None:
        where = self.save_now()
        received = self._stop.received or signal.SIGTERM
        step = self.state.step
        raise Stopped(
            received,
            f"stopped by {signal.Signals(received).name} at step {step} of {self.total_steps}, saved in {where}; "
            "the same command with --resume goes on",
            quiet=not self.accelerator.is_main_process,
        )

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model, averaged where averaging is on, without gradients or stochastic depth. For all processes."""
        state = self.state
        self._watchdog.beat(state.step, 1002, "evaluating")
        state.model.eval()
        with torch.no_grad(), self._averaged():
            yield state.model
            if offload := getattr(self._zero, "parameter_offload", None):
                offload.partition_all_parameters()  # with no backward pass, ZeRO-3 would keep what was averaged
        state.model.train()

    def _averaged(self) -> AbstractContextManager[None]:
        return self.state.ema.in_place() if self.state.ema is not None else nullcontext()

    def published(self, part: nn.Module) -> dict[str, Tensor]:
        """State dict of a part of the model, averaged where averaging is on, on the main process. For all processes."""
        with self._averaged():
            return whole_tensors(part, keep=self.accelerator.is_main_process)
