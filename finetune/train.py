"""The fine-tuning run of any task: build, loop, evaluate, publish; how a run lives is launch/run/training.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.backbone import layer_scales
from finetune.batches import training_batches
from finetune.config import FinetuneConfig
from finetune.model_folder import MODEL, write_model
from finetune.task import LabelledBatch, Task, TaskModel
from launch.data.bad_pictures import BadPictures
from launch.data.loading import enduring, number_of_workers
from launch.data.order import plan_batches
from launch.run.accelerator import build_accelerator, on_main, strategy
from launch.run.folder import run_folder
from launch.run.metrics import RunLog, Throughput, peak_memory_gb
from launch.run.optim import build_optimizer
from launch.run.randomness import seed_of
from launch.run.training import Training, start_training
from launch.state.sharding import shape_of
from vim_backbone.block import Block, set_recompute
from vim_backbone.files import write_json, write_text
from vim_backbone.folder import model_card

FIXED_ON_RESUME = ("backbone", "model.", "head.", "data.statistics")
EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class Evaluation:
    """Scores of the run at one step, for an observer."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    """As in `metrics.json`. Empty on all processes but the main one."""


Observer = Callable[[Evaluation], None]
"""Called on every process after an evaluation: all up to it is saved, and after the last the model is published."""


@dataclass
class Run:
    """What the loop works with."""

    task: Task[FinetuneConfig]
    batches: Iterator[LabelledBatch]
    training: Training
    log: RunLog
    bad: BadPictures
    observe: Observer | None

    @property
    def config(self) -> FinetuneConfig:
        """Of the task."""
        return self.task.config

    @property
    def model(self) -> TaskModel:
        """As it is saved, not wrapped for the strategy."""
        model = self.training.state.model
        assert isinstance(model, TaskModel)
        return model


def finetune(task: Task[FinetuneConfig], observe: Observer | None = None) -> Path:
    """Train as the task's config says and return the run's folder, with the model published in `model/`.

    Raises UserError before any work where something asked for cannot be done, and Stopped after an interrupt.
    """
    config = task.config
    accelerator = build_accelerator(config, config.accumulation)
    plan = plan_batches(accelerator, config.batch_size, config.accumulation)
    total_steps = 0 if task.evaluates_only else config.total_steps(len(task.train))
    task.prepare(accelerator.device)
    with run_folder(accelerator, config, FIXED_ON_RESUME, total_steps) as start:
        bad = BadPictures(config.folder / "bad_pictures.txt", len(task.train), max_share=0.5)

        def batches_from(number: int) -> Iterator[LabelledBatch]:
            return training_batches(task.train, config.seed, plan, number, total_steps, config.data.workers)

        with start_training(
            config,
            accelerator,
            total_steps,
            start.checkpoint,
            lambda: build_model(task),
            lambda model: build_scaled_optimizer(model, config),
            unit=Block,
            micro_batch=plan.micro_batch,
            clip_grad=config.optim.clip_grad,
            ema_decay=config.ema_decay,
        ) as training:
            first = training.state.step
            with RunLog(config, accelerator, total_steps, first) as log:
                batches = enduring(batches_from, first * config.accumulation, log.say)
                run = Run(task, batches, training, log, bad, observe)
                for line in (introduction(run), *task.notes, *start.notes):
                    log.say(line)
                if task.evaluates_only:
                    metrics = evaluate(run)
                else:
                    metrics = train(run)
                    publish(run)
                if observe is not None:
                    metrics = evaluate(run) if metrics is None else metrics  # a run that was resumed when all was done
                    observe(Evaluation(training.state.step, total_steps, metrics))
    return config.folder


def build_model(task: Task[FinetuneConfig]) -> TaskModel:
    """The model as it is before the first step, the same for one seed on every process."""
    torch.manual_seed(seed_of(task.config.seed))
    model = task.new_model()
    task.pretrained.put_into(model.backbone)
    set_recompute(model, task.config.model.level)
    if task.config.model.freeze:
        head = {id(p) for p in model.backbone.get_classifier().parameters()}
        for p in model.backbone.parameters():
            p.requires_grad_(id(p) in head)
    return model


def build_scaled_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW with the rate of each layer."""
    assert isinstance(model, TaskModel)
    scales = layer_scales(model, model.backbone, config.optim)
    return build_optimizer(model, config.optim, config.batch_size, scales.__getitem__)


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
        losses: dict[str, Tensor] = {}
        tokens = 0  # of a place, of all pictures together
        for part, context in enumerate(training.parts()):
            batch = speed.waiting(run.batches)
            for line in run.bad.add(batch):
                run.log.say(line)
            names += batch.names
            tokens += sum(backbone.tokens_of(batch.images))
            with context:
                losses = task.losses(training.model, batch, device, (config.seed, step, part, rank))
                training.backward(torch.stack(list(losses.values())).sum())
        training.update(config.optim.rate(step, config.batch_size, training.total_steps), names)
        speed.images += config.batch_size
        speed.tokens += tokens * rows * columns * training.accelerator.num_processes

        done = step + 1
        if done % config.log_every == 0 or done == training.total_steps:
            training.settle()
            latest = {"loss": training.loss, "lr": training.rate, "grad_norm": training.grad_norm} | speed.read()
            parts = {key: value.item() for key, value in losses.items()} if len(losses) > 1 else {}
            run.log.metrics(done, latest | parts | {"memory_gb": peak_memory_gb(device)})
        run.log.progress(done, latest)
        for line in training.new_notices():
            run.log.say(line)
        if done == training.total_steps or (config.evaluate_every and done % config.evaluate_every == 0):
            metrics = evaluate(run)
            if run.observe is not None and done < training.total_steps:
                training.save_now()
                run.observe(Evaluation(done, training.total_steps, metrics))
            speed.read()
    return metrics


def evaluate(run: Run) -> dict[str, float]:
    """Evaluate the model, averaged where averaging is on; log, and write tables and pictures. For all processes."""
    training = run.training
    step, accelerator = training.state.step, training.accelerator
    with training.evaluating() as model:
        result = run.task.evaluate(model, accelerator)
    if not accelerator.is_main_process:
        return {}
    folder = run.config.folder / EVALUATIONS / f"step-{step:08d}"
    folder.parent.mkdir(exist_ok=True)  # not its parents: a run's folder that was deleted is not made again
    folder.mkdir(exist_ok=True)
    result.write(folder)
    write_json(folder / "metrics.json", result.metrics)
    run.log.metrics(step, {f"val_{key}": value for key, value in result.metrics.items()})
    for path in sorted(folder.glob("*.png")):
        run.log.picture(step, path.stem, path)
    if result.bad:
        write_text(folder / "bad_pictures.txt", "".join(f"{name}\t{why}\n" for name, why in result.bad))
        name, why = result.bad[0]
        run.log.say(f"{len(result.bad)} validation pictures cannot be read and are not counted, such as {name}: {why}")
    scores = "  ".join(f"{key} {value:.4f}" for key, value in result.metrics.items() if key != "samples")
    run.log.say(f"step {step}: {scores}; tables and pictures in {folder}")
    return result.metrics


def publish(run: Run) -> None:
    """Write the whole model as `model/` and its backbone as `backbone/`, averaged where averaging is on.

    For all processes; the main one writes.
    """
    config, training, task = run.config, run.training, run.task
    whole = training.published(run.model)
    inside = {key.removeprefix("backbone."): value for key, value in whole.items() if key.startswith("backbone.")}
    backbone, steps = run.model.backbone, training.state.step
    history = (
        f"\n## Fine-tuning\n\n{task.name.capitalize()} of {config.data.source!r} ({len(task.classes)} classes) from "
        f"{config.backbone!r}: {steps} steps of {config.batch_size} pictures, {config.precision}, seed {config.seed}.\n"
    )

    def write() -> None:
        write_model(config.folder, task.name, task.description(), whole)
        card = model_card(backbone.config, "backbone", task.pretrained.preprocessing) + history
        more = {"preprocessing": task.pretrained.preprocessing, "card": card, "tensors": inside}
        backbone.save_pretrained(config.folder / "backbone", **more)

    on_main(training.accelerator, write)
    run.log.say(
        f"{steps} steps done; the model is in {config.folder / MODEL}, its backbone in {config.folder}/backbone"
    )


def introduction(run: Run) -> str:
    """One line on what is about to be trained."""
    config, accelerator, done = run.config, run.training.accelerator, run.training.state.step
    millions = sum(shape_of(p).numel() for p in run.model.parameters()) / 1e6
    height, width = run.task.pretrained.config.img_size
    weights = "fresh weights for" if config.model.from_scratch else "weights of"
    return (
        f"{run.task.name} ({millions:.1f} M parameters, {weights} {config.backbone}): {len(run.task.train)} pictures, "
        f"{len(run.task.val)} for validation, {len(run.task.classes)} classes, {height} x {width}, "
        f"{f'from step {done} ' if done else ''}to step {run.training.total_steps}, "
        f"{accelerator.num_processes} x {accelerator.device.type} {strategy(accelerator)}, {config.precision}, "
        f"data.workers {number_of_workers(config.data.workers)}"
    )
