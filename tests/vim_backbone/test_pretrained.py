"""The backbone folder: what is written loads equal, elsewhere and resized; what is damaged is named."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vim_backbone.files
from vim_backbone import UserError, VimConfig, VisionMamba, create_model, from_pretrained

MORE = int(os.environ.get("FUZZ", "0"))
SIZES = {"d_model": 32, "depth": 2, "img_size": 64, "num_classes": 5}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    create_model("vim_tiny", **SIZES).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def pictures(side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_a_fresh_process_computes_the_same(folder, tmp_path):
    model = from_pretrained(folder)
    assert not model.training
    with torch.no_grad():
        torch.save(model(pictures()), tmp_path / "want.pt")
    torch.save(pictures(), tmp_path / "pictures.pt")
    code = (
        "import torch, vim_backbone\n"
        f"model = vim_backbone.from_pretrained({str(folder)!r})\n"
        f"with torch.no_grad(): got = model(torch.load({str(tmp_path / 'pictures.pt')!r}))\n"
        f"assert torch.equal(got, torch.load({str(tmp_path / 'want.pt')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_that_others_open(folder):
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["img_size"] == [64, 64]
    assert config["model_type"] == "vim"
    assert load_file(folder / "model.safetensors").keys() == from_pretrained(folder).state_dict().keys()
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 64, "width": 64}


def test_other_resolution_and_other_head(folder):
    model = from_pretrained(folder, img_size=96, num_classes=3)
    assert model(pictures(96)).shape == (2, 3)
    same = from_pretrained(folder)  # resampled on the fly: the same positions
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(pictures(96)), same.forward_features(pictures(96)))
    assert from_pretrained(folder, num_classes=0)(pictures()).shape == (2, 32)


def test_what_is_read_is_not_drawn(folder):
    """Nor does a file that is rewritten reach a model, and a fresh process imports no compiler for it."""
    before = torch.get_rng_state()
    model = from_pretrained(folder, img_size=32, num_classes=0)
    assert torch.equal(torch.get_rng_state(), before)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\0" * 4096)
    torch.testing.assert_close(model.state_dict(), want, rtol=0, atol=0)
    assert not model.pos_embed.requires_grad or model.config.position == "learned"
    code = f"import sys, torch, vim_backbone; vim_backbone.load({str(folder)!r}); assert 'sympy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_and_damaged_folders(folder, tmp_path):
    with pytest.raises(UserError, match="the folder does not exist"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        from_pretrained(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="describes no Vim backbone"):
        from_pretrained(folder)


def test_tensors_that_do_not_fit(folder):
    with pytest.raises(UserError, match=r"lacks .* tensor\(s\): layers\.2\.mixer"):
        from_pretrained(folder, depth=3)
    with pytest.raises(UserError, match="is no field of a Vim backbone"):
        from_pretrained(folder, widht=3)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"surplus": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"has unknown 1 tensor\(s\): surplus"):
        from_pretrained(folder)


def test_a_full_disk_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vim_backbone.files, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        from_pretrained(folder).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob(".*partial"))


def test_every_channel_has_its_mean_and_deviation(tmp_path):
    config = VimConfig(d_model=32, depth=1, img_size=(16, 16), patch_size=8, num_classes=0, in_chans=4)
    model = VisionMamba(config)
    with pytest.raises(UserError, match="has 4 channels, mean 3 values and std 3: give save_pretrained a mean and std"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    folder = model.save_pretrained(tmp_path / "kept", mean=(0.1, 0.2, 0.3, 0.4), std=(1.0,) * 4)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == ([0.1, 0.2, 0.3, 0.4], [1.0] * 4)
    assert "4 channels in [0, 1]" in (folder / "README.md").read_text()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)
WRONG_FIELDS = [
    ("d_model", "a", "d_model is 'a': it must be a whole number, 65536 at most"),
    ("d_model", 32.0, "d_model is 32.0: it must be a whole number"),
    ("d_model", True, "d_model is True"),
    ("d_model", None, "d_model is None"),
    ("depth", 10**9, "depth is 1000000000: it must be a whole number, 4096 at most"),
    ("depth", 4000, "has 2 blocks but depth is 4000"),
    ("depth", -1, "depth is -1: it must be at least 1"),
    ("img_size", [2**17, 2**17], "are too many"),
    ("img_size", [2**15, 2**15], "pos_embed is .1, 17, 32., config.json wants"),
    ("d_model", 2**14, "patch_embed.proj.weight is .32, 3"),
    ("img_size", [64, "64"], "img_size is .*it must be a whole number"),
    ("img_size", [64, 64, 64], "img_size is .* give one side"),
    ("img_size", {"height": 64}, "img_size is .*it must be a whole number"),
    ("num_classes", 2**24, "head.weight is .5, 32., config.json wants .16777216, 32."),
    ("d_state", 4096, "A_log is .64, 16., config.json wants .64, 4096."),
    ("mixer_norm", "no", "mixer_norm is 'no': it must be true or false"),
    ("norm_eps", "small", "norm_eps is 'small': it must be a number"),
    ("norm_eps", float("nan"), "norm_eps is nan: it must be a number"),
    ("class_token", ["middle"], "class_token is"),
    ("scan", {}, "scan is {}: choose from"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG_FIELDS)
def test_a_config_of_other_types_and_sizes(folder, name, value, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=words):
        from_pretrained(folder)


@settings(max_examples=MORE or 300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([*VimConfig.__dataclass_fields__, "model_type", "architectures"]), value=ANYTHING)
def test_any_field_of_a_config_loads_or_is_refused(folder, name, value):
    path = folder / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {name: value}))
    try:
        with contextlib.suppress(UserError):
            assert from_pretrained(folder).num_classes == 5
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pipe_or_a_folder_in_place_of_a_file(folder, file):
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(UserError, match="is no plain file: give a file"):
        from_pretrained(folder)
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(UserError, match="is a folder: give a file"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff{}", b"{", b"[]", b"null", b'{"d_model": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_no_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
