"""Fine-tuning and predictions on files with different bands, each of which is tokens, in all three tasks."""

import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from finetune.backbone import read_backbone
from finetune.config import BackboneConfig
from finetune.main import main as finetune
from finetune.pixels import fill_of, on_device, stacked
from finetune.predict import main as predict
from finetune.segmentation.config import SegmentationHead
from finetune.segmentation.model import Segmenter
from pretrain.bands import main as statistics
from tests.finetune.conftest import ARCHITECTURE, converted
from tests.finetune.test_bands import SCALE
from tests.finetune.test_predict import MORE, PICTURES, SMALL
from vim_backbone import UserError, VimConfig, VisionMamba, from_pretrained
from vim_backbone.folder import read_config
from vim_backbone.preprocessing import Preprocessing, read_preprocessing

SETS = ((2, 0, 1), (0, 1, 2, 3, 4))
BANDS = Preprocessing(
    mean=(0.4, 0.5, 0.45, 0.6, 0.5),
    std=(0.2, 0.25, 0.22, 0.3, 0.25),
    bands=(0, 1, 2, 3, 4),
    dtype="uint16",
    range=((0.0,) * 5, (255.0 * SCALE,) * 5),
    sets=SETS,
)


def to_bands(path, held):
    """In place of an RGB file, a TIFF with some of its colours and two negatives of these."""
    colours = np.asarray(Image.open(path).convert("RGB")).astype(np.uint16)
    values = np.concatenate([colours, 255 - colours[..., :2]], axis=-1)[..., list(held)] * SCALE
    extra = [0] * (len(held) - 1)
    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", extrasamples=extra, tile=(16, 16))
    path.unlink()


@pytest.fixture(scope="module")
def band_data(sample_data, tmp_path_factory):
    """Task -> its drawn data, every other file with three bands, the others with five."""
    return converted(
        sample_data, tmp_path_factory.mktemp("sets"), lambda number, path: to_bands(path, SETS[number % 2])
    )


@pytest.fixture(scope="module")
def band_backbone(tmp_path_factory):
    torch.manual_seed(0)
    more = {"in_chans": 5, "channels": "tokens", "channel_sets": BANDS.channel_sets}
    model = VisionMamba(VimConfig.from_dict(ARCHITECTURE | more))
    return model.save_pretrained(tmp_path_factory.mktemp("sets") / "backbone", preprocessing=BANDS)


@pytest.mark.parametrize("task", MORE)
def test_each_task_trains_evaluates_and_predicts_on_both(task, band_data, band_backbone, tmp_path):
    data = band_data(task)
    finetune([task, *SMALL, *MORE[task], f"--backbone={band_backbone}", f"--data.source={data}", f"--out={tmp_path}"])
    run = tmp_path / task
    assert not (run / "bad_pictures.txt").exists()
    (evaluation,) = (run / "evaluations").iterdir()
    assert json.loads((evaluation / "metrics.json").read_text())["samples"] == 9
    assert read_preprocessing(run / "backbone") == BANDS
    before, after = from_pretrained(band_backbone), from_pretrained(run / "backbone")
    assert after.config.channel_sets == ((0, 1, 2),)
    assert not torch.equal(before.channel_embed, after.channel_embed)
    odd = tmp_path / "odd"
    odd.mkdir()
    files = sorted((data / PICTURES[task]).rglob("*.tif"))[:3]
    for number, file in enumerate(files):
        shutil.copy(file, odd / f"{number}.tif")
    Image.new("LA", (40, 40)).save(odd / "two.png")
    answers = []
    for batch_size in ("1", "4"):
        out = tmp_path / batch_size
        predict([str(run), str(odd), "--out", str(out), "--batch_size", batch_size])
        rows = {row["file"].split("/")[-1]: row for row in json.loads((out / "predictions.json").read_text())}
        assert rows["two.png"]["error"] == "it holds 2 bands, and files of 3 or 5 are known (data.statistics)"
        for number in range(3):
            assert "error" not in rows[f"{number}.tif"]
            assert (out / rows[f"{number}.tif"]["drawing"]).exists()
        answers.append(rows)
    if task == "classification":
        for number in range(3):
            shares = [{g["class"]: g["share"] for g in rows[f"{number}.tif"]["best"]} for rows in answers]
            assert shares[0] == pytest.approx(shares[1], abs=1e-5), "packed as alone"


def test_nearest_neighbours_of_frozen_features(band_data, band_backbone, tmp_path):
    argv = [f"--backbone={band_backbone}", f"--data.source={band_data('classification')}", f"--out={tmp_path}"]
    finetune(["classification", *SMALL, *argv, "--mode=knn", "--probe.neighbours=3"])
    (evaluation,) = (tmp_path / "classification/evaluations").iterdir()
    assert json.loads((evaluation / "metrics.json").read_text())["samples"] == 9


def test_a_feature_map_is_the_mean_over_the_channels_of_a_place(band_backbone):
    model = Segmenter(read_config(band_backbone), SegmentationHead(channels=16, auxiliary_channels=16), 3).eval()
    images = [torch.randn(c, 32, 32, generator=torch.Generator().manual_seed(c)) for c in (3, 5)]
    with torch.no_grad():
        (maps,) = model.feature_maps(images, [2])
        for got, image in zip(maps, images, strict=True):
            tokens = model.backbone.forward_features(image[None])[0, 1:].view(16, len(image), 32)
            torch.testing.assert_close(got.flatten(1).T, tokens.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(images)[1:], model(images[1][None]), rtol=1e-4, atol=1e-4)


def test_fine_tuning_on_some_of_the_bands(band_data, band_backbone, tmp_path):
    """Their statistics say which bands of pretraining the files hold; others have no embedding."""
    data = tmp_path / "few"
    shutil.copytree(band_data("classification"), data)
    for path in sorted(data.rglob("*.tif")):
        values = tifffile.imread(path)
        tifffile.imwrite(path, values[..., :2], photometric="minisblack", extrasamples=[0], tile=(16, 16))
    path = tmp_path / "statistics.json"
    statistics([str(data / "train"), "--out", str(path), "--sets", "2=3,1"])
    argv = [f"--backbone={band_backbone}", f"--data.source={data}", f"--out={tmp_path}", f"--data.statistics={path}"]
    finetune(["classification", *SMALL, *argv, "--model.freeze=true"])
    tuned = from_pretrained(tmp_path / "classification/backbone")
    assert (tuned.config.in_chans, tuned.config.channel_sets) == (2, None)
    assert torch.equal(tuned.channel_embed, from_pretrained(band_backbone).channel_embed[:, [1, 3]])
    statistics([str(data / "train"), "--out", str(path), "--sets", "2=3,9"])
    with pytest.raises(UserError, match=r"data.statistics has band 9: .* was pretrained on the bands \[0, 1, 2"):
        finetune(["classification", *SMALL, *argv, "--name=other"])


def test_a_backbone_of_mixed_channels_takes_no_files_that_lack_some(band_data, backbone):
    with pytest.raises(UserError, match="pictures have 3 of 5 bands, and channels is 'mixed', which takes all"):
        read_backbone(backbone, BackboneConfig(), 0, 0, BANDS)


def test_batches_of_pictures_with_different_bands_are_lists():
    pictures = [torch.full((c, 4, 4), 100.0) for c in (3, 5)]
    assert stacked(pictures, BANDS) is pictures
    assert [part.device.type for part in on_device(pictures, torch.device("meta"))] == ["meta"] * 2
    want = torch.tensor([0.4, 0.5, 0.45]) * 255 * SCALE
    torch.testing.assert_close(fill_of(pictures[0], BANDS).flatten(), want)
