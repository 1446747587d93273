"""Autoregression by clusters as an objective: the clusters of views, the model, its pictures, and what a step costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from launch.data.loading import to_device
from launch.planning.memory import FLOAT, Work
from pretrain.ar.clusters import ARConfig, Plan, Targets, number_clusters, packed_plan, plan
from pretrain.ar.model import NextCluster, Prediction, check_ar
from pretrain.causal import encoder_stack
from pretrain.objective import Inputs, Objective
from pretrain.patches import without_hidden
from pretrain.strips import draw_strips
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.memory import Recompute
from vim_backbone.preprocessing import RGB, Preprocessing, as_rgb, to_pixels
from vim_backbone.vim import Images

COLUMNS = ("input", "predicted from before it", "predicted from after it")


@dataclass(frozen=True, kw_only=True)
class AR(Objective):
    """Autoregression by clusters of patches (arXiv 2406.07537, 2410.00871)."""

    ar: ARConfig = field(default_factory=ARConfig)

    title: ClassVar[str] = "Autoregression"
    architecture_fields: ClassVar[tuple[str, ...]] = ("ar.",)
    cost_fields: ClassVar[dict[str, str]] = {
        "ar.width": "channels of the decoder, which works patch by patch",
        "ar.depth": "its blocks",
    }

    @property
    def summary(self) -> str:
        """What is predicted at a time."""
        unit = (
            "row of patches" if self.ar.cluster is None else f"square of {self.ar.cluster} x {self.ar.cluster} patches"
        )
        return f"each {unit} predicted from those before it, and from those after it"

    def check(self, architecture: VimConfig) -> None:
        """Full scans of two patches or more, with all bands in one token."""
        check_ar(architecture)

    def draw(self, grid: tuple[int, int], rng: torch.Generator) -> Tensor:
        """The cluster (l,) of each patch; nothing is random."""
        del rng
        return number_clusters(grid, self.ar.cluster)

    def build(self, encoder: VisionMamba, preprocessing: Preprocessing = RGB) -> NextCluster:
        """The encoder with a decoder."""
        del preprocessing
        return NextCluster(encoder, self.ar)

    def inputs(
        self, extras: Tensor | Sequence[Tensor], device: torch.device, tokens: Sequence[int] | None = None
    ) -> Inputs:
        """The order of the patches, and what predicts which; made on the CPU."""
        del tokens  # a patch has one
        planned = plan(extras[0]) if isinstance(extras, Tensor) else packed_plan(extras)
        return Inputs(_to_device(planned, device), sum(len(extra) for extra in extras))

    def show(
        self, model: nn.Module, images: Images, extras: Tensor | Sequence[Tensor], preprocessing: Preprocessing
    ) -> Callable[[str, Path], None]:
        """Input, and what each direction predicted. For all processes."""
        device = images.device if isinstance(images, Tensor) else images[0].device
        config = self.encoder(model).config
        predictions: list[Prediction] = model(images, *self.inputs(extras, device).arguments, rebuild=True)

        def draw(title: str, path: Path) -> None:
            strips = []
            lengths = [len(extra) for extra in extras]
            predicted_at = [each.predicted_at.expand(len(images), -1) for each in predictions]
            if not isinstance(images, Tensor):
                predicted_at = [each.predicted_at.split(lengths) for each in predictions]
            for number, image in enumerate(images):
                panes = [as_rgb(to_pixels(image, preprocessing))]
                for each, there in zip(predictions, predicted_at, strict=True):
                    pixels = as_rgb(to_pixels(each.pixels[number], preprocessing))
                    panes.append(without_hidden(pixels, ~there[number], config.patch_size))
                strips.append(torch.stack(panes).permute(0, 2, 3, 1).float().cpu().numpy())
            draw_strips(strips, COLUMNS, f"{title}; predicted patches have their true mean and contrast", path)

        return draw

    def work(self, architecture: VimConfig, itemsize: int, recompute: Recompute) -> Work:
        """The encoder over all tokens in both directions apart, and the ends: its output, and the decoder's blocks."""
        stack, width = encoder_stack(architecture, recompute), self.ar.width
        pixels = architecture.patch_size**2 * architecture.in_chans
        block = FLOAT * 2 * width + itemsize * (width + 8 * width)
        tokens = 2 * stack.tokens  # of both directions
        decoder = self.ar.depth * block + FLOAT * 2 * width + itemsize * (width + pixels) + FLOAT * 2 * pixels
        return Work(
            stacks=(stack,),
            ends=tokens * (architecture.d_model * (FLOAT + itemsize) + decoder),
            freed=tokens * decoder,
            ends_backward=tokens * FLOAT * 4 * width,
        )


def _to_device(planned: Plan, device: torch.device) -> tuple[Tensor, Targets, Targets, list[int] | None]:
    ahead, back = (Targets(*(to_device(t, device) for t in each)) for each in (planned.ahead, planned.back))
    return to_device(planned.order, device), ahead, back, planned.counts
