"""The sets of pictures of `benchmarks.learning`, and how nets are pretrained and fine-tuned on each."""

from dataclasses import dataclass, replace

NETS = {"vim": "tab:blue", "pooled": "tab:green", "vit": "tab:orange"}
"""Nets, each with its colour: Vim by its full and by its pooled scan, and a ViT of half the blocks, which have about
twice the parameters of a Vim's."""
OBJECTIVES = {"scratch": 0.4, "mae": 1.0, "nepa": 0.75, "ar": 0.55, "distill": 0.9}
"""Objectives, each with the strength of its colour; scratch: no pretraining."""
TRAIN, VAL = 1297, 500
"""Pictures of the digits."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A set of pictures, and how nets are pretrained and fine-tuned on it."""

    size: int
    """Side of the pictures in pixels."""
    patch: int
    depth: int
    """Blocks of Vim."""
    decoder: tuple[int, int]
    """Width, and Vim blocks."""
    pictures: int
    """To pretrain on."""
    pretraining_batch: int
    pretraining: list[str]
    augmentation: list[str]
    tuning: list[tuple[int | None, int]]
    """Labels of each class, None for all of them, and steps of fine-tuning with them."""
    batch: int
    """Of fine-tuning."""
    rates: dict[str, dict[str, float]]
    """Net -> learning rates of fine-tuning per 256 pictures."""
    points: tuple[float, ...]
    """Shares of the pretraining after which frozen features are evaluated."""


PLAIN = ["--augment.auto_augment=null", "--augment.color_jitter=0", "--augment.mixup=0", "--augment.cutmix=0",
         "--augment.erasing=0", "--augment.crop_pct=1"]  # fmt: skip
REAL = Recipe(
    size=32, patch=4, depth=12, decoder=(192, 2),
    pictures=50000, pretraining_batch=1024,
    pretraining=["--optim.base_lr=1e-3", "--optim.warmup_steps=100", "--data.min_scale=0.4"],
    augmentation=[*PLAIN, "--augment.flip=0.5", "--augment.min_scale=0.4"],
    tuning=[(50, 200), (500, 200), (None, 500)], batch=512,
    rates={net: {"pretrained": 1e-3, "scratch": 1e-3} for net in NETS},
    points=(1.0,),
)  # fmt: skip
RECIPES = {
    "digits": Recipe(
        size=32, patch=4, depth=4, decoder=(96, 1),
        pictures=TRAIN, pretraining_batch=64,
        pretraining=["--optim.base_lr=4e-3", "--optim.warmup_steps=20", "--data.flip=false", "--data.min_scale=0.6"],
        augmentation=[*PLAIN, "--augment.flip=0", "--augment.min_scale=0.6"],
        tuning=[(5, 100)], batch=50,
        rates={"vim": {"pretrained": 1e-2, "scratch": 1e-2}, "pooled": {"pretrained": 1e-2, "scratch": 1e-2},
               "vit": {"pretrained": 1e-2, "scratch": 3e-3}},  # the better of 3e-3 and 1e-2 on seed 100
        points=(0.0, 0.1, 0.3, 1.0),
    ),
    "cifar10": REAL,
    "tinyimagenet": replace(REAL, size=64, patch=8, tuning=[(3, 200), (25, 200), (None, 500)]),
}  # fmt: skip
