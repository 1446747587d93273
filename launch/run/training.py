"""The life of a run on any strategy: resume, step, check, save, stop. What is trained is the caller's matter.

A caller's loop:

    with start_training(config, accelerator, total_steps, checkpoint, build, optimizer_of, unit=Block, ...) as training:
        for step in training.steps():
            for part in training.parts():
                batch = next(batches)
                with part:
                    training.backward(training.model(batch))
            training.update(rate, names)
"""

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from launch.run.accelerator import SilentError, configure_zero, fit_buffers, on_main
from launch.run.config import RunConfig
from launch.run.folder import CHECKPOINTS
from launch.run.guard import Guard, take_only
from launch.run.optim import set_learning_rate
from launch.run.signals import Stopped, StopRequest, stop_requests
from launch.run.watchdog import Watchdog
from launch.state.checkpoint import Checkpoint, TrainState, snapshot
from launch.state.sharding import WeightAverage, build_sharded, whole_tensors, zero_stage
from launch.state.writer import CheckpointWriter
from vim_backbone.errors import UserError, first_line
from vim_backbone.files import append_lines, json_line

BAD_STEPS = "bad_steps.jsonl"
SMALLER = "lower batch_size, raise accumulation, or set model.recompute to products"
"""What helps where nobody has counted what fits."""


@contextmanager
def start_training(
    config: RunConfig,
    accelerator: Accelerator,
    total_steps: int,
    checkpoint: Path | None,
    build: Callable[[], nn.Module],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    unit: type[nn.Module],
    micro_batch: int,
    clip_grad: float = 0.0,
    ema_decay: float | None = None,
    remedy: Callable[[], str] = lambda: SMALLER,
) -> Iterator["Training"]:
    """Build model and optimizer for the strategy, fill them from the checkpoint, and watch the run inside the block.

    For all processes.

    Args:
        checkpoint: where the run goes on from; None for a fresh one.
        build: makes the model, the same on every process.
        optimizer_of: makes its optimizer, a fused one of PyTorch's.
        unit: modules that ZeRO-3 collects as one.
        micro_batch: samples of one forward pass of one process.
        clip_grad: largest gradient norm; 0 does not clip.
        ema_decay: averages the weights with this factor.
        remedy: what the user can do where the memory of a GPU does not suffice; asked for where it does not.

    Raises UserError where a process is out of memory; the others of the run then end too.
    """
    saved = on_main(accelerator, lambda: Checkpoint(checkpoint)) if checkpoint is not None else None
    with (
        stop_requests() as stop,
        Watchdog(accelerator, config.hang_seconds, config.start_seconds, config.folder, stop) as watchdog,
        ended_out_of_memory(watchdog, remedy, config.debug),
    ):
        configure_zero(accelerator, config.precision, micro_batch, clip_grad)
        model = build_sharded(accelerator, build, unit)
        if zero_stage(accelerator) != 3:
            model.to(accelerator.device)
        ema = WeightAverage(model, ema_decay) if ema_decay else None
        state = TrainState(model, optimizer_of(model), ema)
        yield Training(config, accelerator, total_steps, saved, state, unit, clip_grad, stop, watchdog)


@contextmanager
def ended_out_of_memory(watchdog: Watchdog, remedy: Callable[[], str], debug: bool = False) -> Iterator[None]:
    """Turn the end of a GPU's memory inside the block into a line, and end all processes of the run.

    Raises UserError where there is one process. One of several ends here: what unwinds would wait for the others.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        who = f" on process {watchdog.rank}" if watchdog.world > 1 else ""
        try:
            advice = remedy()
        except Exception:  # it asks the GPU, which may answer nothing now; the others are told in any case
            advice = SMALLER
        line = f"out of memory{who} ({first_line(error)[:120]}): {advice}; --resume auto goes on"
        if watchdog.world == 1:
            raise UserError(line) from error
        if debug:
            traceback.print_exception(error)
        watchdog.end_all(f"error: {line}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of PyTorch, or of a library of CUDA that it calls."""
    signs = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


class _Step(NamedTuple):
    """A step that was asked for, and what is still to be read of it."""

    number: int
    names: list[str]
    results: Tensor
    """(4,): what `Training._shared` gives, and the norm of the gradient."""
    ready: torch.cuda.Event | None
    """After which `results` can be read."""
    failure: str | None
    """Why this process cannot save."""


class Training:
    """One run, from its first step or a checkpoint to its last step or an interrupt; `start_training` makes it."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        total_steps: int,
        checkpoint: Checkpoint | None,
        state: TrainState,
        unit: type[nn.Module],
        clip_grad: float,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.total_steps = total_steps
        self.state = state
        """What is saved: the model itself, its optimizer and average, the number of steps done."""
        self.loss, self.grad_norm, self.rate = float("nan"), 0.0, 0.0
        self._notices: list[str] = []
        self._guard = Guard(config.guard, checkpoint.state.get("guard") if checkpoint else None)
        folder = config.folder / CHECKPOINTS
        asynchronous = config.async_checkpoints
        self._writer = CheckpointWriter(folder, config.keep_checkpoints, config.keep_every, asynchronous)
        self._stop, self._watchdog = stop, watchdog
        watchdog.last_act = self._writer.wait
        self._clip_grad = clip_grad
        self._losses: list[Tensor] = []
        self._unsettled: _Step | None = None
        self._must_stop = False
        self._last_part = True

        def prepare(state: TrainState) -> nn.Module:
            fit_buffers(accelerator, state.model, unit)
            model, prepared = accelerator.prepare(state.model, state.optimizer)
            if zero_stage(accelerator):
                state.optimizer = prepared.optimizer
            return model

        self.model: nn.Module = checkpoint.load(state, prepare) if checkpoint else prepare(state)
        """What to call: the model wrapped for the strategy."""
        self._zero: Any = state.optimizer if zero_stage(accelerator) else None
        self._optimizer: torch.optim.Optimizer = state.optimizer
        if self._zero is not None:
            self._optimizer = self._zero.optimizer
            take_only(
                self._optimizer, lambda: self._guard.wrong(self.loss, self._zero._global_grad_norm or 0.0) is None
            )
        self.reads_late = accelerator.device.type == "cuda" and self._zero is None and not config.guard.looks_back
        """Whether the result of a step is read when the next has been asked for, so that a GPU waits for no host."""

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

    def expect_change(self) -> None:
        """What the next step trains on is unlike what the steps before did. For all processes.

        Losses so far are no measure of its, and it may take the time of a first one. To be called before its `parts`.
        """
        self.settle()
        self._guard.losses = []
        self._watchdog.start_again()

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
        self.settle()
        self.rate = rate * self._guard.rate_factor(self.state.step)
        set_learning_rate(self._optimizer, self.rate)
        shared, failure = self._shared()
        ready = None
        if self._zero is not None:
            self.loss = float(shared[0]) / self.accelerator.num_processes
            engine: Any = self.model
            engine.step()
            results = torch.cat([shared, torch.full_like(shared[:1], float(self._zero._global_grad_norm or 0.0))])
        else:
            results = torch.cat([shared, self._clip()[None]])
            if self.reads_late:
                is_bad = ~results.isfinite().all()
            else:
                loss, *_, norm = results.tolist()
                is_bad = torch.tensor(self._guard.wrong(loss / self.accelerator.num_processes, norm) is not None)
            vars(self._optimizer)["found_inf"] = is_bad.float()  # PyTorch's fused optimizers take nothing where it is 1
            self._optimizer.step()
            self._optimizer.zero_grad()
            if results.is_cuda:
                results = results.to("cpu", non_blocking=True)
                ready = torch.cuda.Event()
                ready.record()
        self._unsettled = _Step(self.state.step, names, results, ready, failure)
        self.state.step += 1
        if not self.reads_late:
            self.settle()

    def new_notices(self) -> list[str]:
        """Lines on what happened since the last call, such as that a step was bad."""
        notices, self._notices = self._notices, []
        return notices

    def settle(self) -> None:
        """Wait for the last step, so that `loss`, `grad_norm` and the notices are up to date. For all processes.

        Raises as `update`.
        """
        if self._unsettled is None:
            return
        step, self._unsettled = self._unsettled, None
        if step.ready is not None:
            step.ready.synchronize()
        loss, stops, failures, self.grad_norm = step.results.tolist()
        self.loss = loss / self.accelerator.num_processes
        self._must_stop = stops > 0
        if failures:
            raise UserError(step.failure) if step.failure is not None else SilentError("the main process cannot save")
        wrong = self._guard.wrong(self.loss, self.grad_norm)
        self._guard.note(step.number, self.loss, wrong is not None)
        self.state.extra["guard"] = self._guard.state()
        if wrong is not None:
            self._notices.append(self._note_bad_step(step, wrong))
        elif self.state.ema is not None:
            self.state.ema.update(step.number + 1)

    def _clip(self) -> Tensor:
        """Norm of the gradients, which are cut to `clip_grad` where that is on."""
        if self._clip_grad:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self._clip_grad)
            return torch.as_tensor(norm)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=self.accelerator.device)

    def _shared(self) -> tuple[Tensor, str | None]:
        """(3,): sum over processes of the mean loss, of those that must stop, of those that cannot save; and why this
        one cannot. In one exchange, which the host does not wait for.
        """
        failure = self._writer.failure()
        mean = torch.stack(self._losses).float().mean()
        self._losses = []
        flags = self._stop.received is not None, failure is not None
        here = [mean, *(torch.full_like(mean, flag) for flag in flags)]  # filled there: a copy would wait
        total = self.accelerator.reduce(torch.stack(here), reduction="sum")
        assert isinstance(total, Tensor)
        return total, failure

    def _note_bad_step(self, step: _Step, wrong: str) -> str:
        config, names = self.config, step.names
        shares: list[str] = gather_object(names) if self.accelerator.num_processes > 1 else names
        action = "stop" if self._guard.must_stop() else config.guard.on_bad_step
        row = {"step": step.number + 1, "wrong": wrong, "loss": self.loss, "grad_norm": self.grad_norm,
               "action": action, "samples": shares}  # fmt: skip
        path = config.folder / BAD_STEPS
        if self.accelerator.is_main_process:
            append_lines(path, json_line(row))
        line = f"step {step.number + 1} is bad: {wrong}; not taken, its {len(shares)} samples are in {path}"
        if not self._guard.must_stop():
            return line + ("; learning rate halved" if action == "lower" else "")
        self._guard.in_a_row = 0
        self.state.extra["guard"] = self._guard.state()
        self.state.step = step.number
        self.save_now()
        line += f"; the run ends, with {self._guard.config.on_bad_step!r} for bad steps and all before it saved"
        raise (UserError if self.accelerator.is_main_process else SilentError)(line)

    def save(self) -> Path:
        """Copy the state and have it written. For all processes."""
        self._watchdog.beat(self.state.step, 1001, "saving")
        self.settle()
        copied = snapshot(self.state, keep=self.accelerator.is_main_process)
        on_main(self.accelerator, lambda: self._writer.write(copied))
        return self._writer.folder / f"step-{copied.step:08d}"

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
        self.beat_of_evaluation()
        self.settle()
        state.model.eval()
        with torch.no_grad(), self._averaged():
            yield state.model
            if offload := getattr(self._zero, "parameter_offload", None):
                offload.partition_all_parameters()  # with no backward pass, ZeRO-3 would keep what was averaged
        state.model.train()

    def beat_of_evaluation(self) -> None:
        """Tell the watchdog that the evaluation goes on: each part of it may take `hang_seconds`."""
        self._watchdog.beat(self.state.step, 1002, "evaluating")

    def _averaged(self) -> AbstractContextManager[None]:
        return self.state.ema.in_place() if self.state.ema is not None else nullcontext()

    def published(self, part: nn.Module) -> dict[str, Tensor]:
        """State dict of a part of the model, averaged where averaging is on, on the main process. For all processes."""
        with self._averaged():
            return whole_tensors(part, keep=self.accelerator.is_main_process)
