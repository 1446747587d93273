"""The pretraining run: build everything, loop, publish the backbone; how a run lives is launch/run/training.py."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn

from launch.data.bad_pictures import BadPictures
from launch.data.first_look import look_at_first
from launch.data.loading import enduring, number_of_workers, workers_of_stream
from launch.data.sources import Source, length_of, passes_over, what_was_left_out
from launch.data.streams import Stream
from launch.run.accelerator import autocast, build_accelerator, on_main, strategy
from launch.run.folder import CHECKPOINTS, run_folder
from launch.run.metrics import RunLog, Throughput, peak_memory_gb
from launch.run.optim import build_optimizer, learning_rate
from launch.run.randomness import seed_of
from launch.run.training import SMALLER, Training, start_training
from launch.state.checkpoint import TrainState, checkpoints
from launch.state.sharding import fill, shape_of, zero_stage
from pretrain.cached import cached_batches, decode_once
from pretrain.config import PretrainConfig
from pretrain.data import Batch, DataConfig, View, Views, build_loader, collate
from pretrain.initial import initial_weights
from pretrain.objective import Objective
from pretrain.packs import STARTS, Packs, PackSampler
from pretrain.plan import fitting_level, remedy
from pretrain.report import REPORT, write_report
from pretrain.stages import Stage, pixels_of, stage_at
from pretrain.watching.evaluate import patch_features
from pretrain.watching.maps import FEATURES, draw_maps
from pretrain.watching.sets import check_sets, hold_out, open_sets, require_same_held_out
from pretrain.watching.watch import Watch
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.block import Block, set_recompute
from vim_backbone.errors import UserError, first_line, require
from vim_backbone.folder import model_card
from vim_backbone.memory import LEVELS, Recompute
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
    stages: list[Stage]
    packs: Packs | None
    """Which samples each step has, where a batch counts patches."""
    batches: Iterator[Batch]
    training: Training
    log: RunLog
    bad: BadPictures
    watch: Watch


def pretrain(config: PretrainConfig) -> Path:
    """Train as the config says and return the run's folder, with the backbone published in `backbone/`.

    Raises UserError before any work where something asked for cannot be done, and Stopped after an interrupt.
    """
    data = config.data
    everything = data.open()
    source, held_out = hold_out(everything, config.eval.share, config.seed)
    sets = open_sets(config.eval, held_out, config.seed)
    pictures = length_of(source)
    total_steps = config.total_steps(pictures)
    accelerator = build_accelerator(config, config.accumulation)
    world = accelerator.num_processes
    on_main(accelerator, lambda: config.schedule(total_steps, world, rank=0))
    stages = config.schedule(total_steps, world, accelerator.process_index)
    on_main(accelerator, lambda: refuse_to_compile_many_shapes(accelerator, data))
    compile_by_stage(accelerator, stages)
    on_main(accelerator, lambda: look_at_first(source, data.preprocessing, data.max_megapixels, data.max_bad_share))
    on_main(accelerator, lambda: check_sets(sets, config.eval, data))
    objective, architecture = config.method, config.architecture()
    native = data.sizes == "native"
    on_main(accelerator, lambda: objective.prepare(architecture, data.preprocessing, native=native))
    fixed = ("objective", "model.", "data.bands", "data.statistics", "eval.share", *objective.architecture_fields)
    fixed += ("seed",) if held_out else ()  # what was held out before would be trained on
    cache = decode_once(source, data, accelerator.device)
    initial, taken_up = weights_to_start_from(config, architecture)
    with run_folder(accelerator, config, fixed, total_steps) as start:
        bad = BadPictures(config.folder / "bad_pictures.txt", pictures, data.max_bad_share)
        level = level_of_all_stages(config, accelerator, stages)
        settled = replace(config, model=replace(config.model, recompute=level))
        with start_training(
            config,
            accelerator,
            total_steps,
            start.checkpoint,
            lambda: build_model(settled, initial),
            lambda model: build_optimizer(model, config.optim, stages[0].plan.batch_size),
            unit=Block,
            micro_batch=max(stage.plan.micro_batch for stage in stages),
            clip_grad=config.optim.clip_grad,
            ema_decay=config.ema_decay,
            remedy=partial(what_fits, config, accelerator, level),
        ) as training:
            initial.clear()  # they are in the model; under ZeRO-3 no process is to hold all of it
            first = training.state.step
            require_same_pixels(training.state, data)
            require_same_held_out(training.state, held_out)
            workers, lines = settled_workers(data, source, training)
            settled_data = replace(data, workers=workers)
            view = View(architecture.img_size, architecture.grid(*architecture.img_size), settled_data, objective.draw)
            packs = packs_of(config, source, view, stages, training.state)

            def batches_from(number: int) -> Iterator[Batch]:
                if cache is not None:
                    return cached_batches(cache, view, objective.draw_batch, config.seed, stages, number)
                sampler = PackSampler(packs, number) if packs is not None else None
                loader = build_loader(source, view, config.seed, stages, number, bad.known, sampler)
                return (batch for batch in loader if batch is not None)

            with RunLog(config, accelerator, total_steps, first, pixels_of(stages)) as log:
                batches = enduring(batches_from, first * config.accumulation, log.say)
                watch = Watch(config, objective, sets, view, training, log)
                run = Run(config, objective, source, view, stages, packs, batches, training, log, bad, watch)
                made_again = [f"made again in the backward pass: {level}"] * (config.model.recompute == "auto")
                fresh = taken_up if start.checkpoint is None else []
                left_out = what_was_left_out(everything)
                for line in (introduction(run, pictures), *left_out, *made_again, *config.not_used(), *fresh,
                             *start.notes, *lines):  # fmt: skip
                    log.say(line)
                train(run)
                publish(run)
    return config.folder


def packs_of(
    config: PretrainConfig, source: Source, view: View, stages: list[Stage], state: TrainState
) -> Packs | None:
    """Which samples each step has, from the state's step on, where a batch counts patches."""
    if config.data.batch_by != "patches":
        return None
    assert not isinstance(source, Stream)
    return Packs(source, view, config.seed, stages, state.step, state.extra.get(STARTS, {}))


def weights_to_start_from(config: PretrainConfig, architecture: VimConfig) -> tuple[dict[str, Tensor], list[str]]:
    """As `initial_weights`, for a run that has none or goes on from a checkpoint nothing."""
    if config.init is None or (config.resume and checkpoints(config.folder / CHECKPOINTS)):
        return {}, []
    return initial_weights(config.init, architecture, config.data.preprocessing)


def require_same_pixels(state: TrainState, data: DataConfig) -> None:
    """Raise UserError where pixels would reach the model otherwise than before; note how they do in the state."""
    now = data.preprocessing.to_dict()
    before = state.extra.setdefault("preprocessing", now)
    if changed := [key for key in before | now if before.get(key) != now.get(key)]:
        raise UserError(
            f"the run was started with {changed[0]} {before.get(changed[0])}, and data.statistics, data.range and "
            f"data.nodata say {now.get(changed[0])} now: leave them as they were, or start another run"
        )


def settled_workers(data: DataConfig, source: Source, training: Training) -> tuple[int, list[str]]:
    """Data-loading processes of each training process, and lines for the user. For all processes."""
    if not isinstance(source, Stream):
        return number_of_workers(data.workers), []
    accelerator = training.accelerator  # hosts may differ in cores, and all must count the readers alike
    return on_main(accelerator, lambda: workers_of_stream(data.workers, accelerator.num_processes, training.state))


def is_compiled(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for `torch.compile`."""
    plugin = accelerator.state.dynamo_plugin
    return plugin is not None and plugin.backend != DynamoBackend.NO


def refuse_to_compile_many_shapes(accelerator: Accelerator, data: DataConfig) -> None:
    """Raise UserError where every step would be compiled anew."""
    remedy = "every step would be compiled anew: launch with --dynamo_backend no, or take fixed sizes"
    compiled = is_compiled(accelerator)
    require(not (compiled and data.sizes == "native"), "data.sizes", data.sizes, remedy)
    remedy = "its pictures differ in bands, every step would be compiled anew: launch with --dynamo_backend no"
    require(not (compiled and data.preprocessing.channel_sets), "data.statistics", data.statistics, remedy)


def compile_by_stage(accelerator: Accelerator, stages: list[Stage]) -> None:
    """Let `torch.compile` compile every stage for its own sizes, where it would leave them open from the second on."""
    if len(stages) > 1 and is_compiled(accelerator):
        plugin: Any = accelerator.state.dynamo_plugin
        plugin.dynamic = bool(plugin.dynamic)
        limit: Any = torch._dynamo.config
        limit.recompile_limit = max(limit.recompile_limit, len(stages))


def level_of_all_stages(config: PretrainConfig, accelerator: Accelerator, stages: list[Stage]) -> Recompute:
    """What the backward pass makes again, with which every stage fits."""
    levels: list[Recompute] = []
    for each, stage in zip(config.by_stage(), stages, strict=True):
        plan = stage.plan
        over = config.data.batch_by == "patches" and plan.micro_batch < plan.batch_size  # see `balanced`
        levels.append(recompute_level(each, accelerator, plan.micro_batch + over))
    return max(levels, key=LEVELS.index)


def recompute_level(config: PretrainConfig, accelerator: Accelerator, pictures: int) -> Recompute:
    """What the backward pass makes again, where the config leaves it open for forward passes of so many pictures."""
    if config.model.recompute != "auto" or accelerator.device.type != "cuda":
        return config.model.level
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory
    processes, stage = accelerator.num_processes, zero_stage(accelerator)
    return fitting_level(config, memory=memory, processes=processes, stage=stage, pictures=pictures)


def what_fits(config: PretrainConfig, accelerator: Accelerator, level: Recompute) -> str:
    """What to change where the memory does not suffice, in words."""
    if accelerator.device.type != "cuda":
        return SMALLER
    total = torch.cuda.get_device_properties(accelerator.device).total_memory
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    memory = min(total, free + torch.cuda.memory_reserved(accelerator.device))  # others may have the rest
    return remedy(
        config, memory=memory, processes=accelerator.num_processes, stage=zero_stage(accelerator), level=level
    )


def build_model(config: PretrainConfig, initial: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The model as it is before the first step, the same for one seed on every process; `initial`: its encoder."""
    torch.manual_seed(seed_of(config.seed))
    model = config.method.build(VisionMamba(config.architecture()), config.data.preprocessing)
    if initial:
        fill(config.method.encoder(model), initial.__getitem__)
    set_recompute(model, config.model.level)
    return model


def train(run: Run) -> None:
    """The loop: steps until the last one, or until a signal; what was done is saved either way."""
    config, training, device = run.config, run.training, run.training.accelerator.device
    preprocessing, architecture = config.data.preprocessing, config.architecture()
    speed = Throughput()
    latest: dict[str, float] = {}
    begun: Stage | None = None
    for step in training.steps():
        stage = stage_at(run.stages, step)
        if stage is not begun:
            begun = stage
            begin(run, stage, step)
        if step == 0 and run.watch.every:
            run.watch.evaluate(stage)
            speed.read()
        torch.manual_seed(seed_of(config.seed, step, training.accelerator.process_index))  # for stochastic depth
        names: list[str] = []
        batch = None
        for part in training.parts():
            batch = speed.waiting(run.batches)
            images = checked(run, batch)
            names += batch.names
            inputs = run.objective.inputs(batch.extras, device, architecture.tokens_of(images))
            speed.tokens += inputs.tokens * training.accelerator.num_processes
            with part:
                loss = training.model(to_model(images, device, preprocessing), *inputs.arguments)
                training.backward(loss if run.packs is None else loss * run.packs.weight(step, len(batch.names)))
        if run.packs is not None:
            training.state.extra[STARTS] = run.packs.state(step + 1)
        training.update(learning_rate(step, config.optim, stage.plan.batch_size, training.total_steps), names)
        speed.images += stage.plan.batch_size if run.packs is None else run.packs.views(step)

        done = step + 1
        if done % config.log_every == 0 or done == training.total_steps:
            training.settle()
            stage_metrics = stage.metrics() if len(run.stages) > 1 else {}
            latest = {"loss": training.loss, "lr": training.rate, "grad_norm": training.grad_norm} | speed.read()
            run.log.metrics(done, latest | {"memory_gb": peak_memory_gb(device)} | stage_metrics)
            run.watch.row(done, latest | stage_metrics)
        run.log.progress(done, latest)
        for line in training.new_notices():
            run.log.say(line)
        if done % config.picture_every == 0 or done == training.total_steps:
            show(run, batch, stage)
        if run.watch.due(done):
            run.watch.evaluate(stage)
            speed.read()  # its time is none of the next row's


def begin(run: Run, stage: Stage, step: int) -> None:
    """Of a run in stages: one begins, or goes on after a resume. For all processes."""
    training = run.training
    if len(run.stages) == 1:
        return
    if step == stage.steps.start:
        training.expect_change()
    steps = f"steps {stage.steps.start + 1} to {stage.steps.stop}"
    compiled = "; its first step is compiled anew" if is_compiled(training.accelerator) else ""
    run.log.say(f"stage {stage.number} of {len(run.stages)}, {steps}: {stage_in_words(run, stage)}{compiled}")


def stage_in_words(run: Run, stage: Stage) -> str:
    """Batch and views of a stage."""
    view, count = run.view.sized(stage.img_size), stage.plan.batch_size
    batch = f"{count} pictures" if run.packs is None else f"{count * view.grid[0] * view.grid[1]} patches"
    return f"{batch}, {view.sizes}"


def checked(run: Run, batch: Batch) -> Tensor | list[Tensor]:
    """Images of a batch, its bad pictures counted and named."""
    for line in run.bad.add(batch):
        run.log.say(line)
    assert batch.images is not None
    return batch.images


def show(run: Run, batch: Batch | None, stage: Stage) -> None:
    """Draw what was learned, as step-N.png: on the same pictures each time (of a stream: on the batch at hand).

    What the objective shows, and the features of the patches as colours.

    For all processes, because the model may be spread over them.
    """
    training, step = run.training, run.training.state.step
    crops, source = "crops of this step", run.watch.sets.held_out or run.source
    if not isinstance(source, Stream):
        views, passes = Views(source, run.view, run.config.seed), passes_over(source, run.config.seed)
        places = [passes.in_order(i) for i in range(SAMPLES_SHOWN)]
        samples = [views[SHOWN_EPOCH + epoch, index, stage.img_size] for epoch, index in places]
        if good := [sample for sample in samples if sample.image is not None]:
            batch = collate(good, run.view.packed)
            crops = "pictures never trained on" if run.watch.sets.held_out else "pictures trained on, crops not"
    assert batch is not None
    assert batch.images is not None
    preprocessing = run.config.data.preprocessing
    images = to_model(batch.images[:SAMPLES_SHOWN], training.accelerator.device, preprocessing)
    with training.evaluating() as model:
        draw = run.objective.show(model, images, batch.extras[:SAMPLES_SHOWN], preprocessing)
        with autocast(run.config.precision, training.accelerator.device):
            maps = patch_features(run.objective.encoder(model), images)
    if training.accelerator.is_main_process:
        draw_features = partial(draw_maps, images, maps, preprocessing)
        draw_learned = partial(draw, f"{run.config.name}: step {step}, {crops}")
        for folder, draw_in in ((run.objective.picture_folder, draw_learned), (FEATURES, draw_features)):
            path = run.config.folder / folder / f"step-{step:08d}.png"
            draw_in(path)
            run.log.picture(step, folder, path)


def publish(run: Run) -> None:
    """Write the encoder, averaged where averaging is on, as the run's `backbone/`, and say where things are.

    For all processes; the main one writes, and none ever holds the whole model beside its own part but the main one.
    """
    config, training = run.config, run.training
    encoder = run.objective.encoder(training.state.model)
    tensors = training.published(encoder)
    folder = config.folder / "backbone"
    steps = ", then ".join(f"{len(stage.steps)} steps of {stage_in_words(run, stage)}" for stage in run.stages)
    history = (
        f"\n## Pretraining\n\n{run.objective.title} of {config.data.title!r}: {steps}, "
        f"{run.objective.summary}, {config.precision}, "
        f"seed {config.seed}{f', weights averaged with decay {config.ema_decay}' if config.ema_decay else ''}"
        f"{f', from the weights of {config.init}' if config.init else ''}.\n"
    )
    card = model_card(encoder.config, "backbone", config.data.preprocessing) + history
    more = {"preprocessing": config.data.preprocessing, "card": card, "tensors": tensors}
    on_main(training.accelerator, lambda: encoder.save_pretrained(folder, **more))
    run.log.say(
        f"{training.state.step} steps done, {len(run.bad.known)} bad pictures skipped; the backbone is in {folder}"
    )
    if training.accelerator.is_main_process:
        try:
            write_report([config.folder], config.folder / REPORT)
        except Exception as error:  # all is done and published: a page is no reason to fail
            again = f"python -m pretrain.report {config.folder} tries again"
            run.log.say(f"{REPORT} is not written ({first_line(error)}): {again}")


def introduction(run: Run, pictures: int | None) -> str:
    """One line on what is about to be trained."""
    config, accelerator, done = run.config, run.training.accelerator, run.training.state.step
    encoder = run.objective.encoder(run.training.state.model)
    millions = sum(shape_of(p).numel() for p in encoder.parameters()) / 1e6
    start = f"from step {done} " if done else ""
    sizes = ", then ".join(run.view.sized(stage.img_size).sizes for stage in run.stages)
    return (
        f"{config.model.name} ({millions:.1f} M parameters) on {pictures if pictures is not None else 'streamed'} "
        f"pictures of {config.data.title!r}, {sizes}, {start}"
        f"to step {run.training.total_steps}, {accelerator.num_processes} x {accelerator.device.type} "
        f"{strategy(accelerator)}, {config.precision}, data.workers {run.view.data.workers}"
    )
