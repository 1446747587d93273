"""Next embedding prediction as an objective: the model, its pictures, and what a step of it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from launch.planning.memory import FLOAT, Work
from pretrain.causal import check_causal, encoder_stack
from pretrain.nepa.agreement import COLUMNS, agreement_strips
from pretrain.nepa.model import NextEmbedding
from pretrain.objective import Objective
from pretrain.strips import draw_strips
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.memory import Recompute
from vim_backbone.preprocessing import RGB, Preprocessing
from vim_backbone.vim import Images


@dataclass(frozen=True, kw_only=True)
class NEPA(Objective):
    """Next embedding prediction (arXiv 2512.16922)."""

    title: ClassVar[str] = "Next embedding prediction"

    @property
    def summary(self) -> str:
        """What is predicted."""
        return "each patch's embedding predicted from those before it, and from those after it"

    def check(self, architecture: VimConfig) -> None:
        """Full scans alone, of two patches or more."""
        check_causal(architecture, "nepa")

    def build(self, encoder: VisionMamba, preprocessing: Preprocessing = RGB) -> NextEmbedding:
        """The encoder with the loss."""
        del preprocessing
        return NextEmbedding(encoder)

    def show(
        self, model: nn.Module, images: Images, extras: Tensor | Sequence[Tensor], preprocessing: Preprocessing
    ) -> Callable[[str, Path], None]:
        """Input, and how well each patch was predicted by either direction. For all processes."""
        del extras
        encoder, agreements = self.encoder(model), model(images, agree=True)
        if isinstance(images, Tensor):
            agreements = [(ahead[None], back[None]) for both in agreements for ahead, back in zip(*both, strict=True)]

        def draw(title: str, path: Path) -> None:
            cosine = torch.cat([torch.cat(both, dim=1).flatten() for both in agreements]).mean().item()
            strips = agreement_strips(images, agreements, encoder.config, preprocessing)
            words = f"{title}; bright where a patch was predicted well, by its cosine (mean {cosine:.3f})"
            draw_strips(strips, COLUMNS, words, path)

        return draw

    def work(self, architecture: VimConfig, itemsize: int, recompute: Recompute) -> Work:
        """The encoder over all tokens in both directions apart, and the ends: its output, and the cosines."""
        stack = encoder_stack(architecture, recompute)
        return Work(stacks=(stack,), ends=2 * stack.tokens * architecture.d_model * (2 * FLOAT + itemsize))
