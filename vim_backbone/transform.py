"""Pictures as people have them, files, PIL pictures, arrays or tensors of any size, to the input of a backbone.

Shape letters: b pictures, c channels, h w height and width in pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vim_backbone.config import VimConfig
from vim_backbone.errors import UserError, first_line
from vim_backbone.images import check_megapixels, open_picture, to_rgb
from vim_backbone.preprocessing import Preprocessing, to_model

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""A file, or the pixels of a picture."""
ARRAYS = ".npy"
"""End of the name of a file of an array."""


class Transform:
    """What is done to pictures before a backbone: read, resized where a size is given, normalised, padded.

    Of 8-bit RGB it takes files that Pillow opens, PIL pictures, and arrays or tensors, (h, w), (h, w, 3) or (3, h, w),
    of uint8 or of floats in [0, 1]. Of bands it takes arrays and tensors (bands, h, w) or (h, w, bands) in the type of
    the files, and .npy files of them; the axis of the bands is the shorter one of the first and the last.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        config: VimConfig,
        *,
        size: int | tuple[int, int] | None = None,
        pad: bool = True,
        device: torch.device | str = "cpu",
        max_megapixels: float = float("inf"),
    ) -> None:
        """How pictures become input.

        Args:
            preprocessing: bands, range, normalisation.
            config: of the backbone, for its stride.
            size: side, or (height, width) in pixels, to which each is resized (bicubic); None: its own size.
            pad: fill up to what the stride divides, at the right and below, with what the model sees as 0.
            device: of the input.
            max_megapixels: larger files are refused before they are decoded.

        Raises:
            UserError: the preprocessing has other channels than the backbone, or the size is none.
        """
        if preprocessing.in_chans != config.in_chans:
            raise UserError(
                f"the backbone takes {config.in_chans} channels, its preprocessing describes {preprocessing.in_chans}: "
                "take vim_backbone.from_pretrained, and normalise pictures as you trained it"
            )
        if preprocessing.bands is None and config.in_chans != 3:
            raise UserError(
                f"the preprocessing does not say which bands the backbone's {config.in_chans} channels are: take "
                "vim_backbone.from_pretrained, and normalise pictures as you trained it"
            )
        sides = (size, size) if isinstance(size, int) else size
        if sides is not None and (len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides)):
            raise UserError(f"size is {size!r}: give a side, or (height, width), in pixels")
        self.preprocessing, self.config, self.pad, self.size = preprocessing, config, pad, sides
        self.device, self.max_megapixels = torch.device(device), max_megapixels

    @overload
    def __call__(self, pictures: Picture) -> Tensor: ...
    @overload
    def __call__(self, pictures: Sequence[Picture]) -> list[Tensor]: ...

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Tensor | list[Tensor]:
        """A picture, or a batch (b, c, h, w) -> (b, c, h, w) float32; a list of pictures -> a list of (c, h, w).

        Raises UserError for what is no picture, naming it.
        """
        if isinstance(pictures, (list, tuple)):
            return [self.from_values(self._values(picture))[0] for picture in pictures]
        assert not isinstance(pictures, Sequence) or isinstance(pictures, str)
        if isinstance(pictures, (np.ndarray, Tensor)) and pictures.ndim == 4:
            return torch.cat([self.from_values(self._values(picture)) for picture in pictures])
        return self.from_values(self._values(pictures))

    def from_values(self, values: Tensor) -> Tensor:
        """The channels of a picture in the values of its file (c, h, w), of RGB 0 to 255 -> (1, c, h, w) float32."""
        values = values[None]
        if self.size is not None:
            is_uint8 = values.dtype == torch.uint8
            values = F.interpolate(
                values if is_uint8 else values.float(), self.size, mode="bicubic", antialias=True, align_corners=False
            )
        images = to_model(values, self.device, self.preprocessing)
        return pad_to_stride(images, self.config) if self.pad else images

    def read(self, path: str | Path) -> Tensor:
        """A file -> (1, c, h, w) float32. Raises anything that a decoder raises on damaged data."""
        return self.from_values(self._values(self._decoded(Path(path))))

    def _values(self, picture: Picture) -> Tensor:
        """(c, h, w) in the values of the files."""
        if isinstance(picture, (str, Path)):
            path = Path(picture).expanduser()
            try:
                picture = self._decoded(path)
            except UserError:
                raise
            except Exception as error:  # a decoder may raise anything on damaged data
                raise UserError(f"cannot read the picture {path}: {first_line(error)}") from error
        if isinstance(picture, Image.Image):
            try:
                picture = np.array(to_rgb(picture, self.max_megapixels, self._span))
            except Exception as error:  # as above
                raise UserError(f"cannot use the picture: {first_line(error)}") from error
        elif not isinstance(picture, (np.ndarray, Tensor)):
            raise UserError(
                f"{type(picture).__name__} is no picture: give a file, a PIL picture, an array or a tensor, or a list"
            )
        if self.preprocessing.bands is None:
            return rgb_values(picture)
        return self._bands(picture.cpu().numpy() if isinstance(picture, Tensor) else picture)

    def _decoded(self, path: Path) -> Image.Image | np.ndarray:
        if path.suffix.lower() == ARRAYS:
            values = np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle could start any program
            bands = min(values.shape[0], values.shape[-1]) if values.ndim == 3 else 1
            check_megapixels(values.size // max(1, bands), 1, self.max_megapixels)
            return np.array(values)
        if self.preprocessing.bands is not None:
            raise UserError(
                f"{path}: the backbone takes bands {list(self.preprocessing.bands)} of files; read them with "
                "tifffile or rasterio, and give the array (bands, h, w)"
            )
        with open_picture(path) as image:
            return to_rgb(image, self.max_megapixels, self._span)

    @property
    def _span(self) -> tuple[float, float] | None:
        """The values of more than 8 bits that become black and white in RGB."""
        limits = self.preprocessing.range
        return (limits[0][0], limits[1][0]) if isinstance(limits, tuple) else None

    def _bands(self, values: np.ndarray) -> Tensor:
        if values.ndim == 2:
            values = values[None]
        numbers = {len(each) for each in self.preprocessing.sets or ()}
        first = len(values) in numbers and values.shape[-1] not in numbers
        if values.ndim == 3 and not first and values.shape[-1] <= len(values):
            values = np.moveaxis(values, -1, 0)
        return torch.tensor(self.preprocessing.channel_values(values))


def rgb_values(picture: np.ndarray | Tensor) -> Tensor:
    """(h, w), (h, w, 3) or (3, h, w), uint8 or floats in [0, 1] -> (3, h, w), uint8 or floats in [0, 255].

    Where both ends have three, an array has its channels last and a tensor first, as they mostly do. Raises UserError.
    """
    last_first = (-1, 0) if isinstance(picture, np.ndarray) else (0, -1)
    if isinstance(picture, np.ndarray) and picture.dtype.kind not in "buif":
        raise UserError(f"the picture is an array of {picture.dtype}: give uint8, or floats in [0, 1]")
    values = picture if isinstance(picture, Tensor) else torch.from_numpy(np.array(picture))
    if values.dim() == 2:
        values = values.expand(3, -1, -1)
    axis = next((axis for axis in last_first if values.dim() == 3 and values.shape[axis] == 3), None)
    if axis is None:
        raise UserError(f"the picture has shape {tuple(values.shape)}: give (h, w, 3), (3, h, w) or (h, w) in grey")
    values = values.movedim(axis, 0)
    if values.dtype == torch.uint8:
        return values
    if not values.is_floating_point() or not bool(((values >= 0) & (values <= 1)).all()):
        ends = f"{values.double().min().item():g} to {values.double().max().item():g}" if values.numel() else "nothing"
        raise UserError(f"the picture holds {values.dtype} of {ends}: give uint8, or floats in [0, 1]")
    return values.float() * 255


def pad_to_stride(images: Tensor, config: VimConfig) -> Tensor:
    """(b, c, h, w) filled up with 0 at the right and below, to the next size that the backbone's stride divides."""
    height, width = (config.padded(side) for side in images.shape[-2:])
    return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
