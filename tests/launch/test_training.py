"""A run's steps on one process: accumulated, clipped, averaged, bad ones passed over, resumed in one act."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launch.run.accelerator import build_accelerator
from launch.run.config import RunConfig
from launch.run.folder import open_run
from launch.run.guard import GuardConfig
from launch.run.training import ended_out_of_memory, start_training
from vim_backbone import UserError


def data(step, part=slice(None)):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[part]


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def train(
    tmp_path, name, steps=4, accumulation=1, spoil=(), checkpoint=None, clip_grad=0.0, ema_decay=None, late=False,
    **changes,
):  # fmt: skip
    """Weights, norms and notices after so many steps of squared outputs; the losses of `spoil`ed steps are nan.

    `late`: as on a GPU, a step itself leaves out a bad one, and its result is read when the next has been asked for.
    """
    config = RunConfig(name=name, out=str(tmp_path), trackers=[], async_checkpoints=False, **changes)
    open_run(config, [])
    accelerator = build_accelerator(config, accumulation)
    norms, notices = [], []
    with start_training(
        config, accelerator, steps, checkpoint, build, lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        unit=nn.Linear, micro_batch=8 // accumulation, clip_grad=clip_grad, ema_decay=ema_decay,
    ) as training:  # fmt: skip
        training.reads_late = late
        for step in training.steps():
            for number, part in enumerate(training.parts()):
                size = 8 // accumulation
                with part:
                    loss = training.model(data(step, slice(size * number, size * (number + 1)))).square().mean()
                    training.backward(loss * float("nan") if step in spoil else loss)
            training.update(0.01, [f"sample {step}"])
            norms.append(training.grad_norm)
            notices += training.new_notices()
        if late:
            norms = [*norms[1:], training.grad_norm]
            notices += training.new_notices()
        weights = training.published(training.state.model)
    return weights, norms, notices


def by_hand(steps=4, clip=None, decay=None):
    """The same in plain PyTorch, in float64."""
    model = build().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average, norms = {k: v.clone() for k, v in model.state_dict().items()}, []
    for step in range(steps):
        model(data(step).double()).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
        factor = min(decay, 1 - (step + 1) ** (-2 / 3)) if decay else 0.0
        average = {k: factor * average[k] + (1 - factor) * v for k, v in model.state_dict().items()}
    return average, norms


def assert_close(weights, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].double(), tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("clip", "decay"), [(None, None), (0.05, 0.5)])
def test_steps_are_those_of_plain_pytorch(tmp_path, accumulation, clip, decay, late):
    weights, norms, notices = train(
        tmp_path, "run", accumulation=accumulation, clip_grad=clip or 0.0, ema_decay=decay, late=late
    )
    expected, expected_norms = by_hand(clip=clip, decay=decay)
    assert_close(weights, expected)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert notices == []


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_step_changes_nothing_and_is_written_down(tmp_path, late):
    spoiled, norms, notices = train(tmp_path, "run", steps=3, spoil=[2], ema_decay=0.9, late=late)
    whole, _, _ = train(tmp_path, "whole", steps=2, ema_decay=0.9, late=late)
    assert all(torch.equal(spoiled[name], whole[name]) for name in whole)
    assert norms[2] != norms[2]
    (notice,) = notices
    assert notice.startswith("step 3 is bad: its loss is nan; not taken, its 1 samples are in")
    (row,) = map(json.loads, (tmp_path / "run/bad_steps.jsonl").read_text().splitlines())
    assert (row["step"], row["action"], row["samples"]) == (3, "skip", ["sample 2"])


@pytest.mark.parametrize("bad", [[1], [1, 2], [0, 4]])
def test_read_late_a_run_is_that_which_waits_for_every_loss(tmp_path, bad):
    expected, expected_norms, notices = train(tmp_path, "waits", steps=5, spoil=bad, ema_decay=0.9)
    weights, norms, later = train(tmp_path, "run", steps=5, spoil=bad, ema_decay=0.9, late=True)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [norm for norm in norms if norm == norm] == [norm for norm in expected_norms if norm == norm]
    assert len(norms) == len(expected_norms) == 5
    assert [line.replace("/waits/", "/run/") for line in notices] == later
    assert len(later) == len(bad)


@pytest.mark.parametrize("late", [False, True])
def test_many_bad_steps_end_the_run_with_all_before_saved(tmp_path, late):
    with pytest.raises(UserError, match=r"step 2 is bad: .*; the run ends, with 'stop' for bad steps"):
        train(tmp_path, "run", spoil=[1], guard=GuardConfig(on_bad_step="stop"), late=late)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]
    weights, _, _ = train(tmp_path, "one", steps=1, late=late)
    saved = load_file(tmp_path / "run/checkpoints/step-00000001/model.safetensors")
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_run_is_the_same(tmp_path, late):
    whole, norms, _ = train(tmp_path, "run", ema_decay=0.9, checkpoint_every=2, late=late)
    middle = tmp_path / "run/checkpoints/step-00000002"
    weights, rest, _ = train(tmp_path, "other", ema_decay=0.9, checkpoint=middle, late=late)
    assert rest == norms[2:]
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


ALONE: Any = SimpleNamespace(world=1, rank=0)  # a watchdog


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_out_of_memory_is_a_line_with_what_to_do(error):
    words = r"^out of memory \(.*\): do this; --resume auto goes on$"
    with pytest.raises(UserError, match=words) as caught, ended_out_of_memory(ALONE, lambda: "do this"):
        raise error
    assert "\n" not in str(caught.value)


def test_another_error_is_none_of_memory():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), ended_out_of_memory(ALONE, lambda: "do this"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
