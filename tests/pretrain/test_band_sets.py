"""A run on files with different bands: their statistics, what it reads of them, and the backbone that it publishes."""

import json

import numpy as np
import pytest
import torch

from launch.data.reading import open_file, read_pixels
from launch.data.statistics import Statistics, preprocessing_of
from launch.run.cli import parse
from pretrain.bands import main as statistics
from pretrain.config import PretrainConfig
from pretrain.look import main as look
from pretrain.train import pretrain
from tests.band_files import SETS, bands_of, write, write_scenes
from tests.pretrain.test_train import SMALL
from tests.rows import read_metrics
from vim_backbone import UserError, from_pretrained
from vim_backbone.preprocessing import read_preprocessing, to_model

IN_WORDS = ["3=2,0,1", "5=0,1,2,3,4"]


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path / "scenes")


def made(folder, *argv):
    out = folder.parent / "statistics.json"
    statistics([str(folder), "--out", str(out), *argv])
    return out


def config(folder, *argv):
    return parse(PretrainConfig, [*SMALL, f"--out={folder}", *argv], "pretrain/main.py", "")


def test_statistics_of_a_band_are_of_all_files_that_have_it(scenes):
    measured = Statistics.read(made(scenes, "--sets", *IN_WORDS))
    assert (measured.bands, measured.pictures) == ([0, 1, 2, 3, 4], 6)
    assert measured.sets == [list(held) for held in SETS.values()]
    for band in range(5):
        numbers = [k for k in range(6) if band in list(SETS.values())[k % 2]]
        values = np.concatenate([bands_of(k)[band].ravel() for k in numbers]).astype(np.float64)
        assert measured.mean[band] == pytest.approx(values.mean())
        assert measured.deviation[band] == pytest.approx(values.std())
        assert (measured.minimum[band], measured.maximum[band]) == (values.min(), values.max())
        assert measured.percentiles[0][band] == pytest.approx(np.percentile(values, 0.1), abs=5 * (band + 1))


def test_without_sets_the_majority_decides_as_ever(scenes, capsys):
    write(scenes / "6.tif", bands_of(6))
    content = json.loads(made(scenes).read_text())
    assert "sets" not in content
    assert content["bands"] == [0, 1, 2, 3, 4]
    assert "3 pictures of 3 bands of uint16 are left out, such as 0.tif" in capsys.readouterr().err


def test_band_k_of_a_file_is_band_k_where_nothing_else_is_said(scenes, capsys):
    write(scenes / "float.tif", bands_of(0).astype(np.float32))
    measured = Statistics.read(made(scenes, "--sets"))
    assert measured.sets == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert "1 pictures of 5 bands of float32 are left out, such as float.tif" in capsys.readouterr().err
    few = Statistics.read(made(scenes, "--sets", "--bands", "4,1"))
    assert few.bands == [4, 1]
    assert few.mean == [measured.mean[4], measured.mean[1]]
    settings = preprocessing_of(str(scenes.parent / "statistics.json"), None, None, None)
    assert settings.channel_sets == ((1,),)


@pytest.mark.parametrize(("argv", "line"), [
    (["4=0,1,2,3"], "--sets is .*: the pictures hold 3, 5 bands, which none of them is"),
    (["3=0,1,2", "3=0,1,4"], "two sets have the same length"),
    (["3=0,1,1"], r"--sets has \[0, 1, 1\]: give different numbers"),
    (["3=0,1,2", "5=0,1,2,3,-4"], r"--sets has \[0, 1, 2, 3, -4\]: give different numbers"),
    (["3=0,1,7", "2=5,6"], r"band 5 holds no value"),
    (["3=0,1,999999999"], r"--sets has \[0, 1, 999999999\]: give different numbers of 0 to 4095"),
])  # fmt: skip
def test_wrong_sets(scenes, argv, line):
    with pytest.raises(UserError, match=line):
        made(scenes, "--sets", *argv)


def test_the_number_of_bands_must_be_right(scenes, capsys):
    with pytest.raises(SystemExit):
        made(scenes, "--sets", "3=0,1")
    assert "'3=0,1' does not name so many bands, as 3=0,1,2 does" in capsys.readouterr().err


def test_the_order_in_which_a_file_stores_its_bands_changes_nothing(scenes):
    """And each channel has mean 0 and deviation 1 over all files together."""
    settings = preprocessing_of(str(made(scenes, "--sets", *IN_WORDS)), None, None, None)
    seen = {0: [], 4: []}
    for number in range(6):
        with open_file(scenes / f"{number}.tif") as picture:
            got = to_model(read_pixels(picture, settings, 1), torch.device("cpu"), settings)
            torch.testing.assert_close(settings.model_input(picture.values(1)[0])[0], got)
        assert len(got) == (3 if number % 2 == 0 else 5)
        write(scenes / "other.tif", bands_of(number))  # all of them, in the run's order
        with open_file(scenes / "other.tif") as picture:
            every = to_model(read_pixels(picture, settings, 1), torch.device("cpu"), settings)
        assert torch.equal(got, every[: len(got)])
        for band, values in seen.items():
            values += got[band : band + 1]
    for values in seen.values():
        assert torch.stack(values).mean().abs() < 1e-4
        assert (torch.stack(values).std() - 1).abs() < 1e-3


def test_bands_that_all_files_have_need_no_tokens(scenes, tmp_path):
    path = made(scenes, "--sets", *IN_WORDS)
    settings = config(tmp_path, f"--data.statistics={path}", "--data.bands=[1,0]")
    assert settings.data.preprocessing.channel_sets is None
    assert settings.architecture().channels == "mixed"
    with open_file(scenes / "0.tif") as picture:
        pixels = read_pixels(picture, settings.data.preprocessing, 1).numpy()
    assert np.array_equal(pixels, bands_of(0)[[1, 0]])


@pytest.mark.parametrize(("sizes", "scan"), [("fixed", "full"), ("native", "pooled")])
def test_a_run_on_files_with_three_and_five_bands(scenes, tmp_path, sizes, scan):
    """From the folder to a backbone that takes both; what has other bands is named; a resumed run keeps its sets."""
    argv = ["--model.channels=tokens", f"--model.scan={scan}", f"--data.source={scenes}", f"--data.sizes={sizes}"]
    argv.append(f"--data.statistics={made(scenes, '--sets', *IN_WORDS)}")
    write(scenes / "two.tif", bands_of(0)[:2])
    folder = pretrain(config(tmp_path, "--steps=3", *argv))
    rows = read_metrics(folder / "metrics.jsonl")
    assert all(0.2 < row["loss"] < 3 for row in rows)
    bad = dict(line.split("\t") for line in (folder / "bad_pictures.txt").read_text().splitlines())
    assert bad == {"two.tif": "it holds 2 bands, and files of 3 or 5 are known (data.statistics)"}
    assert list((folder / "reconstructions").glob("*.png"))
    settings, backbone = read_preprocessing(folder / "backbone"), from_pretrained(folder / "backbone")
    assert (settings.sets, settings.bands) == (tuple(SETS.values()), (0, 1, 2, 3, 4))
    assert (backbone.config.channels, backbone.config.in_chans) == ("tokens", 5)
    assert backbone.config.channel_sets == ((0, 1, 2),)
    views = [settings.model_input(bands_of(7)[list(held), :32, :32])[0] for held in SETS.values()]
    alone = torch.cat([backbone(view[None]) for view in views])
    torch.testing.assert_close(backbone(views), alone, rtol=1e-4, atol=1e-5)
    path = scenes.parent / "statistics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sets": [[0, 1, 2], [0, 1, 2, 3, 4]]}))
    with pytest.raises(UserError, match="the run was started with sets"):
        pretrain(config(tmp_path, "--steps=5", *argv, "--resume"))


@pytest.mark.parametrize(("argv", "line"), [
    ([], "pictures have 3 of 5 bands, and channels is 'mixed', which takes all: pretrain with model.channels tokens"),
    (["--model.channels=token"], "model.channels"),
])  # fmt: skip
def test_before_a_run_what_cannot_be_meant_is_refused(scenes, tmp_path, argv, line):
    path = made(scenes, "--sets", *IN_WORDS)
    with pytest.raises(UserError, match=line):
        pretrain(config(tmp_path, f"--data.source={scenes}", f"--data.statistics={path}", *argv))
    assert not (tmp_path / "pretrain").exists()


def test_files_with_different_bands_are_not_compiled(scenes, tmp_path, monkeypatch):
    path = made(scenes, "--sets", *IN_WORDS)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    argv = [f"--data.source={scenes}", f"--data.statistics={path}", "--model.channels=tokens"]
    with pytest.raises(UserError, match=r"data\.statistics is .*differ in bands.*--dynamo_backend no"):
        pretrain(config(tmp_path, *argv))


@pytest.mark.parametrize("change", [{"sets": [0, 1]}, {"sets": [["0"]]}, {"bands": None, "sets": [[0, 1, 2]]}])
def test_files_of_statistics_whose_sets_make_no_sense(scenes, change):
    path = made(scenes, "--sets")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="was not written by python -m pretrain"):
        preprocessing_of(str(path), None, None, None)


def test_the_page_of_a_folder_with_different_bands(scenes, tmp_path):
    path, page = made(scenes, "--sets", *IN_WORDS), tmp_path / "page.png"
    write(scenes / "two.tif", bands_of(0)[:2])
    fields = [f"--data.statistics={path}", "--model.channels=tokens", "--model.img_size=32", "--pictures=3"]
    look([str(scenes), *fields, f"--page={page}"])
    assert page.read_bytes()[:4] == b"\x89PNG"
