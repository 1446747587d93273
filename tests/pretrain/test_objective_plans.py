"""The planner against what real steps of the objectives that mask nothing allocate, and what it says of them."""

import itertools
import shlex
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import peak_allocated
from launch.planning.memory import peak, shares
from launch.run.cli import parse
from launch.run.optim import OptimConfig, build_optimizer
from launch.run.randomness import generator
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.distill.teacher import DistillConfig
from pretrain.plan import main, planned_footprints
from pretrain.train import build_model
from tests.teachers import write_teacher
from vim_backbone import UserError

PICTURES = 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """As large as what it teaches, so that its weights are seen in the peak; it runs first, and leaves little."""
    return write_teacher(tmp_path_factory.mktemp("teachers") / "vit", embed_dim=192, depth=4)


@pytest.mark.parametrize(
    ("objective", "at", "level", "dtype"),
    [
        *itertools.product(
            ["nepa", "ar"], ["visible"], ["none", "inputs", "products"], [torch.float32, torch.bfloat16]
        ),
        *itertools.product(["distill"], ["visible", "hidden", "whole"], ["inputs"], [torch.float32]),
        ("distill", "whole", "none", torch.bfloat16),
    ],
)
def test_the_peak_of_a_real_step_is_predicted(objective, at, level, dtype, teacher):
    torch.set_num_threads(1)  # two threads wait for each other where the cores are shared
    model = ModelConfig(img_size=224, patch_size=16, depth=6, recompute=level)
    distill = DistillConfig(teacher=teacher if objective == "distill" else "", at=at)
    config = PretrainConfig(objective=objective, model=model, distill=distill)
    trained = build_model(config)
    optimizer = build_optimizer(trained, OptimConfig(), 256)
    images = torch.randn(PICTURES, 3, 224, 224)
    extras = torch.stack([config.method.draw((14, 14), generator(0))] * PICTURES)
    inputs = config.method.inputs(extras, images.device)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = trained(images, *inputs.arguments)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    frozen = list(trained.teacher._on(images.device).parameters()) if objective == "distill" else []
    held = [*trained.parameters(), *frozen, *(v for entry in optimizer.state.values() for v in entry.values())]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    measured = sum(t.nbytes for t in held) + peak_allocated(profiled)
    work = config.method.work(config.architecture(), dtype.itemsize, level)
    planned = planned_footprints(config.architecture(), config.method, [work], dtype, "cpu")[0]
    assert planned.parameters == sum(p.numel() for p in trained.parameters())
    assert planned.frozen == sum(p.nbytes for p in frozen)
    assert peak(planned, shares(planned, 1)[0], PICTURES) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(("at", "idle"), [("whole", 2), ("visible", 1), ("hidden", 0)])
def test_settings_that_do_nothing_are_named(at, idle, teacher):
    words = [f"--distill.teacher={teacher}", f"--distill.at={at}", "--mask.ratio=0.3", "--decoder.width=64"]
    lines = parse(PretrainConfig, ["--objective=distill", *words], "", "").not_used()
    assert lines == [
        f"{setting} does nothing where distill.at is {at}" for setting in ("decoder.width 64", "mask.ratio 0.3")[:idle]
    ]


def test_a_large_teacher_is_the_peak_of_a_small_student(tmp_path):
    """Between its blocks nothing stays, so that one block is all that its forward pass needs."""
    torch.set_num_threads(1)
    teacher = write_teacher(tmp_path / "large", img_size=224, patch_size=16, embed_dim=768, depth=2, num_heads=12)
    model = ModelConfig(img_size=224, patch_size=16, depth=1, recompute="products")
    config = PretrainConfig(objective="distill", model=model, distill=DistillConfig(teacher=teacher))
    trained, images = build_model(config), torch.randn(PICTURES, 3, 224, 224)
    trained.teacher.features(images, config.architecture())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trained.teacher.features(images, config.architecture())
    work = config.method.work(config.architecture(), 4, "products")
    assert PICTURES * work.frozen_forward == pytest.approx(peak_allocated(profiled), rel=0.25)
    planned = planned_footprints(config.architecture(), config.method, [work], torch.float32, "cpu")[0]
    without = replace(planned, frozen_forward=0.0)
    assert peak(planned, shares(planned, 1)[0], 64) > peak(without, shares(without, 1)[0], 64)


@pytest.mark.parametrize("objective", ["nepa", "ar"])
def test_the_command_trains_by_the_objective(objective, capsys):
    main(["--model", "vim_tiny", "--gpus", "1", "--batch-size", "64", "--objective", objective])
    printed = capsys.readouterr().out
    assert "of 196 patches a picture the encoder sees 196" in printed
    words = shlex.split(printed.splitlines()[-1].split("pretrain/main.py ")[1])
    config = parse(PretrainConfig, words, "", "")
    assert config.objective == objective
    assert config.not_used() == []


def test_the_command_plans_with_a_teacher(teacher, capsys):
    main(
        [
            "--model",
            "vim_tiny",
            "--gpus",
            "1",
            "--batch-size",
            "64",
            "--objective",
            "distill",
            "--distill-teacher",
            teacher,
        ]
    )
    printed = capsys.readouterr().out
    assert "of 196 patches a picture the encoder sees 49" in printed
    assert "waiting for data, and without the teacher" in printed
    config = parse(PretrainConfig, shlex.split(printed.splitlines()[-1].split("pretrain/main.py ")[1]), "", "")
    assert (config.objective, config.distill.teacher) == ("distill", teacher)


def test_the_teacher_has_its_place_beside_the_rest(teacher):
    config = PretrainConfig(objective="distill", distill=DistillConfig(teacher=teacher))
    work = config.method.work(config.architecture(), 4, "inputs")
    with_teacher, without = planned_footprints(
        config.architecture(), config.method, [work, replace(work, frozen=0.0)], torch.float32, "cpu"
    )
    for share in shares(with_teacher, 8):
        assert peak(with_teacher, share, 2) - peak(without, share, 2) == work.frozen > 1e6


def test_costs_of_another_objective_are_refused():
    with pytest.raises(UserError, match=r"mask-ratio is 0\.5: it is of objective mae and distill, not of nepa"):
        main(["--objective", "nepa", "--mask-ratio", "0.5"])
