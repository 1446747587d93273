"""The command of the library alone: which files it takes, what it refuses, and how it goes on."""

import numpy as np
import pytest
import torch

import vim_backbone.embed
import vim_backbone.embedding.parts
import vim_backbone.embedding.work
from vim_backbone import Preprocessing, create_model, load
from vim_backbone.embed import main

SIZES = {"d_model": 32, "depth": 1, "img_size": 32, "num_classes": 0}


@pytest.fixture
def backbone(tmp_path):
    return create_model("vim_tiny", **SIZES).save_pretrained(tmp_path / "backbone")


def test_bands_come_from_arrays(tmp_path, capsys):
    bands = Preprocessing(mean=(0.5,), std=(0.5,), bands=(1,), dtype="uint16", range=((0.0,), (1000.0,)))
    folder = create_model("vim_tiny", **SIZES, in_chans=1).save_pretrained(tmp_path / "bands", preprocessing=bands)
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 999, (2, 40 + number, 50), np.uint16)
        np.save(scenes / f"{number}.npy", values)
    (scenes / "x.png").write_bytes(b"left out")
    (scenes / "pickled.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    )
    assert main([str(folder), str(scenes), str(tmp_path / "f.npy")]) == 0
    model, transform = load(folder)
    with torch.no_grad():
        want = model(transform([scenes / f"{number}.npy" for number in range(3)]))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "f.npy")), want, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "f.npy.names.txt").read_text().split() == ["0.npy", "1.npy", "2.npy"]
    assert "left out, for their endings: 1 .png" in capsys.readouterr().err


def test_what_is_too_large_is_bad(backbone, picture_folder, photo, tmp_path, capsys):
    photo(400, 500).save(picture_folder / "large.png")
    np.save(picture_folder / "large.npy", np.zeros((400, 500, 3), np.uint8))
    argv = [str(backbone), str(picture_folder), str(tmp_path / "f.npy"), "--max_megapixels", "0.1"]
    assert main(argv) == 0
    err = capsys.readouterr().err
    for name in ("large.png", "large.npy"):
        assert f"cannot use {name}: 0 megapixels, over max_megapixels 0.1" in err
    assert "2 of 12 pictures cannot be used" in err
    assert "pictures 12/12  " in err


def test_a_stopped_command_goes_on(backbone, picture_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vim_backbone.embedding.parts, "FEWEST", 4)
    monkeypatch.setattr(vim_backbone.embed, "LINE_SECONDS", 0.0)
    argv = [str(backbone), str(picture_folder), str(tmp_path / "f.safetensors"), "--batch_size", "2"]
    compute, batches = vim_backbone.embedding.work.compute, []

    def stopped(model, images, wanted):
        batches.append(len(images))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return compute(model, images, wanted)

    monkeypatch.setattr(vim_backbone.embedding.work, "compute", stopped)
    assert main(argv) == 130
    assert "pictures 6/10" in capsys.readouterr().err
    assert main(argv) == 2
    assert "--resume goes on, or --overwrite" in capsys.readouterr().err
    assert main([*argv, "--resume", "--precision", "bf16"]) == 2
    assert "was made with other precision" in capsys.readouterr().err
    batches.clear()
    assert main([*argv, "--resume"]) == 0
    assert batches == [2, 2, 2]


def test_half_precision_is_near(backbone, picture_folder, tmp_path):
    argv = [str(backbone), str(picture_folder)]
    assert main([*argv, str(tmp_path / "full.npy")]) == 0
    assert main([*argv, str(tmp_path / "half.npy"), "--precision", "bf16"]) == 0
    full, half = np.load(tmp_path / "full.npy"), np.load(tmp_path / "half.npy")
    assert 1e-5 < np.abs(full - half).max() < 0.05 * np.abs(full).max()


def test_refused_before_work(backbone, picture_folder, tmp_path, monkeypatch, capsys):
    def refused(words, source=picture_folder, out="f.npy", *options):
        assert main([str(backbone), str(source), str(tmp_path / out), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line

    empty = tmp_path / "empty"
    empty.mkdir()
    refused("no pictures below", empty)
    refused("is no folder: give a folder of pictures", picture_folder / "nothing")
    refused("it must end in .parquet, .npy, .safetensors", picture_folder, "f.csv")
    refused("--batch_size is 0", picture_folder, "f.npy", "--batch_size", "0")
    refused("--max_megapixels is inf", picture_folder, "f.npy", "--max_megapixels", "inf")
    refused("--device meta cannot be used", picture_folder, "f.npy", "--device", "meta")
    np.save(picture_folder / "scene.npy", np.zeros((20, 20, 3), np.uint8))
    refused("it is one of the pictures", picture_folder, picture_folder / "scene.npy", "--overwrite")
    assert np.load(picture_folder / "scene.npy").shape == (20, 20, 3)
    (tmp_path / "d.npy").mkdir()
    refused("d.npy is a folder", picture_folder, "d.npy", "--overwrite")
    assert not list(tmp_path.glob("*.parts"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("several take their shares with launch.embed")
