"""The planner against what real steps allocate, and the command that it prints."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import peak_allocated
from launch.planning.memory import peak, shares
from launch.run.cli import parse
from launch.run.optim import OptimConfig, build_optimizer
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.mae.masking import MaskConfig
from pretrain.mae.model import DecoderConfig, split_patches
from pretrain.mae.objective import MAE
from pretrain.plan import main, planned_footprint
from pretrain.train import build_model
from vim_backbone import UserError, named_config


def planned(name="vim_tiny", *, ratio=0.75, width=512, depth=2, dtype=torch.float32, recompute=False):
    """Footprint on CPU, and (patches, visible patches); the encoder scans these and a class token."""
    config = named_config(name, img_size=224, patch_size=16, num_classes=0, position="sincos")
    objective = MAE(mask=MaskConfig(ratio=ratio), decoder=DecoderConfig(width=width, depth=depth))
    work = objective.work(config, dtype.itemsize, recompute)
    return planned_footprint(config, objective, work, dtype, "cpu"), (14 * 14, work.stacks[0].tokens - 1)


def real_peak(name, pictures, tokens, *, width=512, dtype=torch.float32, recompute=False):
    """Parameters and bytes: all that a second step on the CPU holds at its worst."""
    torch.set_num_threads(1)  # two threads wait for each other where the cores are shared
    model = ModelConfig(name=name, img_size=224, patch_size=16, depth=None, grad_checkpointing=recompute)
    trained = build_model(PretrainConfig(model=model, decoder=DecoderConfig(width=width)))
    optimizer = build_optimizer(trained, OptimConfig(), 256)
    images = torch.randn(pictures, 3, 224, 224)
    patches, visible = tokens
    mask = torch.zeros(pictures, patches, dtype=torch.bool)
    mask[:, visible:] = True

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = trained(images, *split_patches(mask))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*trained.parameters(), *(v for entry in optimizer.state.values() for v in entry.values())]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    return sum(p.numel() for p in trained.parameters()), sum(t.nbytes for t in held) + peak_allocated(profiled)


@pytest.mark.parametrize(
    ("name", "pictures", "changes"),
    [
        ("vim_tiny", 2, {}),
        ("vim_tiny", 12, {}),
        ("vim_small", 4, {}),
        ("vim_tiny", 6, {"dtype": torch.bfloat16}),
        ("vim_tiny", 6, {"recompute": True, "width": 192}),
    ],
)
def test_the_peak_of_a_real_step_is_foretold(name, pictures, changes):
    """The issue allows 15 %; 6 % is what it keeps."""
    model, tokens = planned(name, **changes)
    count, measured = real_peak(name, pictures, tokens, **changes)
    assert model.parameters == count
    assert peak(model, shares(model, 1)[0], pictures) == pytest.approx(measured, rel=0.06)


def test_half_the_visible_patches_save_nothing_in_the_decoder():
    few, many = planned(ratio=0.75)[0], planned(ratio=0.5)[0]
    alone = planned(depth=1)[0]
    # 49 tokens more in each of 24 encoder blocks, a little less to predict
    assert many.saved - few.saved == pytest.approx(49 * 24 * (192 * 8 + 3 * 384 * 4 + 384 + 1536), rel=0.06)
    assert few.saved - alone.saved == pytest.approx(197 * (512 * 8 + 3 * 1024 * 4 + 512 + 4096))  # a block, all tokens


def test_the_command_is_printed(capsys):
    main(["--model", "vim_large", "--image-size", "1024", "--gpus", "8", "--gpu-memory", "80"])
    printed = capsys.readouterr().out
    assert "python -m launch --config_file launch/accelerate/ddp.yaml --num_processes 8" in printed
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
