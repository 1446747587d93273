"""Parts of pictures at another size: beside a filter written out in float64, and beside Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from launch.data.resize import resized_part


def cubic(x):
    """Keys' kernel with a = -0.5, as Pillow has it."""
    x = abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    return np.where(x < 1, near, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0))


def filtered(pixels, count):
    """The first axis with `count` entries: the kernel, as wide as the step from one entry to the next."""
    step = len(pixels) / count
    made = np.empty((count, *pixels.shape[1:]))
    for i in range(count):
        weights = cubic((np.arange(len(pixels)) + 0.5 - (i + 0.5) * step) / max(step, 1.0))
        made[i] = np.tensordot(weights / weights.sum(), pixels, 1)
    return made.round().clip(0, 255)


def expected(image, box, size):
    """(3, height, width) in float64, rounded after each axis: rows first."""
    left, upper, right, lower = box
    pixels = np.asarray(image, np.float64)[upper:lower, left:right]
    rows = filtered(pixels.swapaxes(0, 1), size[1]).swapaxes(0, 1)
    return torch.from_numpy(filtered(rows, size[0]).transpose(2, 0, 1))


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))


CASES = [
    ((3, 5, 103, 85), (32, 48)),
    ((0, 0, 120, 90), (24, 24)),
    ((40, 20, 60, 30), (32, 32)),
    ((0, 0, 120, 90), (90, 120)),
    ((119, 0, 120, 90), (16, 16)),
    ((7, 89, 50, 90), (8, 40)),
]


@pytest.mark.parametrize(("box", "size"), CASES)
def test_a_part_is_what_the_filter_makes_of_it_but_for_a_level(noise, box, size):
    made = resized_part(noise, box, size, "torch")
    assert made.dtype == torch.uint8
    difference = (made.double() - expected(noise, box, size)).abs()
    assert difference.max() <= 1
    assert difference.mean() < 0.05
    pillow = np.asarray(noise.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (made.int() - torch.from_numpy(pillow.copy()).int()).abs().max() <= 1


def test_a_box_is_moved_to_whole_pixels_of_the_picture(noise):
    def same(box, whole):
        return torch.equal(*(resized_part(noise, each, (16, 16), "torch") for each in (box, whole)))

    assert same((10.4, 20.6, 60.4, 70.2), (10, 21, 60, 70))
    assert same((119.6, 89.7, 120.0, 90.0), (119, 89, 120, 90))
    assert same((5.2, 5.2, 5.4, 5.4), (5, 5, 6, 6))
    assert not same((10, 20, 60, 70), (11, 20, 61, 70))


@pytest.mark.parametrize(
    ("box", "size", "torch_too"),
    [((3.3, 2, 117, 88), (14, 40), True), ((0, 0, 120, 90), (60, 20), True), ((9.5, 8, 80, 60.5), (30, 32), False)],
)
def test_pillow_does_what_is_asked_of_it_and_where_much_is_thrown_away(noise, box, size, torch_too):
    pillow = noise.resize(size[::-1], Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    made = {by: resized_part(noise, box, size, by) for by in ("pillow", "torch")}
    assert torch.equal(made["pillow"], torch.from_numpy(np.array(pillow)).permute(2, 0, 1))
    assert torch.equal(made["torch"], made["pillow"]) == torch_too
