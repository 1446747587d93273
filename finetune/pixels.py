"""Pictures as tensors (channels, h, w) of a file's values: read, resized, and looked at, whatever their bands."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from launch.data.data_sets import Cell
from launch.data.pictures import Picture
from launch.data.reading import open_file, read_pixels, resized
from vim_backbone.preprocessing import Preprocessing, as_rgb, to_model, to_pixels
from vim_backbone.vim import Images


def pixels_of(picture: Picture, preprocessing: Preprocessing, max_megapixels: float) -> Tensor:
    """A whole picture (c, h, w), uint8 where its values have 8 bits, else float32, on which more can be computed.

    Raises what `read_pixels` raises.
    """
    pixels = read_pixels(picture, preprocessing, max_megapixels)
    return pixels if pixels.dtype == torch.uint8 else pixels.float()


def read_file(place: Path | Cell, preprocessing: Preprocessing, max_megapixels: float) -> Tensor:
    """As `pixels_of` the picture in a file, or in a row of a data set."""
    with open_place(place) as picture:
        return pixels_of(picture, preprocessing, max_megapixels)


def open_place(place: Path | Cell) -> Picture:
    """The picture in a file, or in a row of a data set, opened but not decoded. Raises as `open_file`."""
    return open_file(place) if isinstance(place, Path) else place.source.open(place.index)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, h, w) uint8 -> RGB."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def resize_pixels(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(c, h, w) -> (c, *size), bilinear, by Pillow."""
    bilinear = Image.Resampling.BILINEAR
    if pixels.dtype == torch.uint8 and len(pixels) == 3:
        image = to_image(pixels).resize((size[1], size[0]), bilinear)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return torch.from_numpy(resized(pixels.numpy(), size, None, bilinear, reducing_gap=None))


def displayed(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(c, h, w) -> (3, h, w) uint8 to look at: RGB as it is, of bands the first three over their range."""
    if preprocessing.bands is None:
        return pixels
    unit = to_pixels(to_model(pixels, torch.device("cpu"), preprocessing), preprocessing)
    return (as_rgb(unit) * 255).round().to(torch.uint8)


def stacked(images: list[Tensor], preprocessing: Preprocessing) -> Tensor | list[Tensor]:
    """Pictures (c, h, w) of one size as a batch (b, c, h, w), or the list itself where files hold different bands."""
    return default_collate(images) if preprocessing.channel_sets is None else images


def on_device(images: Images, device: torch.device) -> Images:
    """Pictures of `stacked` on a device."""
    if isinstance(images, Tensor):
        return images.to(device, non_blocking=True)
    return [image.to(device, non_blocking=True) for image in images]


def fill_of(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(c, 1, 1) of the pixels' type: the value that padding has, which the model sees as 0."""
    fill = torch.tensor(preprocessing.of_channels(len(pixels)).fill)
    return (fill.round() if pixels.dtype == torch.uint8 else fill).to(pixels.dtype).view(-1, 1, 1)
