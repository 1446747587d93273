"""The pretraining run: build everything, loop over steps, save, publish the backbone."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from launch.accelerator import build_accelerator
from launch.checkpoint import TrainState, checkpoints, load_checkpoint, save_checkpoint
from launch.folder import CHECKPOINTS, open_run
from launch.metrics import RunLog, Throughput, peak_memory_gb
from launch.optim import build_optimizer, learning_rate, set_learning_rate
from launch.randomness import seed_of
from launch.signals import Stopped, StopRequest, stop_requests
from pretrain.config import PretrainConfig
from pretrain.data import BadPictures, Batch, BatchPlan, View, Views, build_loader, to_model
from pretrain.images import StreamCells, open_source
from pretrain.mae import MaskedAutoencoder
from pretrain.reconstructions import draw_reconstructions, reconstruction_grid
from vim_backbone import VisionMamba
from vim_backbone.folder import model_card

FIXED_ON_RESUME = ("model.", "decoder.")
SAMPLES_SHOWN = 8
SHOWN_EPOCH = 2**31
"""Key of the views that are shown, far from any epoch, so that none of them is trained on."""


@dataclass
class Run:
    """What the loop works with. `model` and `optimizer` are those of `state`, prepared for the launcher's strategy."""

    config: PretrainConfig
    source: Any
    view: View
    state: TrainState
    model: torch.nn.Module
    optimizer: Any
    batches: Iterator[Batch]
    accelerator: Accelerator
    log: RunLog
    bad: BadPictures
    stop: StopRequest
    total_steps: int


def pretrain(config: PretrainConfig) -> Path:
    """Train as the config says and return the run's folder, with the backbone published in `backbone/`.

    Raises UserError before any work where something asked for cannot be done, and Stopped after an interrupt.
    """
    data = config.data
    source = open_source(data.source, split=data.split, column=data.column, streaming=data.streaming)
    pictures = None if isinstance(source, StreamCells) else len(source)
    total_steps = config.total_steps(pictures)
    accelerator = build_accelerator(config, config.accumulation)
    plan = BatchPlan(config.batch_size, config.accumulation, accelerator.num_processes, accelerator.process_index)
    notes = open_run(config, FIXED_ON_RESUME) if accelerator.is_main_process else []
    accelerator.wait_for_everyone()

    state = build_state(config)
    if config.resume:
        load_checkpoint(state, checkpoints(config.folder / CHECKPOINTS)[-1])
    if state.ema is not None:
        state.ema.to(accelerator.device)
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    architecture = config.model.architecture()
    view = View(architecture.img_size, architecture.grid(*architecture.img_size), data, config.mask)
    bad = BadPictures(config.folder / "bad_pictures.txt", pictures, data.max_bad_share)
    loader = build_loader(source, view, config.seed, plan, state.step, total_steps, bad.known)
    batches = (batch for batch in loader if batch is not None)
    with RunLog(config, accelerator, total_steps, state.step) as log, stop_requests() as stop:
        run = Run(
            config, source, view, state, model, optimizer, batches, accelerator, log, bad, stop, total_steps
        )  # fmt: skip
        log.say(introduction(run, pictures))
        for note in notes:
            log.say(f"resumed with another {note}")
        train(run)
        if accelerator.is_main_process:
            publish(run)
    return config.folder


def build_state(config: PretrainConfig) -> TrainState:
    """Model, optimizer and average as they are before the first step, the same for one seed on every process."""
    torch.manual_seed(seed_of(config.seed))
    encoder = VisionMamba(config.model.architecture())
    encoder.set_grad_checkpointing(config.model.grad_checkpointing)
    model = MaskedAutoencoder(encoder, config.decoder)
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    return TrainState(model, build_optimizer(model, config.optim, config.batch_size), ema)


def train(run: Run) -> None:
    """The loop: steps until the last one, or until a signal; what was done is saved either way."""
    config, state, accelerator = run.config, run.state, run.accelerator
    patches = run.view.grid[0] * run.view.grid[1]
    speed = Throughput(tokens_per_image=patches - config.mask.num_masked(patches))
    latest: dict[str, float] = {}
    run.model.train()
    while state.step < run.total_steps and not must_stop(run):
        torch.manual_seed(seed_of(config.seed, state.step, accelerator.process_index))  # for stochastic depth
        rate = learning_rate(state.step, config.optim, config.batch_size, run.total_steps)
        set_learning_rate(state.optimizer, rate)
        losses, grad_norm, images, masks = [], torch.zeros(()), torch.empty(0), torch.empty(0)
        for _ in range(config.accumulation):
            images, masks = checked(run, speed.waiting(run.batches))
            with accelerator.accumulate(run.model):
                loss = run.model(to_model(images, accelerator.device), masks.to(accelerator.device))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    limit = config.optim.clip_grad or float("inf")
                    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), limit)
                run.optimizer.step()
                run.optimizer.zero_grad()
            losses.append(loss.detach())
        state.step += 1
        speed.images += config.batch_size
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)

        if state.step % config.log_every == 0 or state.step == run.total_steps:
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
            assert isinstance(mean_loss, Tensor)
            latest = {"loss": mean_loss.item(), "lr": rate, "grad_norm": float(grad_norm or 0.0)} | speed.read()
            run.log.metrics(state.step, latest | {"memory_gb": peak_memory_gb(accelerator.device)})
        run.log.progress(state.step, latest)
        if state.step % config.picture_every == 0 or state.step == run.total_steps:
            show_reconstructions(run, images, masks)
        if state.step % config.checkpoint_every == 0 or state.step == run.total_steps:
            save(run)
    if state.step < run.total_steps:
        received = run.stop.received or signal.SIGTERM
        where = save(run)
        raise Stopped(
            received,
            f"stopped by {signal.Signals(received).name} at step {state.step} of {run.total_steps}, saved in {where}; "
            "the same command with --resume goes on",
        )


def must_stop(run: Run) -> bool:
    """Whether any process got a signal; all of them learn of it at the same step."""
    asked = run.stop.received is not None
    if run.accelerator.num_processes == 1:
        return asked
    flag = torch.tensor(float(asked), device=run.accelerator.device)
    total = run.accelerator.reduce(flag, reduction="sum")
    assert isinstance(total, Tensor)
    return total.item() > 0


def save(run: Run) -> Path:
    """Write a checkpoint, on the main process, while the others wait."""
    folder = run.config.folder / CHECKPOINTS
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        save_checkpoint(run.state, folder, run.config.keep_checkpoints)
    run.accelerator.wait_for_everyone()
    return folder / f"step-{run.state.step:08d}"


def checked(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Images and masks of a batch, its bad pictures counted and named."""
    for line in run.bad.add(batch):
        run.log.say(line)
    assert batch.images is not None
    return batch.images, batch.masks


def show_reconstructions(run: Run, images: Tensor, masks: Tensor) -> None:
    """Write reconstructions/step-N.png: views of the same pictures each time (of a stream: of the batch at hand)."""
    if not run.accelerator.is_main_process:
        return
    images, masks = images[:SAMPLES_SHOWN], masks[:SAMPLES_SHOWN]
    if not isinstance(run.source, StreamCells):
        views = Views(run.source, run.view, run.config.seed)
        count = len(run.source)
        samples = [views[SHOWN_EPOCH + i // count, i % count] for i in range(SAMPLES_SHOWN)]
        usable = [(sample.image, sample.mask) for sample in samples if sample.image is not None]
        images, masks = torch.stack([image for image, _ in usable]), torch.stack([mask for _, mask in usable])
    model = run.state.ema.module if run.state.ema is not None else run.state.model
    assert isinstance(model, MaskedAutoencoder)
    device = run.accelerator.device
    grid = reconstruction_grid(model, to_model(images, device), masks.to(device))
    hidden = round(100 * masks.float().mean().item())
    title = f"{run.config.name}: step {run.state.step}, {hidden} % of the patches hidden, crops never trained on"
    draw_reconstructions(grid, title, run.config.folder / "reconstructions" / f"step-{run.state.step:08d}.png")


def publish(run: Run) -> None:
    """Write the encoder, averaged where averaging is on, as the run's `backbone/`, and say where things are."""
    config, state = run.config, run.state
    model = state.ema.module if state.ema is not None else state.model
    assert isinstance(model, MaskedAutoencoder)
    folder = config.folder / "backbone"
    patches = run.view.grid[0] * run.view.grid[1]
    history = (
        f"\n## Pretraining\n\nMasked autoencoding of {config.data.source!r}: {state.step} steps of {config.batch_size} "
        f"pictures, {config.mask.num_masked(patches)} of {patches} patches hidden ({config.mask.kind}), "
        f"{config.precision}, seed {config.seed}"
        f"{f', weights averaged with decay {config.ema_decay}' if config.ema_decay else ''}.\n"
    )
    model.encoder.save_pretrained(folder, card=model_card(model.encoder.config, "backbone") + history)
    run.log.say(f"{state.step} steps done, {len(run.bad.known)} bad pictures skipped; the backbone is in {folder}")


def introduction(run: Run, pictures: int | None) -> str:
    """One line on what is about to be trained."""
    config, accelerator = run.config, run.accelerator
    encoder = sum(p.numel() for p in run.state.model.encoder.parameters()) / 1e6  # pyright: ignore
    start = f"from step {run.state.step} " if run.state.step else ""
    return (
        f"{config.model.name} ({encoder:.1f} M parameters) on {pictures if pictures is not None else 'streamed'} "
        f"pictures of {config.data.source!r}, {run.view.img_size[0]} x {run.view.img_size[1]}, {start}"
        f"to step {run.total_steps}, {accelerator.num_processes} x {accelerator.device.type}, "
        f"{config.precision}"
    )
