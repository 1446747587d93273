"""The pretraining run: build everything, loop, publish the backbone; how a run lives is launch/run/training.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor

from launch.data.bad_pictures import BadPictures
from launch.data.loading import enduring
from launch.data.order import plan_batches
from launch.data.sources import StreamCells, open_source
from launch.run.accelerator import build_accelerator, on_main, strategy
from launch.run.folder import open_run
from launch.run.metrics import RunLog, Throughput, peak_memory_gb
from launch.run.optim import build_optimizer, learning_rate
from launch.run.randomness import seed_of
from launch.run.training import Training
from launch.state.sharding import shape_of
from pretrain.config import PretrainConfig
from pretrain.data import Batch, DataConfig, View, Views, build_loader, collate
from pretrain.mae.model import MaskedAutoencoder, Reconstruction, Split, split_patches
from pretrain.mae.reconstructions import draw_reconstructions, reconstruction_grid
from vim_backbone import VisionMamba
from vim_backbone.block import Block
from vim_backbone.errors import require
from vim_backbone.folder import model_card
from vim_backbone.preprocessing import to_model

FIXED_ON_RESUME = ("model.", "decoder.")
SAMPLES_SHOWN = 8
SHOWN_EPOCH = 2**31
"""Key of the views that are shown, far from any epoch, so that none of them is trained on."""


@dataclass
class Run:
    """What the loop works with."""

    config: PretrainConfig
    source: Any
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
    source = open_source(data.source, split=data.split, column=data.column, streaming=data.streaming)
    pictures = None if isinstance(source, StreamCells) else len(source)
    total_steps = config.total_steps(pictures)
    accelerator = build_accelerator(config, config.accumulation)
    plan = plan_batches(accelerator, config.batch_size, config.accumulation)
    on_main(accelerator, lambda: refuse_to_compile_native_sizes(accelerator, data))
    start = on_main(accelerator, lambda: open_run(config, FIXED_ON_RESUME))

    architecture = config.model.architecture()
    view = View(architecture.img_size, architecture.grid(*architecture.img_size), data, config.mask)
    bad = BadPictures(config.folder / "bad_pictures.txt", pictures, data.max_bad_share)

    def batches_from(number: int) -> Iterator[Batch]:
        loader = build_loader(source, view, config.seed, plan, number, total_steps, bad.known)
        return (batch for batch in loader if batch is not None)

    with Training(config, accelerator, total_steps, start.checkpoint) as training:
        training.prepare(
            lambda: build_model(config),
            lambda model: build_optimizer(model, config.optim, config.batch_size),
            unit=Block,
            micro_batch=plan.micro_batch,
            clip_grad=config.optim.clip_grad,
            ema_decay=config.ema_decay,
        )
        with RunLog(config, accelerator, total_steps, training.state.step) as log:
            batches = enduring(batches_from, training.state.step * config.accumulation, log.say)
            run = Run(config, source, view, batches, training, log, bad)
            for line in (introduction(run, pictures), *start.notes):
                log.say(line)
            train(run)
            publish(run)
    return config.folder


def refuse_to_compile_native_sizes(accelerator: Accelerator, data: DataConfig) -> None:
    """Raise UserError where every step would be compiled anew."""
    plugin = accelerator.state.dynamo_plugin
    compiled = plugin is not None and plugin.backend != DynamoBackend.NO
    remedy = "every step would be compiled anew: launch with --dynamo_backend no, or take fixed sizes"
    require(not (compiled and data.sizes == "native"), "data.sizes", data.sizes, remedy)


def build_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The model as it is before the first step, the same for one seed on every process."""
    torch.manual_seed(seed_of(config.seed))
    encoder = VisionMamba(config.model.architecture())
    encoder.set_grad_checkpointing(config.model.grad_checkpointing)
    return MaskedAutoencoder(encoder, config.decoder)


def train(run: Run) -> None:
    """The loop: steps until the last one, or until a signal; what was done is saved either way."""
    config, training, device = run.config, run.training, run.training.accelerator.device
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
            patches = patches_on(device, batch.masks)
            speed.tokens += patches.visible.numel() * training.accelerator.num_processes
            with part:
                training.backward(training.model(to_model(images, device), *patches))
        training.update(learning_rate(step, config.optim, config.batch_size, training.total_steps), names)
        speed.images += config.batch_size

        done = step + 1
        if training.notice:
            run.log.say(training.notice)
        if done % config.log_every == 0 or done == training.total_steps:
            latest = {"loss": training.loss, "lr": training.rate, "grad_norm": training.grad_norm} | speed.read()
            run.log.metrics(done, latest | {"memory_gb": peak_memory_gb(device)})
        run.log.progress(done, latest)
        if done % config.picture_every == 0 or done == training.total_steps:
            show_reconstructions(run, batch)


def checked(run: Run, batch: Batch) -> Tensor | list[Tensor]:
    """Images of a batch, its bad pictures counted and named."""
    for line in run.bad.add(batch):
        run.log.say(line)
    assert batch.images is not None
    return batch.images


def patches_on(device: torch.device, masks: Tensor | list[Tensor]) -> Split:
    """What the model is told of the masks, on its device; split on the CPU, where counting waits for nothing."""
    visible, hidden, lengths = split_patches(masks)
    return Split(visible.to(device, non_blocking=True), hidden.to(device, non_blocking=True), lengths)


def show_reconstructions(run: Run, batch: Batch | None) -> None:
    """Write reconstructions/step-N.png: views of the same pictures each time (of a stream: of the batch at hand).

    For all processes, because the model may be spread over them.
    """
    training = run.training
    assert batch is not None
    assert batch.images is not None
    images, masks = batch.images[:SAMPLES_SHOWN], batch.masks[:SAMPLES_SHOWN]
    if not isinstance(run.source, StreamCells):
        views = Views(run.source, run.view, run.config.seed)
        count = len(run.source)
        samples = [views[SHOWN_EPOCH + i // count, i % count] for i in range(SAMPLES_SHOWN)]
        shown = collate([sample for sample in samples if sample.image is not None], run.view.native)
        assert shown is not None
        assert shown.images is not None
        images, masks = shown.images, shown.masks
    device = training.accelerator.device
    images = to_model(images, device)
    with training.evaluating() as model:
        made = model(images, *patches_on(device, masks), reconstruct=True)
    assert isinstance(made, Reconstruction)
    if training.accelerator.is_main_process:
        patch_size = run.config.model.architecture().patch_size
        hidden = round(100 * torch.cat([mask.float() for mask in masks]).mean().item())
        step = training.state.step
        title = f"{run.config.name}: step {step}, {hidden} % of the patches hidden, crops never trained on"
        path = run.config.folder / "reconstructions" / f"step-{step:08d}.png"
        draw_reconstructions(reconstruction_grid(made.pixels, images, masks, patch_size), title, path)


def publish(run: Run) -> None:
    """Write the encoder, averaged where averaging is on, as the run's `backbone/`, and say where things are.

    For all processes; the main one writes, and none ever holds the whole model beside its own part but the main one.
    """
    config, training = run.config, run.training
    model = training.state.model
    assert isinstance(model, MaskedAutoencoder)
    tensors = training.published(model.encoder)
    folder = config.folder / "backbone"
    history = (
        f"\n## Pretraining\n\nMasked autoencoding of {config.data.source!r}: {training.state.step} steps of "
        f"{config.batch_size} pictures, {run.view.sizes}, {config.mask.ratio:.0%} of the patches hidden "
        f"({config.mask.kind}), {config.precision}, seed {config.seed}"
        f"{f', weights averaged with decay {config.ema_decay}' if config.ema_decay else ''}.\n"
    )
    card = model_card(model.encoder.config, "backbone") + history
    on_main(training.accelerator, lambda: model.encoder.save_pretrained(folder, card=card, tensors=tensors))
    run.log.say(
        f"{training.state.step} steps done, {len(run.bad.known)} bad pictures skipped; the backbone is in {folder}"
    )


def introduction(run: Run, pictures: int | None) -> str:
    """One line on what is about to be trained."""
    config, accelerator, done = run.config, run.training.accelerator, run.training.state.step
    model = run.training.state.model
    assert isinstance(model, MaskedAutoencoder)
    encoder = sum(shape_of(p).numel() for p in model.encoder.parameters()) / 1e6
    start = f"from step {done} " if done else ""
    return (
        f"{config.model.name} ({encoder:.1f} M parameters) on {pictures if pictures is not None else 'streamed'} "
        f"pictures of {config.data.source!r}, {run.view.sizes}, {start}"
        f"to step {run.training.total_steps}, {accelerator.num_processes} x {accelerator.device.type} "
        f"{strategy(accelerator)}, {config.precision}"
    )
