"""What is drawn on a picture with detections: colours by class, names that fit, guesses where nothing is sure."""

import numpy as np
import pytest
import torch

from finetune.detection.pictures import LEGIBLE, Objects, draw_objects, sure_or_guessed
from finetune.palette import palette

CLASSES = ["cat", "dog", "horse"]
COLOURS = (palette(3) * 255).astype(int)
GREY = 100
BOXES = [[100.0, 100.0, 200.0, 180.0], [300.0, 300.0, 400.0, 420.0]]


def drawn(labels, scores, boxes=BOXES, masks=False, size=(512, 512)):
    picture = torch.full((3, *size), GREY, dtype=torch.uint8)
    shape = torch.zeros(len(boxes), *size)
    for mask, (left, top, right, bottom) in zip(shape, boxes, strict=True):
        mask[int(top) + 10 : int(bottom) - 10, int(left) + 10 : int(right) - 10] = 1
    return draw_objects(picture, Objects(torch.tensor(boxes), labels, scores, shape if masks else None), CLASSES)


def test_one_colour_a_class_for_box_mask_and_name():
    image = drawn([3, 3], [0.9, 0.6], masks=True).astype(int)
    for left, top, right, bottom in np.array(BOXES, int):
        assert image[(top + bottom) // 2, left].tolist() == COLOURS[2].tolist(), "the box"
        assert image[top - 2, left + 1].tolist() == COLOURS[2].tolist(), "the ground of the name"
        middle = image[(top + bottom) // 2, (left + right) // 2]
        np.testing.assert_allclose(middle, (GREY + COLOURS[2]) / 2, atol=1)
    colourful = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None].expand(3, 512, 512)
    masks = torch.ones(1, 512, 512)
    image = draw_objects(colourful, Objects(torch.tensor(BOXES[:1]), [1], [0.9], masks), CLASSES).astype(int)
    np.testing.assert_allclose(image[500, 500], (0.587 * 255 + COLOURS[0]) / 2, atol=2)


def test_the_surest_of_masks_that_overlap_is_on_top():
    boxes = [[100.0, 100.0, 300.0, 300.0], [200.0, 200.0, 400.0, 400.0]]
    for scores, top in (([0.9, 0.6], 0), ([0.6, 0.9], 1)):
        image = drawn([1, 2], scores, boxes, masks=True).astype(int)
        np.testing.assert_allclose(image[250, 250], (GREY + COLOURS[top]) / 2, atol=1)


def test_scores_below_the_threshold_are_left_out_where_others_reach_it():
    assert sure_or_guessed([0.2, 0.5, 0.9, 0.4]) == ([2, 1], True)
    image = drawn([1, 2], [0.9, 0.4])
    assert (image[300:421, 300:401] == GREY).all()
    assert (image[140, 100] == COLOURS[0]).all()


def test_guesses_are_faint_and_few():
    assert sure_or_guessed([0.1, 0.4, 0.3, 0.2]) == ([1, 2, 3], False)
    assert sure_or_guessed([]) == ([], False)
    image = drawn([1, 2], [0.3, 0.4])
    for (left, top, _, bottom), colour in zip(np.array(BOXES, int), COLOURS[:2], strict=True):
        np.testing.assert_allclose(image[(top + bottom) // 2, left], (GREY + colour) / 2, atol=1)
        assert (image[top - 2, left + 1] == colour).all(), "the name can be read"


@pytest.mark.parametrize("box", [[480.0, 1.0, 510.0, 60.0], [0.0, 0.0, 511.0, 511.0], [2.0, 490.0, 9.0, 511.0]])
def test_names_stay_inside_the_picture(box):
    """A name has the same ink, wherever its box is."""
    ink = [(drawn([2], [0.87], [b]) == 255).all(-1).sum() for b in (BOXES[0], box)]
    assert ink[0] > 50
    assert ink[1] == ink[0]


def test_small_pictures_are_enlarged_and_empty_ones_are_themselves():
    nothing = Objects(torch.zeros(0, 4), [], [], None)
    small, large = (
        draw_objects(torch.full((3, *s), GREY, dtype=torch.uint8), nothing, []) for s in ((100, 60), (512, 640))
    )
    assert large.shape == (512, 640, 3)
    assert small.shape == (800, 480, 3)
    assert min(small.shape[:2]) >= LEGIBLE
    assert (small == GREY).all()
