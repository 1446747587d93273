"""Features of one large picture by window: those of the whole picture, of any format that is read by window."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import launch.embed_large
from launch.embed_large import main
from vim_backbone import UserError, create_model, load


@pytest.fixture
def backbone(tmp_path):
    made = create_model("vim_tiny", d_model=32, depth=2, img_size=32, num_classes=3, num_registers=1)
    return made.save_pretrained(tmp_path / "backbone")


@pytest.fixture
def values():
    return np.random.default_rng(0).integers(0, 255, (170, 209, 3), np.uint8)


def features_of(backbone, values):
    """(rows, columns, d_model) of the whole picture."""
    model, transform = load(backbone)
    pixels = transform(values)
    with torch.no_grad():
        tokens = model.forward_features(pixels)[0, model.num_prefix_tokens :]
    return tokens.unflatten(0, model.config.grid(*pixels.shape[-2:])).numpy()


@pytest.mark.parametrize("window", [48, 64, 4096])
def test_a_tiled_tiff_gives_the_features_of_the_whole_picture(backbone, values, tmp_path, window, monkeypatch, capsys):
    monkeypatch.setattr("launch.data.tiff.WHOLE", 0)  # as of a picture of many megapixels
    picture, out = tmp_path / "scene.tif", tmp_path / "deep/features.npy"
    tifffile.imwrite(picture, values, tile=(64, 64), photometric="rgb", compression="deflate")
    boxes, read = [], launch.embed_large.read_pixels
    monkeypatch.setattr(launch.embed_large, "read_pixels", lambda *a: (boxes.append(a[3]), read(*a))[1])
    main([str(backbone), str(picture), str(out), "--window", str(window), "--slice", "50"])
    assert capsys.readouterr().out == f"{out}\n"
    got = np.load(out)
    np.testing.assert_allclose(got, features_of(backbone, values), rtol=1e-5, atol=2e-5)
    assert got.shape == (11, 14, 32)
    assert all(right - left <= window and bottom - top <= window for left, top, right, bottom in boxes)
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    assert area == 170 * 209


def test_bfloat16_writes_float16_and_a_file_that_is_there_stays(backbone, values, tmp_path):
    picture, out = tmp_path / "scene.npy", tmp_path / "features.npy"
    np.save(picture, values)
    main([str(backbone), str(picture), str(out), "--dtype", "bfloat16"])
    got, want = np.load(out), features_of(backbone, values)
    assert got.dtype == np.float16
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    with pytest.raises(UserError, match="it exists"):
        main([str(backbone), str(picture), str(out)])
    main([str(backbone), str(picture), str(out), "--overwrite"])
    assert np.load(out).dtype == np.float32


def test_what_cannot_be_is_named(backbone, values, tmp_path):
    Image.fromarray(values).save(tmp_path / "photo.png")
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no picture")
    for picture, why in (("photo.png", "read only whole"), ("broken.tif", "cannot use"), ("none.tif", "cannot use")):
        with pytest.raises(UserError, match=why):
            main([str(backbone), str(tmp_path / picture), str(tmp_path / "out.npy")])
    with pytest.raises(UserError, match=r"must end in \.npy"):
        main([str(backbone), str(tmp_path / "photo.png"), str(tmp_path / "out.parquet")])
    assert not (tmp_path / "out.npy").exists()
    (tmp_path / "file").touch()
    np.save(tmp_path / "scene.npy", values)
    before = (tmp_path / "scene.npy").read_bytes()
    for out, why in (("file/out.npy", "cannot make the folder"), ("scene.npy", "it is the picture")):
        with pytest.raises(UserError, match=why):
            main([str(backbone), str(tmp_path / "scene.npy"), str(tmp_path / out), "--overwrite"])
    assert (tmp_path / "scene.npy").read_bytes() == before
