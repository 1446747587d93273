"""The pretraining run: build everything, loop, publish the backbone; how a run lives is launch/run/training.py."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn

from launch.data.bad_pictures import BadPictures
from launch.data.first_look import look_at_first
from launch.data.loading import enduring, number_of_workers, workers_of_stream
from launch.data.order import plan_batches
from launch.data.sources import Source, length_of, passes_over, what_was_left_out
from launch.data.streams import Stream
from launch.run.accelerator import build_accelerator, on_main, strategy
from launch.run.folder import run_folder
from launch.run.metrics import RunLog, Throughput, peak_memory_gb
from launch.run.optim import build_optimizer, learning_rate
from launch.run.randomness import seed_of
from launch.run.training import Training, start_training
from launch.state.checkpoint import TrainState
from launch.state.sharding import shape_of, zero_stage
from pretrain.config import PretrainConfig
from pretrain.data import Batch, DataConfig, View, Views, build_loader, collate
from pretrain.objective import Objective
from pretrain.plan import fitting_level
from vim_backbone import VisionMamba
from vim_backbone.block import Block, set_recompute
from vim_backbone.errors import UserError, require
from vim_backbone.folder import model_card
from vim_backbone.memory import Recompute
from vim_backbone.preprocessing import to_model

SAMPLES_SHOWN = 8
SHOWN_EPOCH = 2**31
"""Key of the views that are shown, far from any epoch, so that none of them is trained on."""


@dataclass
class Run:
    """What the loop works with."""

    config: PretrainConfig
    objective: Objective
    source: Source
    view: View
    batches: Iterator[Batch]
    training: Training
    log: RunLog
    bad: BadPictures


def pretrain(config: PretrainConfig) -> Path:
    """Train as the config says and return the run's folder, with the backbone published in `backbone/`.

    Raises UserError before any work where something asked for cannot be done, and Stopped after an interrupt.
    """
    data = config.data
    source = data.open()
    pictures = length_of(source)
    total_steps = config.total_steps(pictures)
    accelerator = build_accelerator(config, config.accumulation)
    plan = plan_batches(accelerator, config.batch_size, config.accumulation)
    on_main(accelerator, lambda: refuse_to_compile_native_sizes(accelerator, data))
    on_main(accelerator, lambda: look_at_first(source, data.preprocessing, data.max_megapixels, data.max_bad_share))
    objective = config.objective
    fixed = ("model.", "data.bands", "data.statistics", *objective.architecture_fields)
    with run_folder(accelerator, config, fixed, total_steps) as start:
        architecture = config.architecture()
        bad = BadPictures(config.folder / "bad_pictures.txt", pictures, data.max_bad_share)
        level = recompute_level(config, accelerator, plan.micro_batch)
        settled = replace(config, model=replace(config.model, recompute=level))
        with start_training(
            config,
            accelerator,
            total_steps,
            start.checkpoint,
            lambda: build_model(settled),
            lambda model: build_optimizer(model, config.optim, config.batch_size),
            unit=Block,
            micro_batch=plan.micro_batch,
            clip_grad=config.optim.clip_grad,
            ema_decay=config.ema_decay,
        ) as training:
            first = training.state.step
            require_same_pixels(training.state, data)
            workers, lines = settled_workers(data, source, training)
            settled_data = replace(data, workers=workers)
            view = View(architecture.img_size, architecture.grid(*architecture.img_size), settled_data, objective.draw)

            def batches_from(number: int) -> Iterator[Batch]:
                loader = build_loader(source, view, config.seed, plan, number, total_steps, bad.known)
                return (batch for batch in loader if batch is not None)

            with RunLog(config, accelerator, total_steps, first) as log:
                batches = enduring(batches_from, first * config.accumulation, log.say)
                run = Run(config, objective, source, view, batches, training, log, bad)
                made_again = [f"made again in the backward pass: {level}"] * (config.model.recompute == "auto")
                introductory = (
                    introduction(run, pictures),
                    *what_was_left_out(source),
                    *made_again,
                    *start.notes,
                    *lines,
                )
                for line in introductory:
                    log.say(line)
                train(run)
                publish(run)
    return config.folder


def require_same_pixels(state: TrainState, data: DataConfig) -> None:
    """Raise UserError where pixels would reach the model otherwise than before; note how they do in the state."""
    now = data.preprocessing.to_dict()
    before = state.extra.setdefault("preprocessing", now)
    if changed := [key for key in now if before.get(key) != now[key]]:
        raise UserError(
            f"the run was started with {changed[0]} {before.get(changed[0])}, and data.statistics, data.range and "
            f"data.nodata say {now[changed[0]]} now: leave them as they were, or start another run"
        )


def settled_workers(data: DataConfig, source: Source, training: Training) -> tuple[int, list[str]]:
    """Data-loading processes of each training process, and lines for the user. For all processes."""
    if not isinstance(source, Stream):
        return number_of_workers(data.workers), []
    accelerator = training.accelerator  # hosts may differ in cores, and all must count the readers alike
    return on_main(accelerator, lambda: workers_of_stream(data.workers, accelerator.num_processes, training.state))


def refuse_to_compile_native_sizes(accelerator: Accelerator, data: DataConfig) -> None:
    """Raise UserError where every step would be compiled anew."""
    plugin = accelerator.state.dynamo_plugin
    compiled = plugin is not None and plugin.backend != DynamoBackend.NO
    remedy = "every step would be compiled anew: launch with --dynamo_backend no, or take fixed sizes"
    require(not (compiled and data.sizes == "native"), "data.sizes", data.sizes, remedy)


def recompute_level(config: PretrainConfig, accelerator: Accelerator, pictures: int) -> Recompute:
    """What the backward pass makes again, where the config leaves it open for forward passes of so many pictures."""
    if config.model.recompute != "auto" or accelerator.device.type != "cuda":
        return config.model.level
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory
    processes, stage = accelerator.num_processes, zero_stage(accelerator)
    return fitting_level(config, memory=memory, processes=processes, stage=stage, pictures=pictures)


def build_model(config: PretrainConfig) -> nn.Module:
    """The model as it is before the first step, the same for one seed on every process."""
    torch.manual_seed(seed_of(config.seed))
    model = config.objective.build(VisionMamba(config.architecture()))
    set_recompute(model, config.model.level)
    return model


def train(run: Run) -> None:
    """The loop: steps until the last one, or until a signal; what was done is saved either way."""
    config, training, device = run.config, run.training, run.training.accelerator.device
    preprocessing = config.data.preprocessing
    speed = Throughput()
    latest: dict[str, float] = {}
    for step in training.steps():
        torch.manual_seed(seed_of(config.seed, step, training.accelerator.process_index))  # for stochastic depth
        names: list[str] = []
        batch = None
        for part in training.parts():
            batch = speed.waiting(run.batches)
            images = checked(run, batch)
            names += batch.names
            inputs = run.objective.inputs(batch.extras, device)
            speed.tokens += inputs.tokens * training.accelerator.num_processes
            with part:
                training.backward(training.model(to_model(images, device, preprocessing), *inputs.arguments))
        training.update(learning_rate(step, config.optim, config.batch_size, training.total_steps), names)
        speed.images += config.batch_size

        done = step + 1
        if done % config.log_every == 0 or done == training.total_steps:
            training.settle()
            latest = {"loss": training.loss, "lr": training.rate, "grad_norm": training.grad_norm} | speed.read()
            run.log.metrics(done, latest | {"memory_gb": peak_memory_gb(device)})
        run.log.progress(done, latest)
        for line in training.new_notices():
            run.log.say(line)
        if done % config.picture_every == 0 or done == training.total_steps:
            show(run, batch)


def checked(run: Run, batch: Batch) -> Tensor | list[Tensor]:
    """Images of a batch, its bad pictures counted and named."""
    for line in run.bad.add(batch):
        run.log.say(line)
    assert batch.images is not None
    return batch.images


def show(run: Run, batch: Batch | None) -> None:
    """Draw what was learned, as step-N.png: on the same pictures each time (of a stream: on the batch at hand).

    For all processes, because the model may be spread over them.
    """
    training, step = run.training, run.training.state.step
    crops = "crops of this step"
    if not isinstance(run.source, Stream):
        views, passes = Views(run.source, run.view, run.config.seed), passes_over(run.source, run.config.seed)
        places = [passes.in_order(i) for i in range(SAMPLES_SHOWN)]
        samples = [views[SHOWN_EPOCH + epoch, index] for epoch, index in places]
        batch = collate([sample for sample in samples if sample.image is not None], run.view.native)
        crops = "crops never trained on"
    assert batch is not None
    assert batch.images is not None
    preprocessing = run.config.data.preprocessing
    images = to_model(batch.images[:SAMPLES_SHOWN], training.accelerator.device, preprocessing)
    with training.evaluating() as model:
        draw = run.objective.show(model, images, batch.extras[:SAMPLES_SHOWN], preprocessing)
    if training.accelerator.is_main_process:
        path = run.config.folder / run.objective.picture_folder / f"step-{step:08d}.png"
        draw(f"{run.config.name}: step {step}, {crops}", path)


def publish(run: Run) -> None:
    """Write the encoder, averaged where averaging is on, as the run's `backbone/`, and say where things are.

    For all processes; the main one writes, and none ever holds the whole model beside its own part but the main one.
    """
    config, training = run.config, run.training
    encoder = run.objective.encoder(training.state.model)
    tensors = training.published(encoder)
    folder = config.folder / "backbone"
    history = (
        f"\n## Pretraining\n\n{run.objective.title} of {config.data.title!r}: {training.state.step} steps of "
        f"{config.batch_size} pictures, {run.view.sizes}, {run.objective.summary}, {config.precision}, "
        f"seed {config.seed}{f', weights averaged with decay {config.ema_decay}' if config.ema_decay else ''}.\n"
    )
    card = model_card(encoder.config, "backbone", config.data.preprocessing) + history
    more = {"preprocessing": config.data.preprocessing, "card": card, "tensors": tensors}
    on_main(training.accelerator, lambda: encoder.save_pretrained(folder, **more))
    run.log.say(
        f"{training.state.step} steps done, {len(run.bad.known)} bad pictures skipped; the backbone is in {folder}"
    )


def introduction(run: Run, pictures: int | None) -> str:
    """One line on what is about to be trained."""
    config, accelerator, done = run.config, run.training.accelerator, run.training.state.step
    encoder = run.objective.encoder(run.training.state.model)
    millions = sum(shape_of(p).numel() for p in encoder.parameters()) / 1e6
    start = f"from step {done} " if done else ""
    return (
        f"{config.model.name} ({millions:.1f} M parameters) on {pictures if pictures is not None else 'streamed'} "
        f"pictures of {config.data.title!r}, {run.view.sizes}, {start}"
        f"to step {run.training.total_steps}, {accelerator.num_processes} x {accelerator.device.type} "
        f"{strategy(accelerator)}, {config.precision}, data.workers {run.view.data.workers}"
    )
