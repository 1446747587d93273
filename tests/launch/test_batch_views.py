"""Parts of a batch: Pillow's values, one by one; the boxes that random numbers give: torchvision's rule."""

import numpy as np
import pytest
import torch
from PIL import Image

from launch.data import batch_views
from launch.data.batch_views import filter_matrices, resized_parts
from launch.data.crops import NUMBERS, centred_box, random_crop, random_crops
from launch.run.randomness import hashes, uniforms


def by_pillow(picture, box, size, beyond):
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image, box = (image, box) if beyond else (image.crop(box), None)
    made = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(made)).permute(2, 0, 1)


def difference(a, b):
    return (a.int() - b.int()).abs().max().item()


SHAPES = [((32, 32), (32, 32)), ((64, 64), (32, 32)), ((31, 17), (64, 24)), ((7, 5), (96, 3)), ((1, 1), (8, 8)),
          ((13, 128), (13, 128)), ((65, 65), (20, 20))]  # fmt: skip


@pytest.mark.parametrize("beyond", [True, False])
@pytest.mark.parametrize(("full", "size"), SHAPES)
def test_values_are_those_of_pillow(full, size, beyond):
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (6, 3, *full), np.uint8))  # noise: overshoot is clipped
    (h, w), boxes = full, []
    for number in range(6):
        left, upper = (0, 0) if number < 2 else (rng.integers(0, w), rng.integers(0, h))
        right, lower = (w, h) if number == 0 else (rng.integers(left, w) + 1, rng.integers(upper, h) + 1)
        boxes.append((left, upper, right, lower) if number < 5 else (left, upper, left + 1, upper + 1))
    made = resized_parts(pictures, torch.tensor(np.array(boxes)), size, beyond=beyond)
    assert made.dtype == torch.uint8
    for picture, box, new in zip(pictures, boxes, made, strict=True):
        if not beyond and size[0] < box[3] - box[1]:
            continue  # Pillow may go down first
        assert difference(new, by_pillow(picture, [int(edge) for edge in box], size, beyond)) <= 2


def test_a_picture_has_the_same_values_in_every_batch():
    pictures = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (50, 3, 33, 47), np.uint8))
    boxes = torch.from_numpy(random_crops(uniforms(hashes(np.arange(50)), NUMBERS), 47, 33, 0.2))
    mirror = torch.arange(50) % 2 == 0
    whole = resized_parts(pictures, boxes, (40, 24), mirror, beyond=True)
    for i in range(0, 50, 7):
        one = slice(i, i + 1)
        assert torch.equal(resized_parts(pictures[one], boxes[one], (40, 24), mirror[one], beyond=True), whole[one])
    weights = filter_matrices(boxes[:, 0].double(), boxes[:, 2].double(), 47, 24, beyond=True) * 2**14
    assert torch.equal(weights, weights.round())  # so that sums of products with bytes are exact, in any order
    plain = resized_parts(pictures, boxes, (40, 24), beyond=True)
    assert torch.equal(whole[::2], plain[::2].flip(-1))
    assert torch.equal(whole[1::2], plain[1::2])


@pytest.mark.parametrize("mirrors", [True, False])
def test_a_large_batch_is_resized_in_parts(mirrors, monkeypatch):
    pictures = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (21, 3, 33, 47), np.uint8))
    boxes = torch.from_numpy(random_crops(uniforms(hashes(np.arange(21)), NUMBERS), 47, 33, 0.2))
    mirror = torch.arange(21) % 3 == 0 if mirrors else None
    whole = resized_parts(pictures, boxes, (40, 24), mirror, beyond=True)
    together = []

    def counted(start, *arguments, beyond):
        together.append(len(start))
        return filter_matrices(start, *arguments, beyond=beyond)

    monkeypatch.setattr(batch_views, "MOST_WEIGHTS", 8 * 40 * 33)
    monkeypatch.setattr(batch_views, "filter_matrices", counted)
    assert torch.equal(resized_parts(pictures, boxes, (40, 24), mirror, beyond=True), whole)
    assert together == [8, 8, 8, 8, 5, 5]


class Replayed:
    """Stands in for torch.rand: gives numbers that were drawn before, four at a time."""

    def __init__(self, numbers):
        self.rows = iter(torch.from_numpy(numbers.reshape(-1, 4)))

    def __call__(self, count, generator):
        assert count == 4
        return next(self.rows)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 64), (3, 100), (128, 40), (1, 1), (2, 3)])
def test_boxes_of_a_batch_are_those_of_one_picture(width, height, monkeypatch):
    numbers = uniforms(hashes(3, np.arange(200)), NUMBERS)
    boxes = random_crops(numbers, width, height, 0.2)
    for row, box in zip(numbers, boxes, strict=True):
        monkeypatch.setattr(torch, "rand", Replayed(row))
        assert random_crop(width, height, 0.2, None) == tuple(box)  # type: ignore[arg-type]
    if (width, height) == (3, 100):
        assert (boxes == centred_box(width, height)).all()
