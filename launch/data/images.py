"""What of Pillow's pictures concerns reading many: ends of names, no limit of Pillow's; the rest is the backbone's."""

from PIL import Image

from vim_backbone.images import ORIENTATION, STRIP, TURNS, suffixes
from vim_backbone.images import BadPictureError as BadPictureError
from vim_backbone.images import check_megapixels as check_megapixels
from vim_backbone.images import check_size as check_size
from vim_backbone.images import levels as levels
from vim_backbone.images import open_picture as open_picture
from vim_backbone.images import orientation as orientation
from vim_backbone.images import range_of as range_of
from vim_backbone.images import to_rgb as to_rgb
from vim_backbone.images import turned as turned
from vim_backbone.images import upright as upright
from vim_backbone.images import upright_size as upright_size

__all__ = ["ORIENTATION", "STRIP", "SUFFIXES", "TURNS"]

Image.MAX_IMAGE_PIXELS = None  # `check_size` refuses large pictures itself, one by one and with a line that helps

SUFFIXES = suffixes()
"""Ends of the names of picture files, in lower case."""
