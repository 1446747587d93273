"""The page of an objective's pictures, read back as pixels."""

import numpy as np
import pytest
from PIL import Image

from pretrain.strips import GAP, HEADER, WIDTH, draw_strips

COLUMNS = ("input", "what the encoder saw", "prediction", "prediction with\ntrue mean and contrast")


def page(strips, tmp_path):
    draw_strips(strips, COLUMNS, "run: step 1\nwords", tmp_path / "pictures/step-1.png")
    with Image.open(tmp_path / "pictures/step-1.png") as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_each_pane_is_in_its_place_with_its_colours(samples, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (samples, 4, 3)).astype(np.uint8)
    strips = [np.broadcast_to(strip[:, None, None] / 255, (4, 16, 16, 3)).astype(np.float32) for strip in colours]
    pixels = page(strips, tmp_path)
    across = WIDTH // 8
    assert pixels.shape == (HEADER + -(-samples // 2) * across, min(samples, 2) * 4 * across, 3)
    for sample in range(samples):
        for column in range(4):
            top, left = HEADER + sample // 2 * across, (sample % 2 * 4 + column) * across + GAP // 2
            pane = pixels[top : top + across - GAP, left : left + across - GAP]
            assert (pane == colours[sample, column]).all()
            assert (pixels[top : top + across - GAP, left + across - GAP : left + across] == 255).all(), "a gap"
    assert (pixels[:HEADER] < 128).any(1).all(1).any(), "words above"


def test_pixels_stay_sharp_and_other_shapes_keep_theirs(tmp_path):
    tall, wide = np.zeros((4, 32, 16, 3), np.float32), np.zeros((4, 16, 32, 3), np.float32)
    tall[:, ::2] = wide[:, :, ::2] = 1, 0, 0
    pixels = page([tall, wide], tmp_path)[HEADER:]
    side = WIDTH // 8 - GAP
    assert set(map(tuple, pixels.reshape(-1, 3).tolist())) == {(255, 255, 255), (255, 0, 0), (0, 0, 0)}
    drawn = (pixels < 255).any(-1)
    first, second = drawn[:, : side + GAP], drawn[:, 4 * (side + GAP) : 5 * (side + GAP)]
    assert (first.any(1).sum(), first.any(0).sum()) == (side, side // 2)
    assert (second.any(1).sum(), second.any(0).sum()) == (side // 2, side)
    assert np.flatnonzero(second.any(1))[0] == (side - side // 2) // 2, "in the middle"
