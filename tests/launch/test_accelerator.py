"""What a launcher asks for and is not there is refused before anything is set up."""

import importlib.machinery

import pytest
import torch

from launch.run import accelerator
from launch.run.accelerator import SilentError, refuse_what_is_missing
from launch.run.config import RunConfig
from launch.run.metrics import RunLog
from vim_backbone import UserError

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_RANK": "0"}
VARIABLES = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "CUDA_VISIBLE_DEVICES",
         "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK")  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, with DeepSpeed and NCCL but for what is `absent`."""

    def make(env, gpus, absent=()):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: "nccl" not in absent)
        spec = importlib.machinery.ModuleSpec("deepspeed", None)
        monkeypatch.setattr(accelerator, "find_spec", lambda name: None if name in absent else spec)

    return make


@pytest.mark.parametrize(
    ("env", "gpus", "absent", "words"),
    [
        (DEEPSPEED, 2, ["deepspeed"], "DeepSpeed, which is not installed: pip install deepspeed"),
        (DEEPSPEED | {"ACCELERATE_USE_CPU": "true"}, 0, [], "makes Accelerate run DDP in place of DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, 0, [], "does not run FSDP on CPU: use launch/accelerate/zero3.yaml"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 0, [], "asks for GPU 0 but PyTorch finds none"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, 2, [], r"3 processes were started .* it has 2 GPU\(s\)"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2, ["nccl"], "has no NCCL"),
    ],
)
def test_what_is_not_there_gets_one_line_from_one_process(env, gpus, absent, words, machine):
    machine(env, gpus, absent)
    with pytest.raises(UserError, match=words) as caught:
        refuse_what_is_missing()
    assert "\n" not in str(caught.value)
    machine(env | {"RANK": "1"}, gpus, absent)
    with pytest.raises(SilentError):
        refuse_what_is_missing()


@pytest.mark.parametrize(
    ("env", "gpus", "absent"),
    [
        ({}, 0, []),
        ({"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "0", "LOCAL_WORLD_SIZE": "3"}, 2, []),
        (DEEPSPEED | {"LOCAL_WORLD_SIZE": "2"}, 2, []),
        (DEEPSPEED, 0, []),
    ],
)
def test_what_is_there_is_let_through(env, gpus, absent, machine):
    machine(env, gpus, absent)
    refuse_what_is_missing()


def test_a_tracker_that_does_not_start_is_a_mistake_of_one_line(tmp_path):
    class Refusing:
        is_main_process = True

        def init_trackers(self, *args, **options):
            raise ValueError("no API key configured\nsee the docs")

    with pytest.raises(UserError, match="trackers is tensorboard: no API key configured; set it up, or take it out"):
        RunLog(RunConfig(out=str(tmp_path), trackers=["tensorboard"]), Refusing(), 1, 0)
