"""Checkpoints: complete or absent, without pickles, newest kept; what is damaged or foreign is named."""

import errno

import pytest
import torch
from torch import nn

import vim_backbone.files
from launch.state.checkpoint import Checkpoint, TrainState, checkpoints, newest_valid, snapshot, write_snapshot
from vim_backbone import UserError


def save_checkpoint(state, folder, **options):
    return write_snapshot(snapshot(state), folder, **options)


def state(width=4, seed=0, steps=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = TrainState(model, optimizer, extra={"note": "x"})
    for _ in range(steps):
        advance(run)
    return run


def advance(state):
    generator = torch.Generator().manual_seed(state.step)
    state.model(torch.randn(8, 3, generator=generator)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1


def test_going_on_from_a_checkpoint_is_exact(tmp_path):
    whole = state()
    save_checkpoint(whole, tmp_path, keep=1)
    resumed = state(seed=9, steps=0)
    Checkpoint(tmp_path / "step-00000002").load(resumed)
    assert resumed.step == 2
    assert resumed.extra == {"note": "x"}
    for _ in range(3):
        advance(whole)
        advance(resumed)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_pickled(tmp_path):
    folder = save_checkpoint(state(), tmp_path, keep=1)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}


def test_the_newest_are_kept(tmp_path):
    run = state(steps=0)
    for _ in range(4):
        advance(run)
        save_checkpoint(run, tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    run = state()
    save_checkpoint(run, tmp_path, keep=1)
    advance(run)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vim_backbone.files, "save_file", full)
    with pytest.raises(UserError, match=r"step 3 not saved: .*the disk is full.*step-00000002 is intact") as caught:
        save_checkpoint(run, tmp_path, keep=1)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    Checkpoint(tmp_path / "step-00000002").load(state(steps=0))


def test_a_killed_save_leaves_no_checkpoint(tmp_path):
    (tmp_path / ".step-00000009.partial").mkdir()
    assert checkpoints(tmp_path) == []


def test_damaged_and_foreign_checkpoints(tmp_path):
    folder = save_checkpoint(state(), tmp_path, keep=1)
    with pytest.raises(UserError, match=r"0\.weight has shape \(4, 3\), the model wants \(5, 3\)"):
        Checkpoint(folder).load(state(width=5, steps=0))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        Checkpoint(folder).load(state(steps=0))
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*state\.json"):
        Checkpoint(folder).load(state(steps=0))


def test_a_damaged_newest_is_named_and_the_one_before_used(tmp_path):
    run = state()
    for _ in range(3):
        advance(run)
        save_checkpoint(run, tmp_path, keep=9)
    flipped = tmp_path / "step-00000005/optimizer.safetensors"
    raw = bytearray(flipped.read_bytes())
    raw[-1] ^= 1  # one bit, deep in a tensor: only the sum can tell
    flipped.write_bytes(raw)
    (tmp_path / "step-00000004/model.safetensors").unlink()
    path, damaged = newest_valid(tmp_path)
    assert path is not None
    assert path.name == "step-00000003"
    assert "optimizer.safetensors has another sha256" in damaged[0]
    assert "model.safetensors is missing" in damaged[1]


def test_every_nth_stays(tmp_path):
    run = state(steps=0)
    for _ in range(6):
        advance(run)
        save_checkpoint(run, tmp_path, keep=1, keep_every=2)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "4", "6"]


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    folder = save_checkpoint(state(), tmp_path, keep=1)
    file = folder / "state.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(UserError, match="has checkpoint format 7, this code reads 1"):
        Checkpoint(folder).load(state(steps=0))
