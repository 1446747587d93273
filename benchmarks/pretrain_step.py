"""One masked-pretraining step of the default model beside a timm ViT of the same width and masking, on this machine.

`python -m benchmarks.pretrain_step` prints a table: seconds a step (median of steps taken in turn in one process) and
peak memory above the idle process (each model in a process of its own). Ratios compare with the first row.
"""

import argparse
import platform
import subprocess
import sys
import time
from statistics import median

import psutil
import timm
import torch
from timm.models.vision_transformer import Block as ViTBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from launch.run.optim import build_optimizer
from launch.run.randomness import generator
from pretrain.config import PretrainConfig
from pretrain.mae.masking import MaskConfig, draw_mask
from pretrain.mae.model import MaskedAutoencoder, normalise, patchify, select, split_patches
from vim_backbone import VisionMamba
from vim_backbone.position import sincos_table


class ViTAutoencoder(nn.Module):
    """MAE with timm's ViT blocks (SDPA attention): the same patches, masks, decoder width and loss as ours."""

    def __init__(self, config: PretrainConfig, depth: int) -> None:
        super().__init__()
        size, wide = config.model.architecture(), config.decoder.width
        side = size.patch_size
        self.encoder = VisionTransformer(
            img_size=size.img_size, patch_size=side, embed_dim=size.d_model, depth=depth, num_heads=size.d_model // 64
        )
        self.side = side
        self.decoder_embed = nn.Linear(size.d_model, wide)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, wide))
        self.positions = nn.Parameter(sincos_table(size.grid(*size.img_size), wide)[None], requires_grad=False)
        self.decoder = nn.Sequential(*(ViTBlock(wide, max(1, wide // 64)) for _ in range(config.decoder.depth)))
        self.head = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, side * side * 3))

    def forward(self, images: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Loss, as `MaskedAutoencoder.forward`."""
        vit = self.encoder
        assert vit.pos_embed is not None
        assert vit.cls_token is not None
        tokens = select(vit.patch_embed(images) + vit.pos_embed[:, 1:], visible)
        tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        encoded = self.decoder_embed(vit.norm(vit.blocks(tokens)))
        whole = self.mask_token.expand(len(encoded), self.positions.shape[1], -1)
        index = visible[..., None].expand(-1, -1, whole.shape[-1])
        whole = whole.scatter(1, index, encoded[:, 1:]) + self.positions
        rebuilt = self.decoder(torch.cat([encoded[:, :1], whole], dim=1))[:, 1:]
        target, _, _ = normalise(select(patchify(images, self.side), hidden))
        return (self.head(select(rebuilt, hidden)) - target).square().mean()


def build(name: str, config: PretrainConfig) -> nn.Module:
    """The model of a row."""
    depth = config.model.architecture().depth
    if name == "vim":
        return MaskedAutoencoder(VisionMamba(config.model.architecture()), config.decoder)
    return ViTAutoencoder(config, depth if name == "vit, same depth" else depth // 2)


ROWS = ("vim", "vit, same depth", "vit, half depth")


class Trainer:
    """A model with its optimizer and one fixed batch."""

    def __init__(self, name: str, config: PretrainConfig) -> None:
        torch.manual_seed(0)
        size = config.model.architecture()
        grid = size.grid(*size.img_size)
        self.model = build(name, config)
        self.optimizer = build_optimizer(self.model, config.optim, config.batch_size)
        self.images = torch.randn(config.batch_size, 3, *size.img_size, generator=generator(0))
        masks = torch.stack([draw_mask(grid, MaskConfig(), generator(i)) for i in range(config.batch_size)])
        self.patches = split_patches(masks)

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.model(self.images, *self.patches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def peak_megabytes(name: str) -> float:
    """Peak resident memory of three steps above the process before them, in a fresh process."""
    code = (
        "import resource, psutil; from benchmarks.pretrain_step import *\n"
        f"t = Trainer({name!r}, PretrainConfig()); idle = psutil.Process().memory_info().rss\n"
        "for _ in range(3): t.step()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - idle) / 1e6)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each model")
    steps = parser.parse_args().steps
    config = PretrainConfig()
    size = config.model.architecture()
    trainers = {name: Trainer(name, config) for name in ROWS}
    for trainer in trainers.values():
        trainer.step()  # compiles and allocates
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(steps):
        for name, trainer in trainers.items():
            seconds[name].append(trainer.step())
    memory = {name: peak_megabytes(name) for name in ROWS}

    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads of {psutil.cpu_count()},")
    print(f"torch {torch.__version__}, timm {timm.__version__}, python {platform.python_version()}, float32")
    masked = f"{size.img_size[0]} x {size.img_size[1]}, patch {size.patch_size}, width {size.d_model}, 75 % masked"
    print(f"batch {config.batch_size}, {masked}, Vim depth {size.depth}; median of {steps} steps\n")
    print("| model | M parameters | s / step | times vim | peak MB | times vim |")
    print("|---|---|---|---|---|---|")
    for name, trainer in trainers.items():
        s, base = median(seconds[name]), median(seconds["vim"])
        peak, base_peak = memory[name], memory["vim"]
        count = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        print(f"| {name} | {count:.1f} | {s:.3f} | {s / base:.2f} | {peak:.0f} | {peak / base_peak:.2f} |")


if __name__ == "__main__":
    main()
