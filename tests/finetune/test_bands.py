"""Fine-tuning and predictions on four bands of 16 bits: what the backbone's preprocessor says, in all three tasks."""

import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from timm.models import adapt_input_conv as timm_adapts

from finetune.backbone import read_backbone, read_preprocessing_of
from finetune.classification.config import AugmentConfig
from finetune.classification.transforms import evaluation_transform, training_transform
from finetune.config import BackboneConfig, LabelledData
from finetune.detection.tta import fit
from finetune.main import main as finetune
from finetune.pixels import displayed, resize_pixels
from finetune.predict import main as predict
from pretrain.bands import main as statistics
from tests.finetune.conftest import ARCHITECTURE, converted
from tests.finetune.test_predict import MORE, PICTURES, SMALL
from vim_backbone import UserError, VimConfig, VisionMamba, from_pretrained
from vim_backbone.preprocessing import Preprocessing, read_preprocessing

SCALE = 40
"""Values of 16 bits for a level of 8."""
BANDS = Preprocessing(
    mean=(0.4, 0.5, 0.45, 0.6),
    std=(0.2, 0.25, 0.22, 0.3),
    bands=(0, 1, 2, 3),
    dtype="uint16",
    range=((0.0,) * 4, (255.0 * SCALE,) * 4),
    nodata=0.0,
)


def to_bands(path):
    """In place of an RGB file, a TIFF of its colours and a band that is the first one's negative."""
    colours = np.asarray(Image.open(path).convert("RGB")).astype(np.uint16)
    values = np.concatenate([colours, 255 - colours[..., :1]], axis=-1) * SCALE + 1
    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", extrasamples=[0] * 3, tile=(16, 16))
    path.unlink()


@pytest.fixture(scope="module")
def band_data(sample_data, tmp_path_factory):
    """Task -> its drawn data, in bands."""
    return converted(sample_data, tmp_path_factory.mktemp("bands"), lambda _, path: to_bands(path))


@pytest.fixture(scope="module")
def band_backbone(tmp_path_factory):
    torch.manual_seed(0)
    model = VisionMamba(VimConfig.from_dict(ARCHITECTURE | {"in_chans": 4}))
    return model.save_pretrained(tmp_path_factory.mktemp("bands") / "backbone", preprocessing=BANDS)


@pytest.mark.parametrize("task", MORE)
def test_each_task_trains_evaluates_and_predicts_on_bands(task, band_data, band_backbone, tmp_path, capsys):
    data = band_data(task)
    finetune([task, *SMALL, *MORE[task], f"--backbone={band_backbone}", f"--data.source={data}", f"--out={tmp_path}"])
    run = tmp_path / task
    assert not (run / "bad_pictures.txt").exists()
    (evaluation,) = (run / "evaluations").iterdir()
    assert json.loads((evaluation / "metrics.json").read_text())["samples"] == 9
    assert read_preprocessing(run / "backbone") == BANDS
    assert Preprocessing.from_dict(json.loads((run / "model/config.json").read_text())["preprocessing"]) == BANDS
    odd = tmp_path / "odd"
    odd.mkdir()
    files = sorted((data / PICTURES[task]).rglob("*.tif"))[:3]
    for number, file in enumerate(files):
        shutil.copy(file, odd / f"{number}.tif")
    Image.new("RGB", (40, 40)).save(odd / "rgb.png")
    predict([str(run), str(odd), "--out", str(tmp_path / "predicted")])
    rows = {
        row["file"].split("/")[-1]: row for row in json.loads((tmp_path / "predicted/predictions.json").read_text())
    }
    assert rows["rgb.png"]["error"] == "it holds 3 bands of uint8, and band 3 is wanted (data.bands [0, 1, 2, 3])"
    for number in range(3):
        assert "error" not in rows[f"{number}.tif"]
        assert (tmp_path / "predicted" / rows[f"{number}.tif"]["drawing"]).exists()


@pytest.mark.parametrize("task", MORE)
def test_pictures_without_the_bands_are_refused_before_training(task, sample_data, band_backbone, tmp_path):
    argv = [f"--backbone={band_backbone}", f"--data.source={sample_data(task)}", f"--out={tmp_path}"]
    with pytest.raises(UserError, match=r"8 of 8 pictures cannot be what is meant, such as .*jpg: it holds 3 bands"):
        finetune([task, *SMALL, *MORE[task], *argv])


def test_a_backbone_of_rgb_is_adapted_to_bands_by_their_statistics(band_data, backbone, tmp_path):
    data = band_data("classification")
    statistics([str(data / "train"), "--out", str(tmp_path / "statistics.json")])
    argv = [f"--backbone={backbone}", f"--data.source={data}", f"--out={tmp_path}", "--data.holdout=0"]
    with pytest.raises(UserError, match="it holds 4 bands of uint16, and RGB takes 1 or 3"):
        finetune(["classification", *SMALL, *argv])
    finetune(["classification", *SMALL, *argv, f"--data.statistics={tmp_path / 'statistics.json'}"])
    assert from_pretrained(tmp_path / "classification/backbone").config.in_chans == 4
    assert read_preprocessing(tmp_path / "classification/backbone").bands == (0, 1, 2, 3)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_the_first_convolution_is_adapted_as_timm_does(backbone, channels):
    before, after = from_pretrained(backbone), from_pretrained(backbone, in_chans=channels)
    want = timm_adapts(channels, before.patch_embed.proj.weight.detach())
    torch.testing.assert_close(after.patch_embed.proj.weight.detach(), want)


def test_a_backbone_whose_bands_nobody_knows(tmp_path):
    model = VisionMamba(VimConfig.from_dict(ARCHITECTURE | {"in_chans": 5}))
    folder = model.save_pretrained(tmp_path / "five", mean=(0.5,) * 5, std=(0.2,) * 5)
    with pytest.raises(UserError, match=r"takes 5 channels, but its .* does not say which bands they are: say so"):
        read_preprocessing_of(folder, LabelledData())
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"takes 5 bands, but its preprocessor_config\.json is missing or of 3: say"):
        read_preprocessing_of(folder, LabelledData())
    assert read_backbone(folder, BackboneConfig(), 0, 0, BANDS).config.in_chans == 4


def test_transforms_of_a_classifier_on_bands():
    """The middle of a picture, in the values that the model takes; augmentation leaves nothing that is no number."""
    ramp = torch.arange(64.0).repeat(64, 1).expand(4, 64, 64) * 100
    middle = evaluation_transform((32, 32), 0.5, BANDS)(ramp)
    want = ramp[:, 16:48, 16:48] / (255 * SCALE)
    for band in range(4):
        torch.testing.assert_close(middle[band], (want[band] - BANDS.mean[band]) / BANDS.std[band])
    wide = evaluation_transform((32, 48), 1.0, BANDS)(ramp)
    assert wide.shape == (4, 32, 48)
    augmented = training_transform((24, 24), AugmentConfig(erasing=0.5), BANDS)
    for _ in range(20):
        view = augmented(ramp)
        assert view.shape == (4, 24, 24)
        assert view.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixels_are_resized_band_by_band_as_rgb_is(dtype):
    colours = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = resize_pixels(colours, (17, 23))
    four = torch.cat([colours, colours[:1]]).to(dtype)
    got = resize_pixels(four, (17, 23))
    assert got.dtype == dtype
    assert (got[:3].float() - want.float()).abs().max() <= (0 if dtype == torch.uint8 else 1)


def test_bands_to_look_at_and_to_pad_with():
    pixels = torch.tensor([0.0, 51.0, 102.0, 255.0]).mul(SCALE).view(4, 1, 1).expand(4, 20, 30)
    assert displayed(pixels, BANDS)[:, 0, 0].tolist() == [0, 51, 102]
    canvas, sizes = fit(pixels, (40, 40), BANDS)
    assert sizes == (27, 40, 20, 30)
    torch.testing.assert_close(canvas[:, 39, 39], torch.tensor(BANDS.fill))
