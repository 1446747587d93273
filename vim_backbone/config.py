"""Architecture of a Vim backbone: every size, checked once, and the named sizes of the papers."""

import math
from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vim_backbone.channels import Channels, Sets, channels_of, check_sets
from vim_backbone.errors import UserError, nearest
from vim_backbone.tokens import TokenLayout

SIZES: dict[str, dict[str, Any]] = {
    "vim_tiny": {"d_model": 192, "depth": 24},
    "vim_small": {"d_model": 384, "depth": 24},
    "vim_base": {"d_model": 768, "depth": 24},
    "vim_large": {"d_model": 1024, "depth": 48},
    "vim_huge": {"d_model": 1280, "depth": 64, "patch_size": 14},
}
"""Ti, S, B of Vim (arXiv 2401.09417); L, H as FastVim (arXiv 2502.00594) pretrains them."""


LARGEST = {
    "d_model": 2**16, "depth": 2**12, "img_size": 2**17, "patch_size": 2**12, "stride": 2**12, "in_chans": 2**12,
    "num_classes": 2**24, "num_registers": 2**12, "d_state": 2**12, "d_conv": 2**8, "expand": 2**6, "dt_rank": 2**16,
}  # fmt: skip
"""Bounds of the whole numbers, beyond any model: what is above comes from a damaged file."""
LARGEST_TABLE = 2**30
"""Numbers in a table of positions, at most."""


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """Architecture of a Vim backbone; the whole content of config.json."""

    d_model: int
    """Width of the residual stream, in channels."""
    depth: int
    """Number of blocks."""
    img_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the position table is made for; the model takes other sizes too."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    stride: int = 0
    """Pixels from one patch to the next; 8 gives overlapping patches. Given as 0 or None: patch_size."""
    in_chans: int = 3
    """Channels of the picture."""
    channels: Channels = "mixed"
    """mixed: a patch of all channels is one token. tokens: of each channel one, and pictures may lack channels."""
    channel_sets: Sets | None = None
    """Of channels=tokens: which channels a picture with fewer of them has, a set for each number; None: all, always."""
    num_classes: int = 1000
    """Outputs of the classifier; 0 for none, then the model returns pooled features."""
    class_token: Literal["middle", "first", "none"] = "middle"
    """Where the class token sits in the scan."""
    num_registers: int = 0
    """Learned tokens spread evenly over the scan (Mamba-Reg, arXiv 2405.14858)."""
    position: Literal["learned", "sincos"] = "learned"
    """Position table: learned, or the fixed 2-D sine-cosine of MAE."""
    global_pool: Literal["token", "avg"] = "token"
    """What the classifier reads: the class token, or the mean of the patch tokens."""
    d_state: int = 16
    """States of the scan per inner channel."""
    d_conv: int = 4
    """Taps of the causal convolution."""
    expand: int = 2
    """Inner channels per channel of the residual stream."""
    dt_rank: int = 0
    """Rank of the time-step projection. Given as 0 or None: d_model / 16, rounded up."""
    scan: Literal["full", "pooled"] = "full"
    """full: every token is scanned. pooled: the mean of every row, in every other block of every column (FastVim)."""
    visible_share: float = 1.0
    """Of scan=pooled: means over lines are multiplied by it, 1 - mask ratio after masked pretraining."""
    mixer_norm: bool = False
    """LayerNorm between scan and gate; removes the loss spikes of large models (FastVim)."""
    norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    drop_path_rate: float = 0.0
    """Stochastic depth at the last block; rises linearly from 0."""

    def __post_init__(self) -> None:
        self._check_types()
        size = self.img_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        object.__setattr__(self, "img_size", size)
        object.__setattr__(self, "stride", self.stride or self.patch_size)
        object.__setattr__(self, "dt_rank", self.dt_rank or -(-self.d_model // 16))
        if len(size) != 2:
            raise UserError(f"img_size is {size}: give one side or (height, width) in pixels")
        for name in ("d_model", "depth", "patch_size", "stride", "in_chans", "d_state", "d_conv", "expand", "dt_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_classes < 0 or self.num_registers < 0:
            raise UserError("num_classes and num_registers cannot be negative")
        for name, choices in (
            ("class_token", ("middle", "first", "none")),
            ("position", ("learned", "sincos")),
            ("global_pool", ("token", "avg")),
            ("scan", ("full", "pooled")),
            ("channels", ("mixed", "tokens")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(choices)}")
        if not 0.0 < self.visible_share <= 1.0:
            raise UserError(f"visible_share is {self.visible_share}: it must lie in (0, 1]")
        if self.scan == "pooled" and (self.class_token != "none" or self.num_registers):
            raise UserError(
                f"scan is 'pooled' with class_token {self.class_token!r} and num_registers {self.num_registers}: lines "
                "hold patches alone; set class_token to 'none', num_registers to 0 and global_pool to 'avg'"
            )
        if self.global_pool == "token" and self.class_token == "none":
            raise UserError("global_pool is 'token' but class_token is 'none': set global_pool to 'avg'")
        if self.position == "sincos" and self.d_model % 4:
            raise UserError(f"d_model is {self.d_model}: sine-cosine positions need a multiple of 4")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise UserError(f"drop_path_rate is {self.drop_path_rate}: it must lie in [0, 1)")
        if self.channel_sets is not None:
            self._check_channel_sets()
        rows, columns = self.grid(*size)
        if rows * columns * self.d_model > LARGEST_TABLE:
            raise UserError(f"img_size is {size}: {rows} x {columns} patches of {self.d_model} channels are too many")

    def _check_channel_sets(self) -> None:
        sets = self.channel_sets
        if not isinstance(sets, (list, tuple)) or not all(isinstance(each, (list, tuple)) for each in sets):
            raise UserError(f"channel_sets is {sets!r}: it must be a list of lists of channels")
        check_sets(sets, range(self.in_chans), "channel_sets")
        if self.channels == "mixed":
            numbers = " or ".join(str(number) for number in sorted({len(each) for each in sets}))
            raise UserError(
                f"pictures have {numbers} of {self.in_chans} bands, and channels is 'mixed', which takes all: pretrain "
                "with model.channels tokens, or choose bands that all pictures have"
            )
        object.__setattr__(self, "channel_sets", tuple(map(tuple, sets)))

    def _check_types(self) -> None:
        """Raise UserError for a field of another type, or beyond what any machine could hold."""
        for field in fields(self):
            name, value, limit = field.name, getattr(self, field.name), LARGEST.get(field.name)
            unstated = value is None and name in ("stride", "dt_rank")
            sides = value if name == "img_size" and isinstance(value, (list, tuple)) else [value]
            if limit is not None and not unstated:
                for side in sides:
                    if type(side) is not int or side > limit:
                        raise UserError(f"{name} is {value!r}: it must be a whole number, {limit} at most")
            elif type(field.default) is bool and type(value) is not bool:
                raise UserError(f"{name} is {value!r}: it must be true or false")
            elif type(field.default) is float and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UserError(f"{name} is {value!r}: it must be a number")

    @property
    def d_inner(self) -> int:
        """Channels inside the mixer."""
        return self.expand * self.d_model

    @property
    def num_special(self) -> int:
        """Tokens that are no patches: class token and registers."""
        return TokenLayout(self.class_token, self.num_registers).num_special

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture. Raises UserError for a size the stride does not divide."""
        for side, pixels in (("height", height), ("width", width)):
            if pixels % self.stride or pixels < self.patch_size:
                near = max(self.patch_size, round(pixels / self.stride) * self.stride)
                near += -near % self.stride
                raise UserError(
                    f"image {side} is {pixels} pixels: it must be a multiple of the stride {self.stride} "
                    f"and at least one patch ({self.patch_size}); the nearest is {near}"
                )
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def channels_of(self, number: int) -> tuple[int, ...]:
        """Which channels a picture with so many has. Raises UserError for a number that the model does not take."""
        return channels_of(number, self.in_chans, self.channel_sets)

    def tokens_a_patch(self, number: int) -> int:
        """How many a patch has in a picture with so many channels."""
        return number if self.channels == "tokens" else 1

    def tokens_of(self, images: Iterable[Sized]) -> list[int]:
        """How many a patch has in each picture (c, h, w)."""
        return [self.tokens_a_patch(len(image)) for image in images]

    def padded(self, side: int) -> int:
        """Pixels of a side filled up to what the stride divides, and to one patch."""
        return -(-max(side, self.patch_size) // self.stride) * self.stride

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; of mixed channels as versions that knew no others wrote it."""
        data = asdict(self) | {"img_size": list(self.img_size)}
        if self.channels == "mixed":
            del data["channels"], data["channel_sets"]
        elif self.channel_sets is not None:
            data["channel_sets"] = [list(each) for each in self.channel_sets]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "VimConfig":
        """From plain data. Raises UserError naming a field that does not exist or is missing."""
        names = {f.name for f in fields(cls)}
        for name in data:
            if name not in names:
                raise UserError(f"{name!r} is no field of a Vim backbone: {nearest(name, names)}")
        for name in ("d_model", "depth"):
            if name not in data:
                raise UserError(f"the backbone's config lacks {name!r}")
        return cls(**data)


def named_config(name: str, **overrides: Any) -> VimConfig:
    """The config of a named size ("vim_tiny" .. "vim_huge"), with fields overridden."""
    if name not in SIZES:
        raise UserError(f"unknown model {name!r}: {nearest(name, SIZES)}")
    return VimConfig.from_dict(SIZES[name] | overrides)
