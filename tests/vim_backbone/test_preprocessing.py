"""Normalisation: ImageNet's, and undone for pictures to look at."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vim_backbone import UserError, VimConfig, VisionMamba
from vim_backbone.preprocessing import RGB, Preprocessing, as_rgb, read_preprocessing, to_model, to_pixels


def test_normalisation_is_undone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model_input = to_model(images, torch.device("cpu"))
    red = (images[0, 0, 0, 0].item() / 255 - 0.485) / 0.229
    assert model_input[0, 0, 0, 0].item() == pytest.approx(red, rel=1e-5)
    torch.testing.assert_close(to_pixels(model_input), images.float() / 255, atol=1e-6, rtol=0)


def test_pictures_of_different_sizes_are_normalised_one_by_one():
    images = [torch.full((3, h, w), 255, dtype=torch.uint8) for h, w in ((4, 6), (2, 2))]
    large, small = to_model(images, torch.device("cpu"))
    assert (large.shape, small.shape) == ((3, 4, 6), (3, 2, 2))
    assert small[2, 1, 1].item() == pytest.approx((1 - 0.406) / 0.225, rel=1e-6)


BANDS = Preprocessing(
    mean=(0.4, 0.6), std=(0.2, 0.3), bands=(2, 0), dtype="int16", range=((-100.0, 0.0), (300.0, 50.0)), nodata=-1.0
)


def test_bands_are_chosen_scaled_and_normalised():
    values = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    values[:, 1, 1] = -1
    values[2, 3, 3] = -1  # one band of a pixel that holds something
    (got,) = BANDS.model_input(values)
    for channel, (band, low, high, mean, std) in enumerate(((2, -100, 300, 0.4, 0.2), (0, 0, 50, 0.6, 0.3))):
        want = ((values[band].astype(np.float64) - low) / (high - low) - mean) / std
        want[1, 1] = 0
        assert np.allclose(got[channel].numpy(), want, atol=1e-5)
    assert to_pixels(got, BANDS)[0, 3, 3].item() == pytest.approx((-1 + 100) / 400)
    for wrong in (values[:2], values.astype(np.uint16), values[0]):
        with pytest.raises(UserError, match=r"it must be \(bands, height, width\) of int16, with 3 bands or more"):
            BANDS.model_input(wrong)


def test_an_array_is_not_changed():
    values = np.full((3, 2, 2), 7, np.float32)
    preprocessing = Preprocessing(
        mean=(0.5,), std=(0.5,), bands=(1,), dtype="float32", range=((0.0,), (10.0,)), nodata=7.0
    )
    assert (preprocessing.model_input(values) == 0).all()
    assert (values == 7).all()
    images = torch.full((1, 1, 2, 2), 5.0)
    to_model(images, torch.device("cpu"), preprocessing)
    assert (images == 5).all()


def test_16_bit_whole_numbers_are_scaled_on_the_device():
    preprocessing = Preprocessing(mean=(0.25,), std=(0.5,), bands=(0,), dtype="uint16")
    view = torch.tensor([[[[0, 65535, 13107]]]], dtype=torch.uint16)
    want = (torch.tensor([0.0, 1.0, 0.2]) - 0.25) / 0.5
    torch.testing.assert_close(to_model(view, torch.device("cpu"), preprocessing).flatten(), want)


@pytest.mark.parametrize(
    "preprocessing", [RGB, BANDS, replace(RGB, range="type"), replace(RGB, range=((0.0,), (4095.0,)))]
)
def test_the_file_says_it_all(tmp_path, preprocessing):
    config = VimConfig(d_model=32, depth=1, img_size=16, patch_size=8, num_classes=0, in_chans=preprocessing.in_chans)
    folder = VisionMamba(config).save_pretrained(tmp_path / "saved", preprocessing=preprocessing)
    assert read_preprocessing(folder) == preprocessing
    written = json.loads((folder / "preprocessor_config.json").read_text())
    assert written["do_rescale"] == (preprocessing is not BANDS), (
        "transformers has one factor for all bands, and no lowest value"
    )
    written["nodata"] = "nan"
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    assert math.isnan(read_preprocessing(folder).nodata)


@pytest.mark.parametrize(("change", "line"), [
    ({"image_mean": [0.5]}, "has 2 values and image_mean 1: each needs one for each band"),
    ({"image_std": [0.2, 0.0]}, "they must be numbers, the second positive"),
    ({"bands": [0, -1]}, "they are counted from 0"),
    ({"bands": "all"}, "make no sense"),
    ({"range": [[0, 0], [0, 1]]}, "the lowest values must be below the highest"),
    ({"range": [1, 2]}, "make no sense"),
    ({"nodata": "none"}, "make no sense"),
    ({"dtype": "no type"}, "make no sense"),
    ({"dtype": "object"}, "make no sense: 'object' is no type of real numbers"),
    ({"bands": [0.5, 1]}, "make no sense"),
    ({"range": [[0, 0], [1, math.inf]]}, "the lowest values must be below the highest"),
    ({"bands": None, "range": [[0], [1, 2]]}, "of RGB it is one lowest and one highest value"),
    ({"bands": None, "range": [[], []]}, "of RGB it is one lowest and one highest value"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, change, line):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(BANDS.to_dict() | change))
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{line}"):
        read_preprocessing(tmp_path)


def test_files_of_older_versions_are_of_rgb(tmp_path):
    assert read_preprocessing(tmp_path) == RGB
    old = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0], "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert read_preprocessing(tmp_path) == replace(RGB, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))


def test_what_is_shown_of_bands():
    assert as_rgb(torch.zeros(5, 4, 4)).shape == (3, 4, 4)
    assert as_rgb(torch.rand(2, 1, 4, 4)).shape == (2, 3, 4, 4)


def test_arrays_of_another_byte_order_and_with_nan():
    floats = Preprocessing(mean=(0.5,), std=(0.25,), bands=(1,), dtype="float32", range=((0.0,), (2.0,)))
    values = np.array([[[9.0]], [[1.5]]], np.float32)
    assert floats.model_input(values.astype(">f4")).item() == pytest.approx((1.5 / 2 - 0.5) / 0.25)
    values[1] = np.nan
    with pytest.raises(UserError, match="NaN or infinity, and nodata is not nan"):
        floats.model_input(values)
    assert replace(floats, nodata=math.nan).model_input(values).item() == 0
