"""The backbone folder: what is written loads equal, elsewhere and resized; what is damaged is named."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import vim_backbone.files
from vim_backbone import UserError, VimConfig, VisionMamba, create_model, from_pretrained

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
