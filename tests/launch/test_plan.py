"""The planner against what real steps allocate, closed forms, and the figures that it starts from."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import peak_allocated
from launch.plan import main
from launch.planning.memory import Task, fitting, footprint, peak, shares
from launch.planning.speed import measured, seconds_a_picture
from launch.run.cli import parse
from launch.run.optim import OptimConfig, build_optimizer
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.mae.model import DecoderConfig, split_patches
from pretrain.train import build_model
from vim_backbone import UserError, named_config


def task(name="vim_tiny", **changes):
    size = {"img_size": changes.pop("img_size", 224), "patch_size": 16}
    return Task(named_config(name, num_classes=0, position="sincos", **size), gpu=False, **({"half": False} | changes))


def real_peak(task, name, pictures):
    """Parameters and bytes: all that a second step on the CPU holds at its worst."""
    torch.set_num_threads(1)  # two threads wait for each other where the cores are shared
    model = ModelConfig(name=name, img_size=224, patch_size=16, depth=None, grad_checkpointing=task.recompute)
    made = build_model(PretrainConfig(model=model, decoder=DecoderConfig(width=task.decoder_width)))
    optimizer = build_optimizer(made, OptimConfig(), 256)
    images = torch.randn(pictures, 3, 224, 224)
    mask = torch.zeros(pictures, task.patches, dtype=torch.bool)
    mask[:, task.visible - task.special :] = True

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=task.half):
            loss = made(images, *split_patches(mask))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*made.parameters(), *(v for entry in optimizer.state.values() for v in entry.values())]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    return sum(p.numel() for p in made.parameters()), sum(t.nbytes for t in held) + peak_allocated(profiled)


@pytest.mark.parametrize(
    ("name", "pictures", "changes"),
    [
        ("vim_tiny", 2, {}),
        ("vim_tiny", 12, {}),
        ("vim_small", 4, {}),
        ("vim_tiny", 6, {"half": True}),
        ("vim_tiny", 6, {"recompute": True, "decoder_width": 192}),
    ],
)
def test_the_peak_of_a_real_step_is_foretold(name, pictures, changes):
    """The issue allows 15 %; 6 % is what it keeps."""
    planned = task(name, **changes)
    count, found = real_peak(planned, name, pictures)
    model = footprint(planned)
    assert model.parameters == count
    assert peak(model, shares(model, 1)[0], pictures) == pytest.approx(found, rel=0.06)


def test_the_batch_that_fits_is_the_largest():
    model = footprint(task())
    share = shares(model, 8)[2]
    batch = fitting(model, share, 4e9)
    assert peak(model, share, batch) <= 4e9 < peak(model, share, batch + 1)
    assert fitting(model, share, 1e6) == 0


def test_each_stage_spreads_one_more_part():
    model = footprint(task("vim_large"))
    ddp, zero1, zero2, zero3 = shares(model, 8)
    bytes_of = 4 * model.trained
    assert (ddp.gradients, ddp.optimizer) == (bytes_of, 2 * bytes_of)
    assert zero1.optimizer == pytest.approx(3 * bytes_of / 8)  # with its copy of the parameters
    assert zero1.gradients - zero2.gradients == pytest.approx(bytes_of * 7 / 8)
    assert zero3.parameters < zero2.parameters / 4
    assert zero3.sent == pytest.approx(1.5 * ddp.sent)


def test_half_the_visible_patches_save_nothing_in_the_decoder():
    few, many = footprint(task(mask_ratio=0.75)), footprint(task(mask_ratio=0.5))
    alone = footprint(task(mask_ratio=0.75, decoder_depth=1))
    # 49 tokens more in each of 24 encoder blocks, a little less to predict
    assert many.saved - few.saved == pytest.approx(49 * 24 * (192 * 8 + 3 * 384 * 4 + 384 + 1536), rel=0.06)
    assert few.saved - alone.saved == pytest.approx(196 * (512 * 8 + 3 * 1024 * 4 + 512 + 4096))  # a block, all patches


def test_the_measured_step_is_what_the_speed_starts_from():
    """A backbone that sees everything, without a decoder to speak of, at the measured 23.5 ms for 128 pictures."""
    rows = measured("NVIDIA H200")
    whole = task(mask_ratio=1e-9, decoder_width=4, decoder_depth=1)
    assert seconds_a_picture(whole, rows) == pytest.approx(23.5e-3 / 128, rel=0.03)
    large = Task(named_config("vim_large", img_size=224, num_classes=0, position="sincos"))
    assert 5 < seconds_a_picture(large, rows) / seconds_a_picture(task(), rows) < 40
    with pytest.raises(UserError, match=r"no speeds of 'abacus' were measured: choose from .*NVIDIA H200"):
        measured("abacus")


def test_the_command_is_printed(capsys):
    main(["--model", "vim_large", "--image-size", "1024", "--gpus", "8", "--gpu-memory", "80"])
    printed = capsys.readouterr().out
    assert "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 8" in printed
    assert "pictures/s" in printed
    words = printed.splitlines()[-1].split("pretrain/main.py ")[1].split()
    config = parse(PretrainConfig, words, "", "")
    assert config.model.architecture().depth == 48
    assert config.batch_size % (8 * config.accumulation) == 0
    main(["--model", "vim_huge", "--gpus", "64", "--gpu-memory", "8"])
    printed = capsys.readouterr().out
    assert "zero2.yaml --num_processes 64" in printed
    assert "none fits" in printed
    main(["--model", "vim_huge", "--gpus", "2", "--gpu-memory", "4", "--batch-size", "64"])
    assert "zero3_offload.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "vim_lage"], "did you mean 'vim_large'"),
        (["--model", "vim_large", "--image-size", "1000"], "image height is 1000"),
        (["--gpus", "3"], "batch-size is 4096: it must be a multiple of 3 GPUs"),
        (["--gpu-memory", "0"], "gpu-memory is 0.0: it must be positive"),
    ],
)
def test_mistakes_get_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        main(argv)
