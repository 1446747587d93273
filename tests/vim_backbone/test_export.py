"""Backbones as programs: the same numbers as the model at sizes that the export did not see, and errors in one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.launch.real import NO_COMPILER
from vim_backbone import UserError, create_model, from_pretrained, programs
from vim_backbone.export import export, main

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
SMALL = {"d_model": 16, "depth": 1, "img_size": 32, "num_classes": 3, "patch_size": 8}
POOLED = {"depth": 2, "scan": "pooled", "class_token": "none", "global_pool": "avg", "mixer_norm": True}
SIZES = [(1, 32, 32), (3, 40, 16), (2, 8, 48), (1, 8, 8), (1, 96, 64)]
"""Batch, height and width: that of training, others, and one row or one patch alone."""
LOADED_ALONE = """
import sys
import torch

program = torch.export.load(sys.argv[1])
images = torch.load(sys.argv[2])
torch.save(program.module()(images), sys.argv[3])
assert not [name for name in sys.modules if name.startswith("vim_")]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("published"))


def save(place, **changes):
    """A backbone whose weights are large enough that every part of it shows in the output."""
    torch.manual_seed(0)
    model = create_model("vim_tiny", **(SMALL | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("pos_embed") or "token" in name or "proj.weight" in name:
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if parameter.dim() == 3 else parameter[0].numel() ** -0.5)
                )
    return model.save_pretrained(place / "backbone", mean=(0.1,) * model.in_chans, std=(0.3,) * model.in_chans)


def draw(batch, height, width, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch * height + width))


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_onnx_gives_logits_class_token_and_patches_of_any_size(folder, tmp_path):
    done = export(folder, tmp_path / "out.onnx", features=["logits", "class", "pooled", "patches"])
    session, model = session_of(done.path), from_pretrained(folder)
    written = onnx.load(done.path)
    assert ([opset.domain for opset in written.opset_import], len(written.functions)) == ([""], 0)
    assert [each.name for each in session.get_outputs()] == ["logits", "class", "pooled", "patches"]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[3].shape == ["batch", 16, "rows", "columns"]
    texts = session.get_modelmeta().custom_metadata_map
    assert json.loads(texts["preprocessor_config"])["image_mean"] == [0.1] * 3
    for size in SIZES:
        images = draw(*size)
        with torch.no_grad():
            tokens, maps = model.forward_intermediates(images, norm=True)
            want = [model(images), tokens[:, 0], tokens[:, 0], maps[0]]
        for got, expected in zip(session.run(None, {"images": images.numpy()}), want, strict=True):
            np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=2e-5)
    assert done.difference < 2e-5


def test_onnx_of_a_pooled_scan_with_overlapping_patches_and_tokens_of_channels(tmp_path, monkeypatch):
    """And with its weights in a file beside it, as those of large models."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    folder = save(tmp_path, stride=4, channels="tokens", in_chans=2, num_classes=0, **POOLED)
    done = export(folder, tmp_path / "out.onnx", features=["pooled", "patches"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "out.onnx", "out.onnx.data"]
    session, model = session_of(done.path), from_pretrained(folder)
    for size in SIZES:
        images = draw(*size, channels=2)
        with torch.no_grad():
            tokens, maps = model.forward_intermediates(images, indices=1, norm=True)
            want = [model.forward_head(tokens, pre_logits=True), maps[0]]
        for got, expected in zip(session.run(None, {"images": images.numpy()}), want, strict=True):
            np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=2e-5)


def test_a_program_of_16_bits_runs_without_this_package(folder, tmp_path):
    written = export(folder, tmp_path / "out.pt2", format="exported", dtype="float16")
    assert 1e-6 < written.difference < 2e-2
    images = draw(1, 48, 24)
    torch.save(images, tmp_path / "images.pt")
    argv = [sys.executable, "-c", LOADED_ALONE, *(tmp_path / name for name in ("out.pt2", "images.pt", "got.pt"))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path, env={"PATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    (got,) = torch.load(tmp_path / "got.pt")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, from_pretrained(folder)(images).detach(), rtol=0, atol=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="AOTInductor makes C++ of the model, and there is no C++ compiler")
def test_a_compiled_package_takes_any_size(folder, tmp_path):
    export(folder, tmp_path / "out.pt2", format="aoti")
    package, model = torch._inductor.aoti_load_package(str(tmp_path / "out.pt2")), from_pretrained(folder)
    assert package.get_metadata()["outputs"] == "logits"
    for size in SIZES[:3]:
        images = draw(*size)
        torch.testing.assert_close(package(images)[0], model(images).detach(), rtol=0, atol=2e-5)


def test_a_program_that_differs_is_not_written(folder, tmp_path, monkeypatch):
    def write(_program, path, _outputs, _texts):
        path.touch()

    def load(_path):
        model = from_pretrained(folder)
        return lambda images: [model(images) + 1e-3]

    monkeypatch.setattr("vim_backbone.export.trace", lambda *_, **__: None)
    monkeypatch.setitem(programs.FORMATS, "exported", programs.FORMATS["exported"]._replace(write=write, load=load))
    with pytest.raises(UserError, match=r"logits .* differs from the model's by 1\.0e-03 .* more than 1e-04: nothing"):
        export(folder, tmp_path / "out.pt2", format="exported")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_done_is_said_in_one_line(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.onnx").touch()
    cases = [
        ([folder, "a.onnx", "--format", "onxx"], "format is 'onxx': did you mean 'onnx'?"),
        ([folder, "a.pt2"], "OUT is a.pt2: a file of format onnx ends in .onnx"),
        ([folder, tmp_path / "there.onnx"], "there.onnx exists: give another name, or delete it"),
        ([folder, "none/a.onnx"], "the folder none does not exist"),
        ([tmp_path, "a.onnx"], f"no backbone at {tmp_path}: config.json is missing"),
        ([folder, "a.onnx", "--features", "poolde"], "features has 'poolde': did you mean 'pooled'?"),
        ([folder, "a.onnx", "--features", "class", "class"], "name each one once"),
        ([folder, "a.onnx", "--dtype", "bfloat16"], "onnxruntime has no convolution of it on CPUs"),
        ([save(tmp_path, num_classes=0), "a.onnx", "--features", "logits"], "the backbone has no classifier"),
    ]
    monkeypatch.chdir(tmp_path)
    for argv, words in cases:
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([str(folder), "a.onnx"]) == 2
    assert (
        "onnx is not installed, which ONNX needs: pip install 'vision-mamba-pretrain[export]'"
        in capsys.readouterr().err
    )
