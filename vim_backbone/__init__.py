"""Vision Mamba backbones: create one by name, or load one from a folder of safetensors or the Hub."""

from typing import Any

from vim_backbone.config import SIZES as SIZES
from vim_backbone.config import VimConfig as VimConfig
from vim_backbone.config import named_config as named_config
from vim_backbone.errors import UserError as UserError
from vim_backbone.hub import push_to_hub as push_to_hub
from vim_backbone.preprocessing import Preprocessing as Preprocessing
from vim_backbone.preprocessing import read_preprocessing as read_preprocessing
from vim_backbone.pretrained import from_pretrained as from_pretrained
from vim_backbone.pretrained import load as load
from vim_backbone.transform import Transform as Transform
from vim_backbone.vim import VisionMamba as VisionMamba


def create_model(
    name: str,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    **overrides: Any,
) -> VisionMamba:
    """A Vim backbone with fresh weights.

    Args:
        name: "vim_tiny", "vim_small", "vim_base", "vim_large" or "vim_huge".
        img_size: side, or (height, width), in pixels.
        num_classes: size of the classifier; 0 leaves it out.
        in_chans: channels of the pictures.
        overrides: any other field of `VimConfig`, such as `stride=8`, `class_token="first"`, `num_registers=12`.

    Raises:
        UserError: an unknown name or field, or values that do not fit together.
    """
    return VisionMamba(named_config(name, img_size=img_size, num_classes=num_classes, in_chans=in_chans, **overrides))
