"""Normalisation: ImageNet's, and undone for pictures to look at."""

import pytest
import torch

from vim_backbone.preprocessing import to_model, to_pixels


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
