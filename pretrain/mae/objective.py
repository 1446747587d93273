"""Masked autoencoding as an objective: the masks of views, the model, its pictures, and what a step of it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from launch.planning.memory import FLOAT, Stack, Work
from pretrain.mae.model import MAEConfig, MaskedAutoencoder, Reconstruction
from pretrain.mae.reconstructions import COLUMNS, reconstruction_grid
from pretrain.masked import COST_FIELDS, MaskedObjective
from pretrain.strips import draw_strips
from vim_backbone import VimConfig, VisionMamba
from vim_backbone.errors import require
from vim_backbone.memory import Recompute
from vim_backbone.preprocessing import RGB, Preprocessing
from vim_backbone.vim import Images


@dataclass(frozen=True, kw_only=True)
class MAE(MaskedObjective):
    """Masked autoencoding (arXiv 2111.06377)."""

    mae: MAEConfig = field(default_factory=MAEConfig)

    title: ClassVar[str] = "Masked autoencoding"
    picture_folder: ClassVar[str] = "reconstructions"
    architecture_fields: ClassVar[tuple[str, ...]] = ("decoder.", "mae.")
    cost_fields: ClassVar[dict[str, str]] = COST_FIELDS

    @property
    def summary(self) -> str:
        """Share and kind of the masks."""
        gaps = ", dt scaled by the gaps" if self.mae.gap_aware else ""
        return f"{self.mask.ratio:.0%} of the patches hidden ({self.mask.kind}){gaps}"

    def check(self, architecture: VimConfig) -> None:
        """All that pretraining can make; with gaps full scans alone."""
        remedy = "lines of a pooled scan have no gaps, hidden patches count in their means; set model.scan to full"
        require(not (self.mae.gap_aware and architecture.scan == "pooled"), "mae.gap_aware", True, remedy)

    def build(self, encoder: VisionMamba, preprocessing: Preprocessing = RGB) -> MaskedAutoencoder:
        """The autoencoder around an encoder."""
        del preprocessing
        return MaskedAutoencoder(encoder, self.decoder, self.mae)

    def show(
        self, model: nn.Module, images: Images, extras: Tensor | Sequence[Tensor], preprocessing: Preprocessing
    ) -> Callable[[str, Path], None]:
        """Input, what the encoder saw, and what it was rebuilt to, of each image. For all processes."""
        device = images.device if isinstance(images, Tensor) else images[0].device
        encoder = self.encoder(model)
        inputs = self.inputs(extras, device, encoder.config.tokens_of(images))
        reconstruction = model(images, *inputs.arguments, reconstruct=True)
        assert isinstance(reconstruction, Reconstruction)
        patch_size = encoder.config.patch_size

        def draw(title: str, path: Path) -> None:
            hidden = round(100 * torch.cat([mask.float() for mask in extras]).mean().item())
            grid = reconstruction_grid(reconstruction, images, extras, patch_size, preprocessing)
            words = f"{hidden} % of the patches hidden; their mean and contrast are not predicted"
            draw_strips(grid, COLUMNS, f"{title}\n{words}", path)

        return draw

    def work(self, architecture: VimConfig, itemsize: int, recompute: Recompute) -> Work:
        """The encoder over the visible tokens, the decoder over all, and the ends: embedding, prediction, targets."""
        rows, columns = architecture.grid(*architecture.img_size)
        channels, special = architecture.tokens_a_patch(architecture.in_chans), architecture.num_special
        patches, hidden = rows * columns * channels, self.mask.num_masked(rows * columns) * channels
        visible, width = patches - hidden + special, self.decoder.width
        pixels = architecture.patch_size**2 * architecture.in_chans // channels
        return Work(
            stacks=(
                Stack(architecture, visible, recompute),
                Stack(self.decoder.blocks(architecture), patches + special, recompute),
            ),
            ends=FLOAT * (visible * architecture.d_model + 2 * patches * width + 2 * hidden * pixels)
            + itemsize * hidden * (width + pixels),
        )
