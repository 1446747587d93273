"""One process, DDP and ZeRO follow one curve, leave the same files, and go on from each other's checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch.real import PROGRAMS, STRATEGIES, finish, losses, run, start
from vim_backbone import from_pretrained

pytestmark = pytest.mark.slow
UNORDERED = Path(__file__).parent / "unordered.py"
OPTIONS = ("--steps=4", "--checkpoint_every=2", "--accumulation=2", "--ema_decay=0.9", "--optim.clip_grad=1",
           "--optim.base_lr=0.01", "--keep_checkpoints=9", "--batch_size=12")  # fmt: skip
FILES = ("model", "ema", "optimizer")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), "one", *OPTIONS)


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory):
    """An environment with nothing that compiles C++, and nothing that was compiled before."""
    return {"PATH": str(PROGRAMS), "CXX": "no-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("none"))}


@pytest.fixture(scope="module")
def zero3(tmp_path_factory, no_compiler):
    return run(tmp_path_factory.mktemp("zero3"), "zero3", *OPTIONS, env=no_compiler)


def assert_same_run(folder, one):
    """Float32 rounding apart. Tensor by tensor in the norm: Adam's averages are far below any fixed tolerance."""
    assert losses(folder) == pytest.approx(losses(one), rel=2e-6)
    for file in FILES:
        path = f"checkpoints/step-00000004/{file}.safetensors"
        ours, theirs = load_file(folder / path), load_file(one / path)
        assert ours.keys() == theirs.keys()
        for name in ours:
            off = torch.linalg.vector_norm(ours[name] - theirs[name]) / torch.linalg.vector_norm(theirs[name])
            assert off < 2e-5, (file, name, off)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_losses_and_same_files_without_a_compiler(strategy, one, zero3, no_compiler, tmp_path):
    folder = zero3 if strategy == "zero3" else run(tmp_path, strategy, *OPTIONS, env=no_compiler)
    assert_same_run(folder, one)
    published = from_pretrained(folder / "backbone").state_dict()
    ema = load_file(folder / "checkpoints/step-00000004/ema.safetensors")
    torch.testing.assert_close(published, {name: ema[f"encoder.{name}"] for name in published}, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("before", "after", "processes"),
    [("zero3", "one", 1), ("one", "zero3", 3), ("zero3", "zero2_offload", 2)],
)
def test_going_on_with_another_strategy_and_another_number_of_processes(
    before, after, processes, one, zero3, no_compiler, tmp_path
):
    """Three processes, by which most of the shapes do not divide."""
    shutil.copytree(one if before == "one" else zero3, tmp_path / "runs/run")
    shutil.rmtree(tmp_path / "runs/run/checkpoints/step-00000004")
    launcher = (f"--num_processes={processes}",)
    assert_same_run(
        run(tmp_path, after, *OPTIONS, "--resume", script=UNORDERED, launcher=launcher, env=no_compiler), one
    )


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_native_sizes(strategy, tmp_path):
    """Every picture counts alike, so that it does not matter which process has the large ones."""
    options = ("--steps=3", "--data.sizes=native", "--model.patch_size=8", "--accumulation=2")
    folder = run(tmp_path, strategy, *options)
    assert losses(folder) == pytest.approx(losses(run(tmp_path / "one", "one", *options)), rel=2e-6)


def test_offloading_and_recomputing_change_nothing(one, no_compiler, tmp_path):
    folder = run(tmp_path, "zero3_offload", *OPTIONS, "--model.recompute=products", env=no_compiler)
    assert_same_run(folder, one)


def test_bf16_keeps_float32_parameters_under_zero3(tmp_path):
    folder = run(tmp_path, "zero3", "--steps=2", "--precision=bf16")
    tensors = load_file(folder / "checkpoints/step-00000002/model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    whole = run(tmp_path / "one", "one", "--steps=2", "--precision=bf16")
    assert losses(folder) == pytest.approx(losses(whole), rel=2e-2)


@pytest.mark.parametrize(
    ("env", "argv", "words"),
    [
        ({"ACCELERATE_USE_CPU": "false"}, [], "the launcher started 2 processes but Accelerate sees"),
        ({}, ["--batch_size=9"], "batch_size 9 does not divide into 2 processes x 1 accumulation steps"),
    ],
)
def test_mistakes_of_a_launch_get_one_line(env, argv, words, tmp_path):
    code, printed = finish(start(tmp_path, "ddp", "--steps=1", *argv, env=env))
    assert code != 0
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert words in line
    assert not (tmp_path / "runs").exists()
