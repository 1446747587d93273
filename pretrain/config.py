"""The configuration of a pretraining run, its objective included."""

from dataclasses import dataclass, field
from typing import Any, Literal

from launch.run.config import RunConfig
from launch.run.optim import OptimConfig
from pretrain.data import DataConfig
from pretrain.mae.masking import MaskConfig
from pretrain.mae.model import DecoderConfig
from pretrain.mae.objective import MAE
from pretrain.objective import Objective
from vim_backbone import VimConfig, named_config
from vim_backbone.errors import require

OBJECTIVE = MAE
"""What is learned. Its settings are fields of `PretrainConfig`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone."""

    name: str = "vim_tiny"
    """vim_tiny, vim_small, vim_base, vim_large or vim_huge."""
    img_size: int | tuple[int, int] = 96
    """Side, or [height, width], of the training views in pixels."""
    patch_size: int | None = 8
    """Side of a patch in pixels; null for the size's own."""
    depth: int | None = 8
    """Number of blocks; null for the size's own."""
    class_token: Literal["middle", "first", "none"] = "middle"
    """Where the class token sits in the scan."""
    num_registers: int = 0
    """Register tokens, spread evenly over the scan."""
    mixer_norm: bool = False
    """LayerNorm between scan and gate; steadies Base and larger."""
    drop_path_rate: float = 0.0
    """Stochastic depth at the last block."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""

    def architecture(self) -> VimConfig:
        """The backbone's full config: no head, fixed sine-cosine positions as MAE has them."""
        optional: dict[str, Any] = {"patch_size": self.patch_size, "depth": self.depth}
        return named_config(
            self.name,
            img_size=self.img_size,
            num_classes=0,
            position="sincos",
            class_token=self.class_token,
            global_pool="avg" if self.class_token == "none" else "token",
            num_registers=self.num_registers,
            mixer_norm=self.mixer_norm,
            drop_path_rate=self.drop_path_rate,
            **{key: value for key, value in optional.items() if value is not None},
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Pretraining. As it stands: a small Vim on built-in photographs, minutes on two CPU cores."""

    name: str = "pretrain"
    """Name of the run; its folder is OUT/NAME."""
    model: ModelConfig = field(default_factory=ModelConfig)
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(width=192))
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(base_lr=8e-3, warmup_steps=20))
    steps: int | None = None
    """Optimiser steps; give this or epochs. 120 when neither is given."""
    epochs: float | None = None
    """Passes over the pictures."""
    batch_size: int = 32
    """Pictures of one optimiser step, over all processes and accumulation steps."""
    accumulation: int = 1
    """Forward passes that one optimiser step gathers."""
    ema_decay: float | None = None
    """Averages the weights with this factor a step, such as 0.9999, and publishes the average."""
    picture_every: int = 100
    """Steps between pictures of what was learned; one more is made at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "accumulation", "picture_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        require(self.steps is None or self.epochs is None, "epochs", self.epochs, "give steps or epochs, not both")
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "it must be at least 1")
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "it must be positive")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "it must lie in (0, 1)")
        self.model.architecture()

    @property
    def objective(self) -> Objective:
        """What is learned."""
        return OBJECTIVE(mask=self.mask, decoder=self.decoder)

    def total_steps(self, pictures: int | None) -> int:
        """Optimiser steps of the run over a source of so many pictures (None: a stream)."""
        if self.epochs is None:
            return self.steps or 120
        require(pictures is not None, "epochs", self.epochs, "a stream has no length, give steps instead")
        return max(1, round(self.epochs * (pictures or 0) / self.batch_size))
