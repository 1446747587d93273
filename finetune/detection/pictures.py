"""Pictures with detections: one colour a class for box, mask and name, and guesses where nothing is sure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale
from torchvision.utils import draw_bounding_boxes

from finetune.palette import palette

MIN_SCORE = 0.5
MOST_GUESSES = 3
"""Objects that are drawn faintly where no score reaches MIN_SCORE."""
LEGIBLE = 480
"""Shorter side in pixels from which names on a picture can be read; smaller pictures are enlarged."""
FAINT = 0.5
"""Weight of guesses over the picture."""
MOST_ENLARGED = 8
"""Times, a picture that is small."""
FONT = Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"


class Objects(NamedTuple):
    """What is drawn on a picture."""

    boxes: Tensor
    """(n, 4) left, top, right, bottom in pixels of the picture."""
    labels: list[int]
    """Classes, from 1."""
    scores: list[float] | None
    """None for annotations."""
    masks: Tensor | None
    """(n, h, w)"""

    def at(self, places: Sequence[int]) -> "Objects":
        """Some of them."""
        masks = None if self.masks is None else self.masks[list(places)]
        scores = None if self.scores is None else [self.scores[i] for i in places]
        return Objects(self.boxes[list(places)], [self.labels[i] for i in places], scores, masks)


def sure_or_guessed(scores: Sequence[float]) -> tuple[list[int], bool]:
    """Places of the scores of MIN_SCORE or more, and True; or where there are none those of the best, and False."""
    best_first = sorted(range(len(scores)), key=lambda i: -scores[i])
    sure = [i for i in best_first if scores[i] >= MIN_SCORE]
    return (sure, True) if sure else (best_first[:MOST_GUESSES], False)


def enlarged(picture: Tensor, factor: int) -> Tensor:
    """Each pixel of (..., h, w) as a square of so many."""
    return picture.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def draw_objects(picture: Tensor, objects: Objects, classes: Sequence[str]) -> np.ndarray:
    """Draw objects on a picture (3, h, w) uint8, the surest on top; gives (h, w, 3) uint8, enlarged if small.

    Those with a score below MIN_SCORE are left out; where all are, the best MOST_GUESSES are drawn faintly, with a
    question mark.
    """
    sure = True
    if objects.scores is not None:
        places, sure = sure_or_guessed(objects.scores)
        objects = objects.at(places[::-1])  # the best last, over the others
    factor = min(MOST_ENLARGED, -(-LEGIBLE // min(picture.shape[1:])))
    if not objects.labels:
        return enlarged(picture, factor).permute(1, 2, 0).numpy()
    of_classes = (palette(len(classes)) * 255).astype(int).tolist()
    colours: list[Any] = [tuple(of_classes[label - 1]) for label in objects.labels]
    canvas = picture if objects.masks is None else lay_over(picture, objects.masks.bool(), colours)
    picture, canvas = enlarged(picture, factor), enlarged(canvas, factor)
    thickness = max(2, min(picture.shape[1:]) // 240)
    canvas = draw_bounding_boxes(canvas, objects.boxes * factor, colors=colours, width=thickness)
    if not sure:
        canvas = torch.lerp(picture.float(), canvas.float(), FAINT).round().to(torch.uint8)
    names = [classes[label - 1] for label in objects.labels]
    if objects.scores is not None:
        names = [f"{name} {score:.2f}{'' if sure else '?'}" for name, score in zip(names, objects.scores, strict=True)]
    image = Image.fromarray(np.ascontiguousarray(canvas.permute(1, 2, 0).numpy()))
    for box, name, colour in zip((objects.boxes * factor).tolist(), names, colours, strict=True):
        write_name(image, box, name, colour)
    return np.asarray(image)


def lay_over(picture: Tensor, masks: Tensor, colours: Sequence[tuple[int, ...]]) -> Tensor:
    """Lay masks (n, h, w) in their colours over a picture (3, h, w) uint8, each over those before it.

    The picture is grey below, or the colour of an object would change that of its class.
    """
    layer = rgb_to_grayscale(picture, 3)
    for mask, colour in zip(masks, colours, strict=True):
        layer = torch.where(mask, torch.tensor(colour, dtype=torch.uint8)[:, None, None], layer)
    mixed = torch.lerp(rgb_to_grayscale(picture, 3).float(), layer.float(), 0.5).round().to(torch.uint8)
    return torch.where(masks.any(0), mixed, picture)


def write_name(image: Image.Image, box: Sequence[float], name: str, colour: tuple[int, ...]) -> None:
    """Write a name on a ground of its colour, above a box (left, top, right, bottom), or in it if there is no room."""
    font = ImageFont.truetype(FONT, max(13, min(image.size) // 32))
    draw = ImageDraw.Draw(image)
    margin = font.size // 4
    width, height = draw.textlength(name, font) + 2 * margin, font.size + 2 * margin
    left = max(0, min(box[0], image.width - width))
    top = box[1] - height if box[1] >= height else max(0, min(box[1], image.height - height))
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # ITU-R BT.601
    ink = "black" if luminance > 140 else "white"
    draw.text((left + margin, top + height / 2), name, ink, font, anchor="lm")
