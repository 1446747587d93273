"""Any picture becomes 8-bit RGB, or is refused with the reason."""

import numpy as np
from PIL import Image, ImageOps

Image.MAX_IMAGE_PIXELS = None  # `check_size` refuses large pictures itself, one by one and with a line that helps


class BadPictureError(Exception):
    """One picture that cannot be used; the message says why."""


def to_rgb(image: Image.Image, max_megapixels: float) -> Image.Image:
    """Any picture as 8-bit RGB: first frame, upright, 16-bit scaled down, transparency over white.

    Raises BadPictureError for one that is too large, and PIL's errors for one that is damaged.
    """
    check_size(image, max_megapixels)
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bit(np.asarray(image), image.mode))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_size(image: Image.Image, max_megapixels: float) -> None:
    """Raise BadPictureError for a picture of more than `max_megapixels`, before it is decoded."""
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise BadPictureError(f"{megapixels:.0f} megapixels, over data.max_megapixels {max_megapixels:g}")


def _to_8_bit(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Grey levels of more than 8 bits to 8: 16-bit ones by their range, others by the power of 256 that holds them."""
    highest = float(pixels.max()) if pixels.size else 0.0
    top = 65535.0 if mode.startswith("I;16") else next(t for t in (1.0, 255.0, 65535.0, float("inf")) if highest <= t)
    top = highest if top == float("inf") else top
    return (pixels.astype(np.float32).clip(0, top) * (255.0 / top)).round().astype(np.uint8)
