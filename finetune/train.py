"""The fine-tuning run of any task: build, loop, evaluate, publish; how a run lives is launch/run/training.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.backbone import Pretrained, layer_scales
from finetune.batches import Batch, Samples, training_batches
from finetune.config import FinetuneConfig, FinetuneOptim
from launch.data.bad_pictures import BadPictures
from launch.data.loading import enduring
from launch.data.order import plan_batches
from launch.run.accelerator import build_accelerator, on_main, strategy
from launch.run.folder import open_run
from launch.run.metrics import RunLog, Throughput, peak_memory_gb
from launch.run.optim import build_optimizer
from launch.run.randomness import seed_of
from launch.run.training import Training
from launch.state.sharding import shape_of
from vim_backbone import VisionMamba
from vim_backbone.block import Block
from vim_backbone.files import write_json, write_tensors, write_text
from vim_backbone.folder import model_card

FIXED_ON_RESUME = ("backbone", "model.", "head.")
EVALUATIONS = "evaluations"
MODEL = "model"
"""Folder of the run with the whole model and what `finetune.predict` must know of it."""


@dataclass
class Report:
    """What an evaluation found. On the main process; the others hold an empty one."""

    metrics: dict[str, float] = field(default_factory=dict)
    write: Callable[[Path], None] = lambda folder: None  # noqa: ARG005
    """Writes tables and pictures into a folder."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Samples that could not be read and are not counted, with the reason."""


@dataclass(frozen=True)
class Evaluation:
    """What an observer of the run is told."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    """As in `metrics.json`. Empty on all processes but the main one."""


Observer = Callable[[Evaluation], None]
"""Called on every process after an evaluation: all up to it is saved, and after the last the model is published."""


class Task(ABC):
    """What differs between classification, segmentation and detection."""

    name: ClassVar[str]
    config: Any
    train: Samples
    val: Samples
    classes: list[str]
    pretrained: Pretrained
    notes: list[str]
    """Lines for the user about the data."""

    @property
    def optim(self) -> FinetuneOptim:
        """Rates of the run."""
        return self.config.optim

    @property
    def workers(self) -> int:
        """Data-loading processes."""
        return self.config.data.workers

    @abstractmethod
    def new_model(self) -> nn.Module:
        """The model with fresh weights; its backbone is its attribute `backbone`."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, device: torch.device, key: tuple[int, ...]) -> dict[str, Tensor]:
        """Named losses of one forward pass, to be added up; `key` is for what is drawn in it."""

    @abstractmethod
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Report:
        """Judge the model on the validation data. For all processes."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What is needed to use the trained model, as plain data."""

    def evaluating_only(self) -> bool:
        """Whether the run takes no step."""
        return self.config.mode != "train"

    def eval_batch_size(self, accelerator: Accelerator) -> int:
        """Samples of a forward pass in evaluation: as in training."""
        parts = accelerator.num_processes * self.config.accumulation
        return max(1, self.config.batch_size // parts)

    @property
    def drawn(self) -> set[int]:
        """Validation samples to draw, spread evenly over all."""
        total, count = len(self.val), min(self.config.pictures, len(self.val))
        return {i * total // count for i in range(count)}


@dataclass
class Run:
    """What the loop works with."""

    task: Task
    config: FinetuneConfig
    batches: Iterator[Batch]
    training: Training
    log: RunLog
    bad: BadPictures
    observe: Observer | None


def finetune(task: Task, observe: Observer | None = None) -> Path:
    """Train as the task's config says and return the run's folder, with the model published in `model/`.

    Raises UserError before any work where something asked for cannot be done, and Stopped after an interrupt.
    """
    config: FinetuneConfig = task.config
    accelerator = build_accelerator(config, config.accumulation)
    plan = plan_batches(accelerator, config.batch_size, config.accumulation)
    start = on_main(accelerator, lambda: open_run(config, FIXED_ON_RESUME))
    total_steps = 0 if task.evaluating_only() else config.total_steps(len(task.train))
    bad = BadPictures(config.folder / "bad_pictures.txt", len(task.train), max_share=0.5)

    def batches_from(number: int) -> Iterator[Batch]:
        return training_batches(task.train, config.seed, plan, number, total_steps, task.workers)

    with Training(config, accelerator, total_steps, start.checkpoint) as training:
        training.prepare(
            lambda: build_model(task),
            lambda model: scaled_optimizer(model, task),
            unit=Block,
            micro_batch=plan.micro_batch,
            clip_grad=task.optim.clip_grad,
            ema_decay=config.ema_decay,
        )
        with RunLog(config, accelerator, total_steps, training.state.step) as log:
            batches = enduring(batches_from, training.state.step * config.accumulation, log.say)
            run = Run(task, config, batches, training, log, bad, observe)
            for line in (introduction(run), *task.notes, *start.notes):
                log.say(line)
            if task.evaluating_only():
                metrics = evaluate(run)
            else:
                metrics = train(run)
                publish(run)
            if observe is not None:
                metrics = evaluate(run) if metrics is None else metrics  # a run that was resumed when all was done
                observe(Evaluation(training.state.step, total_steps, metrics))
    return config.folder


def build_model(task: Task) -> nn.Module:
    """The model as it is before the first step, the same for one seed on every process."""
    torch.manual_seed(seed_of(task.config.seed))
    model = task.new_model()
    backbone = backbone_of(model)
    task.pretrained.put_into(backbone)
    backbone.set_grad_checkpointing(task.config.model.grad_checkpointing)
    if task.config.model.freeze:
        head = {id(p) for p in backbone.get_classifier().parameters()}
        for p in backbone.parameters():
            p.requires_grad_(id(p) in head)
    return model


def backbone_of(model: nn.Module) -> VisionMamba:
    """The backbone inside a task's model."""
    backbone = model.backbone
    assert isinstance(backbone, VisionMamba)
    return backbone


def scaled_optimizer(model: nn.Module, task: Task) -> torch.optim.AdamW:
    """AdamW with the rate of each layer."""
    scales = layer_scales(model, backbone_of(model), task.optim)
    return build_optimizer(model, task.optim, task.config.batch_size, scales.__getitem__)


def train(run: Run) -> dict[str, float] | None:
    """The loop: steps until the last one, or until a signal; what was done is saved either way.

    Returns the metrics of the last step, None where no step was left to do.
    """
    task, config, training = run.task, run.config, run.training
    device, rank = training.accelerator.device, training.accelerator.process_index
    backbone = task.pretrained.config
    rows, columns = backbone.grid(*backbone.img_size)
    speed = Throughput()
    latest: dict[str, float] = {}
    metrics: dict[str, float] | None = None
    for step in training.steps():
        torch.manual_seed(seed_of(config.seed, step, rank))  # for stochastic depth
        names: list[str] = []
        named: dict[str, Tensor] = {}
        for part, context in enumerate(training.parts()):
            batch = checked(run, speed.waiting(run.batches))
            names += batch.names
            with context:
                named = task.losses(training.model, batch, device, (config.seed, step, part, rank))
                training.backward(torch.stack(list(named.values())).sum())
        training.update(task.optim.rate(step, config.batch_size, training.total_steps), names)
        speed.images += config.batch_size
        speed.tokens += config.batch_size * rows * columns

        done = step + 1
        if training.notice:
            run.log.say(training.notice)
        if done % config.log_every == 0 or done == training.total_steps:
            latest = {"loss": training.loss, "lr": training.rate, "grad_norm": training.grad_norm} | speed.read()
            parts = {key: value.item() for key, value in named.items()} if len(named) > 1 else {}
            run.log.metrics(done, latest | parts | {"memory_gb": peak_memory_gb(device)})
        run.log.progress(done, latest)
        if done == training.total_steps or (config.evaluate_every and done % config.evaluate_every == 0):
            metrics = evaluate(run)
            if run.observe is not None and done < training.total_steps:
                training.save_now()
                run.observe(Evaluation(done, training.total_steps, metrics))
            speed.read()
    return metrics


def checked(run: Run, batch: Batch) -> Batch:
    """The batch, its bad samples counted and named."""
    for line in run.bad.add(batch):
        run.log.say(line)
    return batch


def evaluate(run: Run) -> dict[str, float]:
    """Judge the model, averaged where averaging is on; log, and write tables and pictures. For all processes."""
    training = run.training
    step, accelerator = training.state.step, training.accelerator
    with training.evaluating() as model:
        report = run.task.evaluate(model, accelerator)
    if not accelerator.is_main_process:
        return {}
    folder = run.config.folder / EVALUATIONS / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder)
    write_json(folder / "metrics.json", report.metrics)
    run.log.metrics(step, {f"val_{key}": value for key, value in report.metrics.items()})
    for path in sorted(folder.glob("*.png")):
        run.log.picture(step, path.stem, path)
    if report.bad:
        write_text(folder / "bad_pictures.txt", "".join(f"{name}\t{why}\n" for name, why in report.bad))
        name, why = report.bad[0]
        run.log.say(f"{len(report.bad)} validation pictures cannot be read and are not counted, such as {name}: {why}")
    shown = "  ".join(f"{key} {value:.4f}" for key, value in report.metrics.items() if key != "samples")
    run.log.say(f"step {step}: {shown}; tables and pictures in {folder}")
    return report.metrics


def publish(run: Run) -> None:
    """Write the whole model as `model/` and its backbone as `backbone/`, averaged where averaging is on.

    For all processes; the main one writes.
    """
    config, training, task = run.config, run.training, run.task
    model = training.state.model
    whole = training.published(model)
    inside = {key.removeprefix("backbone."): value for key, value in whole.items() if key.startswith("backbone.")}
    backbone, steps = backbone_of(model), training.state.step
    history = (
        f"\n## Fine-tuning\n\n{task.name.capitalize()} of {config.data.source!r} ({len(task.classes)} classes) from "  # pyright: ignore
        f"{config.backbone!r}: {steps} steps of {config.batch_size} pictures, {config.precision}, seed {config.seed}.\n"
    )

    def write() -> None:
        folder = config.folder / MODEL
        folder.mkdir(exist_ok=True)
        write_tensors(folder / "model.safetensors", whole)
        write_json(folder / "config.json", {"task": task.name} | task.description())
        card = model_card(backbone.config, "backbone") + history
        backbone.save_pretrained(config.folder / "backbone", card=card, tensors=inside)

    on_main(training.accelerator, write)
    run.log.say(
        f"{steps} steps done; the model is in {config.folder / MODEL}, its backbone in {config.folder}/backbone"
    )


def introduction(run: Run) -> str:
    """One line on what is about to be trained."""
    config, accelerator, done = run.config, run.training.accelerator, run.training.state.step
    millions = sum(shape_of(p).numel() for p in run.training.state.model.parameters()) / 1e6
    height, width = run.task.pretrained.config.img_size
    weights = "fresh weights for" if config.model.from_scratch else "weights of"
    return (
        f"{run.task.name} ({millions:.1f} M parameters, {weights} {config.backbone}): {len(run.task.train)} pictures, "
        f"{len(run.task.val)} for validation, {len(run.task.classes)} classes, {height} x {width}, "
        f"{f'from step {done} ' if done else ''}to step {run.training.total_steps}, "
        f"{accelerator.num_processes} x {accelerator.device.type} {strategy(accelerator)}, {config.precision}"
    )
