"""A look at a few pictures of a source before a run: what its settings cannot mean ends it, in one line."""

from launch.data.images import BadPictureError
from launch.data.pictures import Picture, PillowPicture
from launch.data.reading import read_pixels
from launch.data.sources import Source, parts_of, some_pictures
from launch.data.statistics import require_statistics
from vim_backbone.errors import UserError
from vim_backbone.images import reason
from vim_backbone.preprocessing import Preprocessing

LOOKED_AT = 8
SIDE = 512
"""Of the middle of a picture that is read."""


def look_at_first(
    source: Source, preprocessing: Preprocessing, max_megapixels: float, max_bad_share: float = 0.5
) -> None:
    """Raise UserError where more than a share of a few pictures, spread over the source, cannot be what is meant.

    Files that are damaged count for nothing here: they are named when they are met.
    """
    require_statistics(preprocessing)
    for part in parts_of(source)[0]:
        look_at_part(part, preprocessing, max_megapixels, max_bad_share)


def look_at_part(source: Source, preprocessing: Preprocessing, max_megapixels: float, max_bad_share: float) -> None:
    """As `look_at_first`, at one of several sources."""
    pictures = list(some_pictures(source, LOOKED_AT, spread))
    refused: list[str] = []
    for name, opened in pictures:
        try:
            with opened() as picture:
                surely = isinstance(picture, PillowPicture) and picture.dtype == "uint8"
                if preprocessing.bands is not None or not surely:
                    read_middle(picture, preprocessing, max_megapixels)
        except BadPictureError as error:
            refused.append(f"{name}: {reason(error)}")
        except Exception:  # a damaged file, named when it is met
            continue
    if len(refused) > max_bad_share * len(pictures):
        raise UserError(f"{len(refused)} of {len(pictures)} pictures cannot be what is meant, such as {refused[0]}")


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, spread evenly."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def read_middle(picture: Picture, preprocessing: Preprocessing, max_megapixels: float) -> None:
    """Read the middle of a picture as a run would. Raises what a run would meet."""
    height, width = picture.size
    h, w = min(height, SIDE), min(width, SIDE)
    top, left = (height - h) // 2, (width - w) // 2
    read_pixels(picture, preprocessing, max_megapixels, (left, top, left + w, top + h), (h, w))
