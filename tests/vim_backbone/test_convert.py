"""Official checkpoints: read safely, converted, and equal to the official equations in float64."""

import argparse
import contextlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.vim_backbone import official
from vim_backbone import UserError, from_pretrained
from vim_backbone.convert import convert, main
from vim_kernels import available_backends, use_backend

MORE = int(os.environ.get("FUZZ", "0"))
SMALL = {"d": 32, "depth": 2, "patches": 16, "patch": 16, "classes": 5}


def deit_file(path, state, ema=None, **arguments):
    parts = {"model": state, "optimizer": {"state": {}}, "lr_scheduler": {}, "epoch": 3, "scaler": {}}
    if ema is not None:
        parts["model_ema"] = ema
    torch.save(parts | {"args": argparse.Namespace(**arguments)}, path)
    return path


@pytest.mark.parametrize(
    ("sizes", "pixels", "stride"),
    [
        pytest.param({"d": 192, "depth": 24}, 224, 16, id="tiny"),
        pytest.param({"d": 192, "depth": 2, "patches": 729}, 224, 8, id="tiny-stride-8"),
        pytest.param({"d": 384, "depth": 3}, 224, 16, id="small"),
        pytest.param({"d": 768, "depth": 2}, 224, 16, id="base"),
    ],
)
def test_equals_the_official_equations(tmp_path, sizes, pixels, stride):
    state = official.random_state(**sizes)
    convert(deit_file(tmp_path / "vim.pth", state, input_size=pixels), tmp_path / "out")
    model = from_pretrained(tmp_path / "out")
    images = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(images)
    want = official.forward(state, images, stride)
    assert ((got.double() - want).norm() / want.norm()) < 1e-5
    assert model.config.stride == stride
    assert model.config.img_size == (pixels, pixels)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "triton"])
def test_every_backend_equals_the_official_equations(tmp_path, backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    if reason := available_backends(device)[backend]:
        pytest.skip(reason)
    state = official.random_state(d=64, depth=3, patches=49, classes=10)
    convert(deit_file(tmp_path / "vim.pth", state, input_size=112), tmp_path / "out")
    model = from_pretrained(tmp_path / "out").to(device)
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), use_backend(backend):
        got = model(images.to(device))
    want = official.forward(state, images, stride=16)
    assert ((got.double().cpu() - want).norm() / want.norm()) < 1e-5


def test_raw_state_dict_and_averaged_weights(tmp_path):
    plain, ema = official.random_state(**SMALL), official.random_state(**SMALL, seed=1)
    torch.save(plain, tmp_path / "raw.pth")
    deit_file(tmp_path / "full.pth", plain, ema)
    convert(tmp_path / "raw.pth", tmp_path / "raw")
    convert(tmp_path / "full.pth", tmp_path / "ema", ema=True)
    torch.testing.assert_close(from_pretrained(tmp_path / "raw").state_dict(), plain, rtol=0, atol=0)
    torch.testing.assert_close(from_pretrained(tmp_path / "ema").state_dict(), ema, rtol=0, atol=0)


def test_picture_size_that_fits_no_grid(tmp_path):
    torch.save(official.random_state(**SMALL), tmp_path / "raw.pth")
    with pytest.raises(UserError, match="fit no stride at 100 pixels; give the right --img-size"):
        convert(tmp_path / "raw.pth", tmp_path / "out", img_size=100)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layers.1.mixer.D_b"), r"lacks 1 tensor\(s\): layers.1.mixer.D_b"),
        (lambda s: s.update(extra=torch.ones(1)), r"has unknown 1 tensor\(s\): extra"),
        (lambda s: s.pop("cls_token"), "lacks the tensor 'cls_token'"),
        (
            lambda s: s.update({"norm_f.weight": torch.ones(3)}),
            r"norm_f.weight has shape \(3,\), the model wants \(32,\)",
        ),
        (lambda s: s.update(pos_embed=torch.ones(1, 12, 32)), "11 patches, which is no square grid"),
        (lambda s: s.update(note="x"), "'note' is a str, wanted a tensor"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, words):
    state = official.random_state(**SMALL)
    change(state)
    torch.save(state, tmp_path / "raw.pth")
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "raw.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_code_in_a_pickle_never_runs(tmp_path, capsys):
    torch.save({"model": official.random_state(**SMALL), "args": Harmful()}, tmp_path / "bad.pth")
    assert main([str(tmp_path / "bad.pth"), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "must never run" not in printed.out
    assert "no checkpoint that can be read safely" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_damaged_or_missing_files(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pth"):
        convert(tmp_path / "bad.pth", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "none.pth", tmp_path / "out")
    torch.save({"epoch": 1, "model_ema": None, "args": None}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="has no 'model' part"):
        convert(tmp_path / "empty.pth", tmp_path / "out")


def test_the_command(tmp_path):
    torch.save(official.random_state(**SMALL), tmp_path / "raw.pth")
    command = [sys.executable, "-m", "vim_backbone.convert", str(tmp_path / "raw.pth"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    assert from_pretrained(tmp_path / "out").num_classes == 5


def altered(state, change, name, size):
    """A state dict of which one thing is wrong."""
    tensor = state[name]
    if change == "renamed layer":
        state[f"layers.{size}.extra"] = tensor
    elif change == "renamed":
        state[name + "x"] = state.pop(name)
    elif change == "key":
        state[size] = tensor
    elif change == "missing":
        del state[name]
    elif change == "empty":
        state[name] = tensor[:0]
    elif change == "scalar":
        state[name] = torch.tensor(1.0)
    elif change == "flat":
        state[name] = tensor.flatten()
    elif change == "deeper":
        state[name] = tensor[None]
    elif change == "longer":
        state[name] = torch.cat([tensor, tensor])
    elif change == "expanded":
        state[name] = tensor.flatten()[:1].expand(*(size if side > 1 else 1 for side in tensor.shape))
    elif change == "sparse":
        state[name] = tensor.to_sparse()
    else:
        state[name] = tensor.to(getattr(torch, change))
    return state


def structure(state):
    return {name: (tensor.shape, tensor.dtype, tensor.layout) for name, tensor in state.items()}


CHANGES = ("renamed layer", "renamed", "key", "missing", "empty", "scalar", "flat", "deeper", "longer", "expanded",
           "sparse", "int64", "bool", "complex64")  # fmt: skip
PARTS = sorted(official.random_state(**SMALL))


@settings(max_examples=MORE or 150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(CHANGES), st.sampled_from(PARTS), st.sampled_from([7, 10**4, 999_999_999, 10**30]))
@example("renamed layer", PARTS[0], 999_999_999)
def test_every_structure_that_is_wrong_is_refused(tmp_path, change, name, size):
    assume(change != "expanded" or size <= 10**4)
    before = official.random_state(**SMALL)
    state = altered(dict(before), change, name, size)
    assume(structure(state) != structure(before))
    with pytest.raises(UserError) as caught:
        convert(deit_file(tmp_path / "odd.pth", state), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["224", -1, 0, 2.5, [64], 10**12])
def test_sides_of_the_training_pictures_that_cannot_be(tmp_path, side):
    with pytest.raises(UserError, match=r"input_size|fit no stride|no multiple|img_size|must be"):
        convert(deit_file(tmp_path / "vim.pth", official.random_state(**SMALL), input_size=side), tmp_path / "out")


@settings(max_examples=MORE or 100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_refused_or_converted(tmp_path, data):
    path = deit_file(tmp_path / "vim.pth", official.random_state(**SMALL))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(4000, len(content) - 1)))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 100, 0]))]))
    with contextlib.suppress(UserError):
        convert(path, tmp_path / "out")


def test_a_pipe_in_place_of_a_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "vim.pth")
    with pytest.raises(UserError, match="no plain file"):
        convert(tmp_path / "vim.pth", tmp_path / "out")
