"""Statistics of bands against NumPy's over all values, and what the fields of the data make of them."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import torch

from launch.data.crops import random_crop
from launch.data.reading import open_file, read_pixels
from launch.data.sources import open_source
from launch.data.statistics import Statistics, preprocessing_of
from launch.run.cli import parse
from launch.run.randomness import generator
from pretrain.bands import gather, main
from pretrain.config import PretrainConfig
from pretrain.data import DataConfig
from pretrain.train import pretrain
from tests.pretrain.test_train import SMALL
from tests.rows import read_metrics
from vim_backbone import UserError, from_pretrained
from vim_backbone.preprocessing import read_preprocessing, to_model


def four_bands(number, shape=(60, 80), dtype=np.uint16):
    """A scene of 4 bands whose first rows hold nothing, 0."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [(k + 1) * (500 + 300 * np.sin((x + 9 * number) / (5 + k)) * np.cos(y / (6 + k))) for k in range(4)]
    values = (np.stack(waves) + rng.normal(0, 20, (4, *shape))).clip(1, None).astype(dtype)
    values[:, :7] = 0
    return values


def write(path, values, nodata=None):
    more = {} if nodata is None else {"extratags": [(42113, "s", 0, nodata, True)]}
    extra = [0] * (len(values) - 1)
    pixels = np.moveaxis(values, 0, -1)
    tifffile.imwrite(path, pixels, photometric="minisblack", extrasamples=extra, tile=(32, 32), **more)


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for number in range(6):
        write(folder / f"{number}.tif", four_bands(number), "0")
    return folder


def made(folder, *argv):
    out = folder.parent / "statistics.json"
    main([str(folder), "--out", str(out), *argv])
    return out


def test_statistics_are_those_of_all_values_that_hold_something(scenes):
    measured = Statistics.read(made(scenes))
    values = np.concatenate([four_bands(k)[:, 7:].reshape(4, -1) for k in range(6)], axis=1).astype(np.float64)
    assert (measured.bands, measured.dtype, measured.nodata, measured.pictures) == ([0, 1, 2, 3], "uint16", 0.0, 6)
    assert np.allclose(measured.mean, values.mean(1))
    assert np.allclose(measured.deviation, values.std(1))
    assert (measured.minimum, measured.maximum) == (values.min(1).tolist(), values.max(1).tolist())
    low, high = np.percentile(values, (0.1, 99.9), axis=1)
    spread = values.max(1) - values.min(1)
    assert (np.abs(np.array(measured.percentiles) - (low, high)) / spread).max() < 0.02


def test_the_model_sees_mean_0_and_deviation_1(scenes):
    settings = preprocessing_of(str(made(scenes)), [3, 1], None, None)
    assert (settings.bands, settings.in_chans, settings.nodata) == ((3, 1), 2, 0.0)
    inputs = []
    for number in range(6):
        with open_file(scenes / f"{number}.tif") as picture:
            inputs.append(to_model(read_pixels(picture, settings, 1), torch.device("cpu"), settings))
            whole = settings.model_input(picture.values(1)[0])[0]
        torch.testing.assert_close(whole, inputs[-1])
    together = torch.stack(inputs)
    assert together[:, :, :7].abs().max() < 2e-3, "nodata is the mean, but for rounding to whole numbers"
    valid = together[:, :, 7:].double()
    assert valid.mean((0, 2, 3)).abs().max() < 1e-5
    assert (valid.std((0, 2, 3)) - 1).abs().max() < 1e-4


def test_fields_of_the_data(scenes, tmp_path):
    path = str(made(scenes))
    measured = Statistics.read(Path(path))
    fixed = preprocessing_of(path, None, [0.0, 10000.0], None)
    assert fixed.range == ((0.0,) * 4, (10000.0,) * 4)
    assert fixed.mean == pytest.approx([mean / 10000 for mean in measured.mean])
    assert fixed.std == pytest.approx([deviation / 10000 for deviation in measured.deviation])
    assert preprocessing_of(path, None, "type", None).range == ((0.0,) * 4, (65535.0,) * 4)
    assert preprocessing_of(path, [2], "percentiles", None).range == (
        (measured.percentiles[0][2],),
        (measured.percentiles[1][2],),
    )
    for bands, limits, line in (
        ([0, 4], None, r"data.bands has 4, data.statistics .* have the bands \[0, 1, 2, 3\]"),
        ([-1], None, r"data.bands is \[-1\]: give the numbers of bands"),
        (None, [5.0, 5.0], r"data.range is \[5.0, 5.0\]: give the lowest and the highest value"),
    ):
        with pytest.raises(UserError, match=line):
            preprocessing_of(path, bands, limits, None)
    with pytest.raises(UserError, match="they are taken from data"):
        preprocessing_of(None, None, "percentiles", None)
    for content in ({}, {"bands": [0]}, json.loads((tmp_path / "statistics.json").read_text()) | {"mean": [1.0]}, []):
        (tmp_path / "wrong.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="was not written by python -m pretrain"):
            DataConfig(statistics=str(tmp_path / "wrong.json"))
    with pytest.raises(UserError, match=r"missing\.json"):
        DataConfig(statistics=str(tmp_path / "missing.json"))


def test_odd_pictures_are_left_out_and_named(scenes, capsys):
    write(scenes / "deep.tif", four_bands(0).astype(np.float32))
    write(scenes / "fewer.tif", four_bands(0)[:3])
    (scenes / "cut.tif").write_bytes((scenes / "0.tif").read_bytes()[:900])
    measured = Statistics.read(made(scenes))
    printed = capsys.readouterr().err
    assert measured.pictures == 6
    assert "1 pictures cannot be read, such as cut.tif" in printed
    assert "1 pictures of 4 bands of float32 are left out, such as deep.tif" in printed
    assert "1 pictures of 3 bands of uint16 are left out, such as fewer.tif" in printed


def test_of_colours_the_pictures_stay_8_bit_rgb(picture_folder):
    source = open_source(str(picture_folder), split="train", column=None, streaming=False)
    measured, notes = gather(source, 100, 0, None, None, 100)
    assert (measured.bands, measured.dtype, len(measured.mean), notes) == (None, "uint8", 3, [])
    measured.write(picture_folder / "rgb.json")
    settings = preprocessing_of(str(picture_folder / "rgb.json"), None, None, None)
    assert settings.bands is None
    assert settings.scale == ((0.0,) * 3, (255.0,) * 3)
    assert settings.mean == pytest.approx([value / 255 for value in measured.mean])


@pytest.mark.parametrize(("argv", "line"), [
    (["--bands", "0,9"], "--bands has 9: the pictures hold 4 bands of uint16"),
    (["--pictures", "0"], "--pictures is 0"),
])  # fmt: skip
def test_wrong_options(scenes, argv, line):
    with pytest.raises(UserError, match=line):
        made(scenes, *argv)


def test_nan_is_no_value_until_it_is_said(tmp_path):
    values = four_bands(0).astype(np.float32)
    values[:, :7] = np.nan
    (tmp_path / "floats").mkdir()
    write(tmp_path / "floats/0.tif", values)
    with pytest.raises(UserError, match=r"11.67% of its values are NaN or infinite; add --nodata nan"):
        made(tmp_path / "floats")
    measured = Statistics.read(made(tmp_path / "floats", "--nodata", "nan"))
    assert measured.nodata == "nan"
    assert np.allclose(measured.mean, values[:, 7:].reshape(4, -1).mean(1))


def config(folder, *argv):
    return parse(PretrainConfig, [*SMALL, f"--out={folder}", *argv], "pretrain/main.py", "")


def test_a_run_on_four_bands_of_16_bits(scenes, tmp_path):
    """From the folder to a published backbone that says what it takes; bad pictures on the way are named."""
    statistics = made(scenes)
    write(scenes / "float.tif", four_bands(0).astype(np.float32))
    write(scenes / "three.tif", four_bands(0)[:3])
    write(scenes / "nan.tif", np.full((4, 40, 40), np.nan, np.float32))
    folder = pretrain(
        config(
            tmp_path,
            "--steps=6",
            f"--data.source={scenes}",
            f"--data.statistics={statistics}",
            "--data.bands=[3,0,1,2]",
        )
    )
    rows = read_metrics(folder / "metrics.jsonl")
    assert all(0.2 < row["loss"] < 3 for row in rows)
    bad = dict(line.split("\t") for line in (folder / "bad_pictures.txt").read_text().splitlines())
    assert bad.keys() == {"float.tif", "three.tif", "nan.tif"}
    assert bad["three.tif"] == "it holds 3 bands of uint16, and band 3 is wanted (data.bands [3, 0, 1, 2])"
    settings = read_preprocessing(folder / "backbone")
    assert (settings.bands, settings.dtype, settings.nodata) == ((3, 0, 1, 2), "uint16", 0.0)
    measured = Statistics.read(statistics)
    assert settings.range[0] == pytest.approx([measured.percentiles[0][band] for band in (3, 0, 1, 2)])
    backbone = from_pretrained(folder / "backbone")
    assert backbone.config.in_chans == 4
    assert backbone(settings.model_input(four_bands(1, (32, 32)))).shape == (1, 192)
    assert list((folder / "reconstructions").glob("*.png"))


def test_native_sizes_of_bands(scenes, tmp_path):
    statistics = made(scenes)
    folder = pretrain(
        config(
            tmp_path, "--steps=2", f"--data.source={scenes}", f"--data.statistics={statistics}", "--data.sizes=native"
        )
    )
    assert all(0.2 < row["loss"] < 3 for row in read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_a_data_set_hold_bands_too(scenes, tmp_path, streaming):
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(scenes.glob("*.tif"))]
    data = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features(image=datasets.Image()))
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet/part.parquet")
    source = f"{tmp_path}/parquet/part.parquet"
    more = ["--streaming"] if streaming else []
    main([source, "--out", str(tmp_path / "cells.json"), *more])
    assert Statistics.read(tmp_path / "cells.json").mean == pytest.approx(Statistics.read(made(scenes)).mean)
    argv = [f"--data.source={source}", f"--data.streaming={str(streaming).lower()}"]
    folder = pretrain(config(tmp_path, "--steps=1", *argv, f"--data.statistics={tmp_path}/cells.json"))
    assert 0.2 < read_metrics(folder / "metrics.jsonl")[0]["loss"] < 3
    with pytest.raises(UserError, match="6 of 6 pictures cannot be what is meant, such as row 0: it holds 4 bands"):
        pretrain(config(tmp_path, "--name=rgb", "--steps=1", *argv))


@pytest.mark.parametrize(("argv", "line"), [
    ([], r"6 of 6 pictures cannot be what is meant, such as 0.tif: it holds 4 bands of uint16, and RGB takes 1 or 3"),
    (["--data.bands=[0,1]"], r"data.bands is \[0, 1\]: their mean and deviation are not known, run python -m pretrain"),
])  # fmt: skip
def test_before_a_run_what_cannot_be_meant_is_refused(scenes, tmp_path, argv, line):
    with pytest.raises(UserError, match=line):
        pretrain(config(tmp_path, "--steps=2", f"--data.source={scenes}", *argv))
    assert not (tmp_path / "pretrain").exists()


def test_the_command_line_takes_every_kind_of_range_and_nodata(tmp_path):
    for words, limits in (("[0, 4095]", [0, 4095]), ("type", "type"), ("null", None)):
        assert config(tmp_path, f"--data.range={words}").data.range == limits
    for words, nodata in (("-9999", -9999), ("null", None), ("nan", "nan")):
        got = config(tmp_path, f"--data.nodata={words}").data
        assert got.nodata == nodata or got.preprocessing.nodata != got.preprocessing.nodata
    assert config(tmp_path, "--data.bands=[0, 4, 2, 2]").architecture().in_chans == 4


def test_crops_of_huge_pictures_are_bounded():
    data = DataConfig(crop_megapixels=0.0004)
    for key in range(50):
        left, top, right, bottom = random_crop(3000, 2000, data.min_scale, generator(key), data.crop_megapixels * 1e6)
        assert (right - left) * (bottom - top) <= 440
        assert 0 <= left < right <= 3000
    left, top, right, bottom = random_crop(10_000, 10, 1.0, generator(0), 40)
    assert 1 <= (right - left) * (bottom - top) <= 44


@pytest.mark.parametrize("change", [
    {"nodata": "none"}, {"nodata": [1]}, {"bands": ["0", "1", "2", "3"]}, {"bands": [-1, 0, 1, 2]}, {"bands": None},
    {"bands": [0.5, 1, 2, 3]}, {"dtype": None}, {"dtype": "object"}, {"deviation": [-1, 1, 1, 1]},
    {"percentiles": [[9] * 4, [0] * 4]},
])  # fmt: skip
def test_files_of_statistics_that_make_no_sense(scenes, change):
    path = made(scenes)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="was not written by python -m pretrain"):
        preprocessing_of(str(path), None, None, None)


def test_a_band_of_one_value_does_not_explode(tmp_path):
    for name, bands, want in (("bands", 2, 10.0), ("rgb", 3, 10 / 255)):
        values = np.full((bands, 40, 40), 30, np.uint8)
        values[1] = np.arange(40)
        (tmp_path / name).mkdir()
        colours = {"photometric": "rgb"} if bands == 3 else {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(tmp_path / name / "flat.tif", np.moveaxis(values, 0, -1), **colours)
        (tmp_path / name / "statistics.json").touch()
        settings = preprocessing_of(str(made(tmp_path / name)), None, "percentiles", None)
        other = torch.tensor(values + np.uint8(10))
        seen = to_model(torch.stack([torch.tensor(values), other]), torch.device("cpu"), settings)[:, 0]
        assert seen[0].abs().max() < 1e-6
        assert seen[1].flatten().tolist() == pytest.approx([want] * 1600, rel=1e-3)


def test_nodata_that_the_files_do_not_share_is_left_to_each(scenes, capsys):
    values = four_bands(7)
    values[:, 30:40] = 65535
    write(scenes / "other.tif", values, "65535")
    measured = Statistics.read(made(scenes))
    assert measured.nodata is None
    assert "the files name different nodata (0.0, 65535.0): each keeps its own" in capsys.readouterr().err
    assert measured.maximum[0] < 65535
    settings = preprocessing_of(str(scenes.parent / "statistics.json"), None, None, None)
    with open_file(scenes / "other.tif") as picture:
        pixels = read_pixels(picture, settings, 1).numpy()
    assert (pixels[:, :7] == 0).all(), "of another file's nodata this one says nothing"
    assert (pixels[:, 30:40] == np.round(settings.fill)[:, None, None]).all()


def test_a_pixel_holds_nothing_where_the_chosen_bands_do(tmp_path):
    values = np.random.default_rng(0).integers(1, 100, (3, 40, 40), dtype=np.uint16)
    values[:2, :10] = 0
    (tmp_path / "scenes").mkdir()
    write(tmp_path / "scenes/a.tif", values, "0")
    measured = Statistics.read(made(tmp_path / "scenes", "--bands", "0,1"))
    assert measured.minimum == [1, 1]
    assert measured.mean == pytest.approx(values[:2, 10:].mean((1, 2)))
    assert Statistics.read(made(tmp_path / "scenes")).minimum[0] == 0


def test_a_resumed_run_sees_pixels_as_before(scenes, tmp_path):
    path = made(scenes)
    argv = [f"--data.source={scenes}", f"--data.statistics={path}", "--steps=2"]
    pretrain(config(tmp_path, *argv))
    for change in (["--data.range=type"], ["--data.nodata=7"]):
        with pytest.raises(UserError, match="the run was started with"):
            pretrain(config(tmp_path, *argv, *change, "--resume", "--steps=3"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"mean": [1.0] * 4}))
    with pytest.raises(UserError, match="the run was started with image_mean"):
        pretrain(config(tmp_path, *argv, "--resume", "--steps=3"))
    path.write_text(json.dumps(content))
    pretrain(config(tmp_path, *argv, "--resume", "--steps=3"))
