"""One process, DDP and ZeRO follow one curve, leave the same files, and go on from each other's checkpoints.

On CPUs with gloo, and on two GPUs with NCCL where they are.
"""

import logging
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch.real import PROGRAMS, STRATEGIES, TWO_GPUS, finish, losses, run, start
from vim_backbone import from_pretrained

pytestmark = pytest.mark.slow
MEASURED = logging.getLogger(__name__)
"""Shown by `pytest -rA --log-level=INFO`."""
UNORDERED = Path(__file__).parent / "unordered.py"
OPTIONS = ("--steps=4", "--checkpoint_every=2", "--accumulation=2", "--ema_decay=0.9", "--optim.clip_grad=1",
           "--optim.base_lr=0.01", "--keep_checkpoints=9", "--batch_size=12")  # fmt: skip
FILES = ("model", "ema", "optimizer")
OFFLOADING = ("zero2_offload", "zero3_offload")
LOSSES = {"cpu": 2e-6, "cuda": 1e-6}
"""Largest difference of a loss from that of one process, relative."""
TENSORS = {"cpu": 2e-5, "cuda": 2e-5}
"""The same of a tensor of a checkpoint, in the norm."""


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory):
    """An environment with nothing that compiles C++, and nothing that was compiled before."""
    return {"PATH": str(PROGRAMS), "CXX": "no-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("none"))}


@pytest.fixture(scope="module")
def environ(no_compiler):
    """Device -> of its runs; on GPUs Triton needs a compiler."""
    return {"cpu": no_compiler, "cuda": {}}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, environ):
    """(device, strategy) -> folder of an undisturbed run, made once."""

    @cache
    def make(device, strategy):
        env = {} if strategy == "one" else environ[device]
        return run(tmp_path_factory.mktemp(strategy), strategy, *OPTIONS, env=env, device=device)

    return make


def assert_same_run(folder, one, device="cpu"):
    """Float32 rounding apart. Tensor by tensor in the norm: Adam's averages are far below any fixed tolerance."""
    ours, theirs = losses(folder), losses(one)
    assert ours.keys() == theirs.keys()
    worst = {"losses": max(abs(ours[step] / theirs[step] - 1) for step in theirs)}
    for file in FILES:
        path = f"checkpoints/step-00000004/{file}.safetensors"
        got, expected = load_file(folder / path), load_file(one / path)
        assert got.keys() == expected.keys()
        worst[file] = max(
            (torch.linalg.vector_norm(got[name] - expected[name]) / torch.linalg.vector_norm(expected[name])).item()
            for name in got
        )
    MEASURED.info("%s %s", device, {name: f"{value:.1e}" for name, value in worst.items()})
    assert worst.pop("losses") < LOSSES[device]
    assert max(worst.values()) < TENSORS[device], worst


@pytest.mark.parametrize(
    ("device", "strategy"),
    [
        *(("cpu", strategy) for strategy in STRATEGIES),
        *(pytest.param("cuda", strategy, marks=TWO_GPUS) for strategy in (*STRATEGIES, *OFFLOADING)),
    ],
)
def test_same_losses_and_same_files_without_a_compiler(device, strategy, run_of):
    folder = run_of(device, strategy)
    assert_same_run(folder, run_of(device, "one"), device)
    published = from_pretrained(folder / "backbone").state_dict()
    ema = load_file(folder / "checkpoints/step-00000004/ema.safetensors")
    torch.testing.assert_close(published, {name: ema[f"encoder.{name}"] for name in published}, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device", "before", "after", "processes"),
    [
        ("cpu", "zero3", "one", 1),
        ("cpu", "one", "zero3", 3),
        ("cpu", "zero3", "zero2_offload", 2),
        pytest.param("cuda", "zero2", "one", 1, marks=TWO_GPUS),
        pytest.param("cuda", "zero2", "ddp", 2, marks=TWO_GPUS),
        pytest.param("cuda", "one", "zero3", 2, marks=TWO_GPUS),
    ],
)
def test_going_on_with_another_strategy_and_another_number_of_processes(
    device, before, after, processes, run_of, environ, tmp_path
):
    """Three processes, by which most of the shapes do not divide."""
    shutil.copytree(run_of(device, before), tmp_path / "runs/run")
    shutil.rmtree(tmp_path / "runs/run/checkpoints/step-00000004")
    options = {"script": UNORDERED, "launcher": (f"--num_processes={processes}",), "env": environ[device]}
    folder = run(tmp_path, after, *OPTIONS, "--resume", device=device, **options)
    assert_same_run(folder, run_of(device, "one"), device)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_native_sizes(strategy, tmp_path):
    """Every picture counts alike, so that it does not matter which process has the large ones."""
    options = ("--steps=3", "--data.sizes=native", "--model.patch_size=8", "--accumulation=2")
    folder = run(tmp_path, strategy, *options)
    assert losses(folder) == pytest.approx(losses(run(tmp_path / "one", "one", *options)), rel=2e-6)


def test_offloading_and_recomputing_change_nothing(run_of, no_compiler, tmp_path):
    folder = run(tmp_path, "zero3_offload", *OPTIONS, "--model.recompute=products", env=no_compiler)
    assert_same_run(folder, run_of("cpu", "one"))


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
