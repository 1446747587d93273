"""Checkpoints: complete or absent, without pickles, newest kept; what is damaged or foreign is named."""

import errno
import io
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

import vim_backbone.files
from launch.state.checkpoint import (
    Checkpoint,
    TrainState,
    checkpoints,
    newest_valid,
    snapshot,
    tidy,
    verify,
    write_snapshot,
)
from vim_backbone import UserError
from vim_backbone.files import write_tensors


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


def test_damaged_and_later_ones_take_no_place(tmp_path):
    """Only the newest whole ones count, and what was just written always stays."""
    run = state(steps=0)
    for _ in range(3):
        advance(run)
        save_checkpoint(run, tmp_path, keep=3)
    (tmp_path / "step-00000002/model.safetensors").unlink()  # as an older version left it, killed while deleting
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00009000")
    (tmp_path / "step-00009001").mkdir()
    for keep, names in ((2, ["3", "4", "9000", "9001"]), (1, ["5", "9000", "9001"])):
        advance(run)
        final = save_checkpoint(run, tmp_path, keep=keep)
        assert final.exists()
        assert [p.name.lstrip("step-0") for p in checkpoints(tmp_path)] == names


def test_a_flipped_bit_takes_no_place_either(tmp_path):
    run = state(steps=0)
    for _ in range(3):
        advance(run)
        save_checkpoint(run, tmp_path, keep=3)
    flipped = tmp_path / "step-00000003/optimizer.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"x")
    advance(run)
    save_checkpoint(run, tmp_path, keep=2)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "4"]


@pytest.mark.parametrize("manifest", ["{}", "[]", "null", "", "{", '{"a": 1}', '{"a": {"bytes": "x"}}', "[" * 9999])
def test_an_odd_manifest_is_damage(tmp_path, manifest):
    folder = save_checkpoint(state(), tmp_path, keep=1)
    (folder / "manifest.json").write_text(manifest)
    path, damaged = newest_valid(tmp_path)
    assert path is None
    assert "manifest.json" in damaged[0]
    assert "\n" not in damaged[0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_manifest_names_every_file(tmp_path, name):
    folder = save_checkpoint(state(), tmp_path, keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({n: entry for n, entry in manifest.items() if n != name}))
    assert verify(folder) == f"manifest.json names no {name}"
    outside = manifest | {"../step-00000002/state.json": manifest["state.json"]}
    (folder / "manifest.json").write_text(json.dumps(outside))
    assert "which is no file's name" in str(verify(folder))


def test_a_file_in_place_of_a_checkpoint_is_damage_and_is_replaced(tmp_path):
    run = state()
    save_checkpoint(run, tmp_path, keep=3)
    (tmp_path / "step-00000003").write_text("no folder")
    (tmp_path / ".step-00000003.partial").write_text("no folder")
    assert newest_valid(tmp_path) == (
        tmp_path / "step-00000002", [f"{tmp_path / 'step-00000003'} is damaged (it is no folder)"]
    )  # fmt: skip
    advance(run)
    final = save_checkpoint(run, tmp_path, keep=3)
    assert newest_valid(tmp_path) == (final, [])
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_written_names_the_newest_whole_one(tmp_path, monkeypatch):
    run = state()
    save_checkpoint(run, tmp_path, keep=3)
    (tmp_path / "step-00000009").mkdir()

    def full(tensors, path, metadata):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vim_backbone.files, "save_file", full)
    advance(run)
    with pytest.raises(UserError, match="step-00000002 is intact"):
        save_checkpoint(run, tmp_path, keep=3)


@pytest.mark.parametrize("where", ["", "manifest.json", "model.safetensors"])
def test_no_permission_is_no_damage(tmp_path, monkeypatch, where):
    folder = save_checkpoint(state(), tmp_path, keep=1)
    opened = io.open

    def deny(file, *args, **options):
        if str(file).endswith(where or ".json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **options)

    monkeypatch.setattr(io, "open", deny)
    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(UserError, match=r"cannot read .*: Permission denied; resume as the user who may") as caught:
        newest_valid(tmp_path)
    assert "overwrite" not in str(caught.value)
    assert folder.exists()


def test_a_folder_that_may_not_be_read_has_no_end_of_checkpoints(tmp_path, monkeypatch):
    def deny(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(UserError, match="Permission denied"):
        checkpoints(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", "", "\x00", '{"format": 1}', '{"format": 1, "step": "4"}',
                                     '{"format": 1, "step": -1}', '{"format": 1, "step": true}'])  # fmt: skip
def test_an_odd_state_is_named(tmp_path, content):
    folder = save_checkpoint(state(), tmp_path, keep=1)
    (folder / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json") as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_what_a_kill_left_is_cleared_and_what_was_whole_put_back(tmp_path):
    run = state()
    save_checkpoint(run, tmp_path, keep=3)
    advance(run)
    save_checkpoint(run, tmp_path, keep=3)
    (tmp_path / "step-00000003").rename(tmp_path / ".step-00000003.deleted")  # about to be replaced
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000002.deleted")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000001.deleted")
    (tmp_path / ".step-00000001.deleted/state.json").unlink()  # half deleted
    (tmp_path / ".step-00000004.partial").mkdir()
    (tmp_path / "notes.txt").write_text("")
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-00000002", "step-00000003"]
    assert newest_valid(tmp_path) == (tmp_path / "step-00000003", [])


def test_a_deleted_folder_is_not_made_again(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint at step 2 not saved: .*run was deleted"):
        save_checkpoint(state(), tmp_path / "run/checkpoints", keep=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = save_checkpoint(state(), tmp_path, keep=1)
        write_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    for path in [*folder.iterdir(), tmp_path / "weights.safetensors"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def test_a_killed_write_leaves_nothing_for_the_next(tmp_path, monkeypatch):
    def killed(tensors, path, metadata):
        (path.parent / ".tmpAbCdEf").write_bytes(b"half")  # as safetensors does
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vim_backbone.files, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert not (tmp_path / "a.safetensors").exists()
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
