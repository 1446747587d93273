"""Distillation as an objective: the masks of views, the model, its pictures, and what a step of it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.planning.memory import FLOAT, Stack, Work
from pretrain.distill.model import Comparison, Distillation, MaskedDistillation
from pretrain.distill.teacher import DistillConfig, Teacher, check_grid, check_teacher, describe, read
from pretrain.masked import COST_FIELDS, MaskedObjective
from pretrain.objective import Objective
from pretrain.patches import without_hidden
from pretrain.strips import by_patch, draw_strips
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.memory import Recompute
from vim_backbone.preprocessing import RGB, Preprocessing, as_rgb, to_pixels
from vim_backbone.vim import Images

COLUMNS = ("input", "what the encoder saw", "agreement with the teacher")


@dataclass(frozen=True, kw_only=True)
class Distill(MaskedObjective):
    """Distillation of a frozen teacher's features."""

    distill: DistillConfig = field(default_factory=DistillConfig)

    title: ClassVar[str] = "Distillation"
    architecture_fields: ClassVar[tuple[str, ...]] = ("decoder.", "distill.")
    cost_fields: ClassVar[dict[str, str]] = {
        "distill.teacher": "model of timm whose features are learned",
        "distill.pretrained": "whether its weights may be fetched, true or false",
        "distill.at": "patches that are seen and learned: visible, hidden or whole",
        **COST_FIELDS,
    }

    @property
    def summary(self) -> str:
        """Teacher, share and kind of the masks."""
        masks = "" if self.distill.at == "whole" else f", {self.mask.ratio:.0%} of them hidden ({self.mask.kind})"
        where = {"whole": "of all patches", "visible": "of the visible patches", "hidden": "of the hidden patches"}
        return f"features of {self.distill.teacher} {where[self.distill.at]}{masks}"

    @property
    def idle(self) -> dict[str, str]:
        """Masks where all is seen, and the decoder where nothing hidden is learned."""
        groups = {"whole": ("mask", "decoder"), "visible": ("decoder",), "hidden": ()}[self.distill.at]
        return dict.fromkeys(groups, f"distill.at is {self.distill.at}")

    @property
    def visible_share(self) -> float:
        """What masks leave."""
        return 1.0 if self.distill.at == "whole" else super().visible_share

    def check(self, architecture: VimConfig) -> None:
        """A teacher that has a feature for each patch."""
        check_teacher(self.distill, architecture)

    def prepare(self, architecture: VimConfig, preprocessing: Preprocessing, *, native: bool) -> None:
        """Compare pictures and teacher, and read its weights, which fetches them where that was asked for."""
        if native:
            rows, columns = architecture.grid(*architecture.img_size)
            check_grid(self.distill.teacher, (rows, columns + 1))
        Teacher(self.distill, preprocessing)
        read(self.distill.teacher)

    def draw(self, grid: tuple[int, int], rng: torch.Generator) -> Tensor:
        """A mask (l,) bool, True = hidden."""
        return Objective.draw(self, grid, rng) if self.distill.at == "whole" else super().draw(grid, rng)

    def draw_batch(self, grid: tuple[int, int], seeds: np.ndarray) -> Tensor:
        """Masks (b, l)."""
        whole = self.distill.at == "whole"
        return Objective.draw_batch(self, grid, seeds) if whole else super().draw_batch(grid, seeds)

    def build(self, encoder: VisionMamba, preprocessing: Preprocessing = RGB) -> Distillation | MaskedDistillation:
        """The encoder with the loss, and a decoder where it learns what it does not see."""
        teacher = Teacher(self.distill, preprocessing)
        if self.distill.at == "hidden":
            return MaskedDistillation(encoder, self.decoder, teacher)
        return Distillation(encoder, teacher)

    def show(
        self, model: nn.Module, images: Images, extras: Tensor | Sequence[Tensor], preprocessing: Preprocessing
    ) -> Callable[[str, Path], None]:
        """Input, what the encoder saw, and how near it came to the teacher. For all processes."""
        device = images.device if isinstance(images, Tensor) else images[0].device
        config = self.encoder(model).config
        compared = model(images, *self.inputs(extras, device).arguments, compare=True)
        assert isinstance(compared, Comparison)
        there = [extra if self.distill.at == "hidden" else ~extra for extra in extras]
        cosines = F.cosine_similarity(*compared, dim=-1).flatten().cpu()
        pieces = cosines.split([int(each.sum()) for each in there])

        def draw(title: str, path: Path) -> None:
            strips = []
            for image, extra, where, values in zip(images, extras, there, pieces, strict=True):
                original = as_rgb(to_pixels(image, preprocessing)).cpu()
                every = torch.full(extra.shape, 0.35).masked_scatter(where.cpu(), values.clamp(min=0))
                patches = every.unflatten(0, config.grid(*image.shape[-2:]))
                agreement = by_patch(patches, config.patch_size).expand_as(original)
                panes = [original, without_hidden(original, extra.cpu(), config.patch_size), agreement]
                strips.append(torch.stack(panes).permute(0, 2, 3, 1).numpy())
            words = f"{title}; bright where a feature was predicted well, by its cosine (mean {cosines.mean():.3f})"
            draw_strips(strips, COLUMNS, words, path)

        return draw

    def work(self, architecture: VimConfig, itemsize: int, recompute: Recompute) -> Work:
        """The encoder over what it sees, a decoder over all where there is one, the ends, and the teacher.

        The teacher runs first, without gradients, and leaves its features; it is counted as a ViT.
        """
        rows, columns = architecture.grid(*architecture.img_size)
        patches, special, teacher = rows * columns, architecture.num_special, describe(self.distill.teacher)
        hidden = 0 if self.distill.at == "whole" else self.mask.num_masked(patches)
        scanned = patches - hidden + special
        stacks, ends = (Stack(architecture, scanned, recompute),), FLOAT * scanned * architecture.d_model
        compared = patches - hidden
        if self.distill.at == "hidden":
            stacks += (Stack(self.decoder.blocks(architecture), patches + special, recompute),)
            ends, compared = ends + FLOAT * 2 * patches * self.decoder.width, hidden
        comparison = FLOAT * (patches + 2 * compared) + (itemsize if itemsize < FLOAT else 0) * compared
        return Work(
            stacks=stacks,
            ends=ends + comparison * teacher.width,
            frozen=FLOAT * teacher.parameters,
            # of a ViT's block: stream, its sum and norm in float32, and twice the four widths between its two products
            frozen_forward=patches * teacher.width * (3 * FLOAT + 8 * itemsize),
        )
