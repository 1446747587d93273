"""The configuration of a pretraining run, and the objectives that it chooses from."""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from launch.data.order import BatchPlan
from launch.run.config import BlocksConfig, TrainingConfig, flattened, plain
from launch.run.optim import OptimConfig
from pretrain.ar.clusters import ARConfig
from pretrain.ar.objective import AR
from pretrain.data import DataConfig
from pretrain.distill.objective import Distill
from pretrain.distill.teacher import DistillConfig
from pretrain.mae.model import MAEConfig
from pretrain.mae.objective import MAE
from pretrain.masked import DecoderConfig
from pretrain.masking import MaskConfig
from pretrain.nepa.objective import NEPA
from pretrain.objective import Objective
from pretrain.stages import Stage, StageConfig, borders, check_stages, errors_of
from pretrain.watching.config import EvalConfig
from vim_backbone import VimConfig, named_config
from vim_backbone.channels import Channels, Sets
from vim_backbone.errors import require

OBJECTIVES: dict[str, type[Any]] = {"mae": MAE, "nepa": NEPA, "ar": AR, "distill": Distill}
"""What can be learned, each an `Objective`. Its settings are fields of `PretrainConfig`, by their names."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(BlocksConfig):
    """The backbone."""

    name: str = "vim_tiny"
    """vim_tiny, vim_small, vim_base, vim_large or vim_huge."""
    img_size: int | tuple[int, int] = 96
    """Side, or [height, width], of the training views in pixels; of a run in stages, of its last one's."""
    patch_size: int | None = 8
    """Side of a patch in pixels; null for the size's own."""
    depth: int | None = 8
    """Number of blocks; null for the size's own."""
    scan: Literal["full", "pooled"] = "full"
    """full: Vim, every token is scanned. pooled: the mean of every row, in every other block of every column (FastVim),
    which takes less time and memory. Fine-tuning scans as pretraining did."""
    channels: Channels = "mixed"
    """mixed: a patch of all bands is one token. tokens: of each band one, with an embedding of the band (ChannelViT);
    pictures may have some of the bands only. As many times the tokens as a picture has bands."""
    class_token: Literal["middle", "first", "none"] | None = None
    """Where the class token sits in the scan; null for the middle, or none with scan=pooled, which has none."""
    num_registers: int = 0
    """Register tokens, spread evenly over the scan."""
    mixer_norm: bool | None = None
    """LayerNorm between scan and gate; steadies Base and larger. null: with scan=pooled alone."""
    position: Literal["sincos", "learned"] | None = None
    """Fixed sines and cosines, or learned, as official weights have them; null for sincos."""
    drop_path_rate: float = 0.0
    """Stochastic depth at the last block."""

    def architecture(self, in_chans: int = 3, channel_sets: Sets | None = None) -> VimConfig:
        """The backbone's full config for so many bands, without a head.

        `channel_sets`: those of pictures that lack some. Raises UserError for them where channels are mixed.
        """
        optional: dict[str, Any] = {"patch_size": self.patch_size, "depth": self.depth}
        pooled = self.scan == "pooled"
        class_token = self.class_token or ("none" if pooled else "middle")
        return named_config(
            self.name,
            img_size=self.img_size,
            num_classes=0,
            in_chans=in_chans,
            channels=self.channels,
            channel_sets=channel_sets,
            position=self.position or "sincos",
            scan=self.scan,
            class_token=class_token,
            global_pool="avg" if class_token == "none" else "token",
            num_registers=self.num_registers,
            mixer_norm=pooled if self.mixer_norm is None else self.mixer_norm,
            drop_path_rate=self.drop_path_rate,
            **{key: value for key, value in optional.items() if value is not None},
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Pretraining. As it stands: a small Vim on built-in photographs, minutes on two CPU cores."""

    UNSTATED: ClassVar[tuple[int | None, float | None]] = (120, None)

    name: str = "pretrain"
    """Name of the run; its folder is OUT/NAME."""
    init: str | None = None
    """Start from these weights: folder of a backbone, or of a run that published one, or an id on the Hub. What of
    `model` is not given is theirs; positions, patches and bands are resampled where `model.img_size`,
    `model.patch_size` or the data differ."""
    objective: Literal["mae", "nepa", "ar", "distill"] = "mae"
    """What is learned. mae: the pixels of hidden patches, from the visible ones (mask, decoder). nepa: the embedding of
    the next patch, from all before it, in both directions of the scan; no mask and no decoder. ar: the pixels of the
    next row or square of patches, likewise (ar). distill: the features that a frozen teacher has of the patches
    (distill, mask, decoder)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(width=192))
    mask: MaskConfig = field(default_factory=MaskConfig)
    mae: MAEConfig = field(default_factory=MAEConfig)
    ar: ARConfig = field(default_factory=lambda: ARConfig(width=192))
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(base_lr=8e-3, warmup_steps=20))
    eval: EvalConfig = field(default_factory=EvalConfig)
    steps: int | None = None
    """Optimiser steps; give this or epochs. 120 when neither is given."""
    stages: list[StageConfig] | None = None
    """Stretches of the run, each {until: SHARE OF THE STEPS, img_size: SIDE, batch_size: PICTURES}, such as small views
    first and large ones last; what one leaves out is model.img_size and batch_size. null: the whole run is alike."""
    picture_every: int = 100
    """Steps between pictures of what was learned; one more is made at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.picture_every >= 1, "picture_every", self.picture_every, "it must be at least 1")
        self._check_budget()
        if self.stages is None:
            self.architecture()
        else:
            check_stages(self.stages)
            ends, size = (config.architecture().img_size for config in (self.by_stage()[-1], self))
            remedy = f"model.img_size, the published backbone's, is {list(size)}: leave it out, or set both alike"
            require(ends == size, f"stages[{len(self.stages) - 1}].img_size", list(ends), remedy)

    def _check_budget(self) -> None:
        if self.data.batch_by == "views":
            return
        for wrong, remedy in (
            (self.data.sizes != "native", "views of one size have as many patches each; set data.sizes to native"),
            (self.data.streaming, "it must know how large pictures are before they come; set data.streaming to false"),
            (self.epochs is not None, "how many pictures a step has is known when it comes; give steps, not epochs"),
        ):
            require(not wrong, "data.batch_by", self.data.batch_by, remedy)

    def by_stage(self) -> list["PretrainConfig"]:
        """Of each stage, a run of it alone; the run itself where it has none. Raises UserError naming the stage."""
        configs = []
        for number, stage in enumerate(self.stages or ()):
            batch_size = self.batch_size if stage.batch_size is None else stage.batch_size
            model = self.model if stage.img_size is None else replace(self.model, img_size=stage.img_size)
            with errors_of(number):
                configs.append(replace(self, stages=None, batch_size=batch_size, model=model))
        return configs or [self]

    @property
    def mean_batch_size(self) -> float:
        """Pictures of a step, over all stages."""
        if self.stages is None:
            return self.batch_size
        ends = [stage.until for stage in self.stages]
        shares = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
        return sum(share * each.batch_size for share, each in zip(shares, self.by_stage(), strict=True))

    def schedule(self, total_steps: int, world: int, rank: int) -> list[Stage]:
        """The stages of one process of a run, or the whole run as one.

        Raises UserError where a batch does not divide into processes and forward passes, or a stage has no step.
        """
        stretches = [range(total_steps)] if self.stages is None else borders(self.stages, total_steps)
        stages: list[Stage] = []
        samples = 0
        for number, (config, steps) in enumerate(zip(self.by_stage(), stretches, strict=True)):
            with nullcontext() if self.stages is None else errors_of(number):
                plan = BatchPlan(config.batch_size, self.accumulation, world, rank)
            stages.append(Stage(steps, config.architecture().img_size, plan, number + 1, samples))
            samples += len(steps) * plan.batch_size
        return stages

    def architecture(self) -> VimConfig:
        """The backbone's full config; it knows the share of visible patches, which a pooled scan learned with."""
        preprocessing = self.data.preprocessing
        architecture = self.model.architecture(preprocessing.in_chans, preprocessing.channel_sets)
        self.method.check(architecture)
        pooled = self.model.scan == "pooled"
        return replace(architecture, visible_share=self.method.visible_share) if pooled else architecture

    @property
    def method(self) -> Objective:
        """What is learned, with its settings."""
        chosen = OBJECTIVES[self.objective]
        return chosen(**{each.name: getattr(self, each.name) for each in fields(chosen)})

    def not_used(self) -> list[str]:
        """Lines on settings that do nothing here and are not at their defaults: a recipe's may be there."""
        settings = {each.name for each in fields(OBJECTIVES[self.objective])}
        others: dict[str, list[str]] = {}
        for name, other in OBJECTIVES.items():
            for each in fields(other):
                others.setdefault(each.name, []).append(name)
        usual, current = flattened(plain(type(self)())), flattened(plain(self))
        changed = [(name, name.partition(".")[0]) for name in current if current[name] != usual.get(name)]
        of_others = [
            f"{name} {current[name]} is a setting of objective {' and '.join(others[group])}, "
            f"which {self.objective} does not use"
            for name, group in changed
            if group in others.keys() - settings
        ]
        idle = self.method.idle
        return of_others + [
            f"{name} {current[name]} does nothing where {idle[group]}" for name, group in changed if group in idle
        ]
