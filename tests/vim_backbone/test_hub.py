"""Backbones by their id: from the cache without a network, at a revision, and put on the Hub."""

import json
import shutil
import socket
import sys

import pytest
import torch

import vim_backbone
from vim_backbone import UserError, create_model, from_pretrained, load, push_to_hub


@pytest.fixture
def folder(tmp_path):
    model = create_model("vim_tiny", d_model=32, depth=1, img_size=32, num_classes=0)
    return model.save_pretrained(tmp_path / "published", mean=(0.1, 0.2, 0.3))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of the Hub's client, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put(cache, folder, branch, commit):
    """As a download of `someone/vim` leaves it."""
    place = cache / "models--someone--vim"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / branch).write_text(commit)


def test_what_was_downloaded_needs_no_network(folder, cache, tmp_path):
    put(cache, folder, "main", "1" * 40)
    other = create_model("vim_tiny", d_model=32, depth=1, img_size=32, num_classes=0)
    put(cache, other.save_pretrained(tmp_path / "other"), "older", "2" * 40)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained("someone/vim")(images), from_pretrained(folder)(images))
        model, transform = load("someone/vim", revision="older")
        torch.testing.assert_close(model(images), other.eval()(images))
    assert transform.preprocessing.mean == vim_backbone.preprocessing.IMAGENET_MEAN
    assert load("someone/vim")[1].preprocessing.mean == (0.1, 0.2, 0.3)


def test_what_is_not_there(folder, cache, monkeypatch):
    with pytest.raises(UserError, match=r"someone/else is no folder here, and the Hub .* without a network, give a"):
        load("someone/else")
    with pytest.raises(UserError, match=r"revision is 'v2', but .* is a folder here: only the Hub has revisions"):
        load(folder, revision="v2")
    with pytest.raises(UserError, match="no backbone at runs/a/backbone: the folder does not exist"):
        load("runs/a/backbone")
    put(cache, folder, "main", "1" * 40)
    (cache / "models--someone--vim/snapshots" / ("1" * 40) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors"):
        load("someone/vim")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="need its client: pip install huggingface_hub"):
        load("someone/vim")
    assert load(folder)[0](torch.rand(1, 3, 32, 32)).shape == (1, 32)


def test_no_network(cache, monkeypatch):
    """A Hub that refuses the connection, as a machine without a network."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"without a network, give a folder .*Connection refused") as caught:
        load("someone/vim")
    assert len(str(caught.value).splitlines()) == 1


class Api:
    """What is said to the Hub."""

    calls: list
    refusal = ""

    def create_repo(self, name, **options):
        if Api.refusal:
            raise RuntimeError(Api.refusal)
        Api.calls = [(name, options)]
        return f"https://huggingface.co/{name}"

    def upload_folder(self, folder_path, **options):
        Api.calls.append((json.loads((folder_path / "preprocessor_config.json").read_text())["image_mean"], options))


def test_put_on_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_to_hub(folder, "me/vim", private=True, revision="v2").endswith("me/vim")
    (name, made), (mean, sent) = Api.calls
    assert (name, made["private"], sent["repo_id"], sent["revision"]) == ("me/vim", True, "me/vim", "v2")
    assert mean == [0.1, 0.2, 0.3]
    assert set(sent["allow_patterns"]) == {p.name for p in folder.iterdir()}
    from_pretrained(folder).push_to_hub("me/again", mean=(0.3, 0.2, 0.1))
    assert [call[0] for call in Api.calls] == ["me/again", [0.3, 0.2, 0.1]]
    monkeypatch.setattr(Api, "refusal", "403 Forbidden\nand more")
    with pytest.raises(UserError, match=r"the Hub does not take .*published as me/vim: 403 Forbidden$"):
        push_to_hub(folder, "me/vim")
    with pytest.raises(UserError, match="'vim' is no id on the Hub: give owner/name"):
        push_to_hub(folder, "vim")
    with pytest.raises(UserError, match="the folder does not exist"):
        push_to_hub(tmp_path / "nothing", "me/vim")
