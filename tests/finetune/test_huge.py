"""Maps of pictures larger than memory: the windows fit together, and each reads no more than itself."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import finetune.predict
from finetune.main import main as finetune_main
from finetune.predict import main as predict
from finetune.segmentation.huge import HugeMap
from launch.data.reading import open_file
from tests.finetune.test_bands import band_backbone, band_data  # noqa: F401 - fixtures
from tests.finetune.test_predict import MORE, SMALL
from vim_backbone import UserError
from vim_backbone.preprocessing import RGB, Preprocessing


def bright(pixels):
    """Class 1 where the first band is bright: what a pixel is, it is in every window."""
    return (pixels[0, 0] > 127).long()


@pytest.mark.parametrize("shape", [(300, 420), (64, 64), (20, 500), (129, 65)])
@pytest.mark.parametrize("window", [(64, 64), (48, 96)])
def test_tiles_fit_together_whatever_the_shape(tmp_path, shape, window):
    values = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "picture.tif", values, photometric="rgb", tile=(32, 32))
    shapes = []

    def segment(pixels):
        shapes.append(tuple(pixels.shape[2:]))
        return bright(pixels)

    with open_file(tmp_path / "picture.tif") as picture:
        huge = HugeMap(picture, RGB, window)
        counts = huge.write(tmp_path / "map.tif", np.array([7, 9], np.uint8), segment)
    want = values[..., 0] > 127
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), np.where(want, 9, 7))
    assert counts.tolist() == [int((~want).sum()), int(want.sum())]
    assert all(h <= window[0] and w <= window[1] for h, w in shapes)
    picture, labels = huge.thumbnail()
    assert np.array_equal(labels, want)
    assert np.allclose(picture, values / 255)


def test_what_a_window_says_near_its_edge_is_not_used_inside_a_picture(tmp_path):
    np.save(tmp_path / "picture.npy", np.zeros((200, 300, 3), np.uint8))

    def near_the_edge(pixels):
        labels = torch.ones(pixels.shape[2:], dtype=torch.long)
        labels[8:-8, 8:-8] = 0
        return labels

    with open_file(tmp_path / "picture.npy") as picture:
        HugeMap(picture, RGB, (64, 64)).write(tmp_path / "map.tif", np.arange(2, dtype=np.uint8), near_the_edge)
    labels = tifffile.imread(tmp_path / "map.tif")
    assert not labels[8:-8, 8:-8].any()
    assert labels[:8].all()


def test_what_is_drawn_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.segmentation.huge.THUMBNAIL", 50)
    values = np.random.default_rng(0).integers(0, 255, (130, 211, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", values)
    with open_file(tmp_path / "picture.npy") as picture:
        huge = HugeMap(picture, RGB, (64, 64))
        huge.write(tmp_path / "map.tif", np.arange(2, dtype=np.uint8), bright)
        small, labels = huge.thumbnail()
    assert np.allclose(small, values[::4, ::4] / 255)
    assert np.array_equal(labels, values[::4, ::4, 0] > 127)


def test_windows_too_small_for_tiles(tmp_path):
    np.save(tmp_path / "picture.npy", np.zeros((40, 40, 3), np.uint8))
    with open_file(tmp_path / "picture.npy") as picture, pytest.raises(UserError, match="need 16 pixels or more"):
        HugeMap(picture, Preprocessing(), (8, 8))


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_predictions_on_huge_pictures_of_bands(task, band_data, band_backbone, tmp_path, monkeypatch):  # noqa: F811
    argv = [f"--backbone={band_backbone}", f"--data.source={band_data(task)}", f"--out={tmp_path}"]
    finetune_main([task, *SMALL, *MORE[task], *argv])
    rng = np.random.default_rng(0)
    values = (rng.random((90, 120, 4)) * 9000 + 1).astype(np.uint16)
    tifffile.imwrite(tmp_path / "huge.tif", values, photometric="minisblack", extrasamples=[0] * 3, tile=(32, 32))
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    monkeypatch.setattr(finetune.predict, "MAX_MEGAPIXELS", 0.01)
    monkeypatch.setattr("finetune.task.MAX_MEGAPIXELS", 0.01)
    files = [str(tmp_path / name) for name in ("huge.tif", "small.png")]
    predict([str(tmp_path / task), *files, "--out", str(tmp_path / "out")])
    row, small = json.loads((tmp_path / "out/predictions.json").read_text())
    assert "band 3 is wanted" in small["error"]
    if task == "detection":
        assert row["error"] == "0 megapixels, over max_megapixels 0.01"
        assert "drawing" not in row
        return
    labels = tifffile.imread(tmp_path / "out" / row["labels"])
    assert labels.shape == (90, 120)
    assert set(np.unique(labels)) <= {1, 2, 3, 4}
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert (tmp_path / "out" / row["drawing"]).exists()
