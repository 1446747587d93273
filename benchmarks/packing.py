"""Pictures of different sizes through a Vim: packed into one row, padded to the largest, one at a time.

python -m benchmarks.packing [--name vim_tiny] [--images 16] [--smallest 96] [--largest 512] [--train]

Sides are drawn log-uniformly between the two, so that most pictures are small, as in a folder of any origin. The least
that padding can cost is the ratio of padded to real patches, which is printed. Padded pictures do not give the right
features (the scan runs through the padding); they are here for their time.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from vim_backbone import VisionMamba, create_model
from vim_backbone.errors import require

PATCH = 16


def pictures(count: int, smallest: int, largest: int, device: str) -> list[Tensor]:
    """Pictures (3, h, w) of sides that 16 divides, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.log(torch.tensor([smallest / PATCH, largest / PATCH]))
    sides = (torch.exp(low + (high - low) * torch.rand(count, 2, generator=generator)).round() * PATCH).int().tolist()
    return [torch.randn(3, h, w, generator=generator).to(device) for h, w in sides]


def padded(images: list[Tensor]) -> Tensor:
    """(b, 3, largest h, largest w), zeros to the right and below."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])


def run(model: VisionMamba, images: Tensor | list[Tensor], train: bool) -> None:
    """A forward pass, with a backward one in training."""
    with torch.set_grad_enabled(train):
        out = model(images)
        if train:
            out.square().sum().backward()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="vim_tiny", help="size of the model")
    parser.add_argument("--images", type=int, default=16, help="pictures of one pass")
    parser.add_argument("--smallest", type=int, default=96, help="side in pixels")
    parser.add_argument("--largest", type=int, default=512, help="side in pixels")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    options = parser.parse_args()
    require(options.images >= 1, "images", options.images, "it must be at least 1")
    require(PATCH <= options.smallest <= options.largest, "smallest", options.smallest, "16 to the largest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = create_model(options.name, num_classes=0).to(device).train(options.train)
    images = pictures(options.images, options.smallest, options.largest, device)
    batch = padded(images)
    tokens = sum(i.shape[1] * i.shape[2] for i in images) / PATCH**2
    ways = {
        "packed": lambda: run(model, images, options.train),
        "padded to the largest": lambda: run(model, batch, options.train),
        "one at a time": lambda: [run(model, image[None], options.train) for image in images],
    }
    seconds = {name: machine.seconds(way, device, 3.0) for name, way in ways.items()}
    print(f"{machine.clock(device)}; {machine.versions()}; float32, {'training' if options.train else 'inference'}")
    print(f"{options.name}, {len(images)} pictures of {options.smallest} to {options.largest} pixels a side, ", end="")
    print(f"{tokens:.0f} patches, {len(batch) * batch[0, 0].numel() / PATCH**2 / tokens:.2f} times padded\n")
    print("| way | s | patches/s | times packed |")
    print("|---|---|---|---|")
    for name, took in seconds.items():
        print(f"| {name} | {took:.3f} | {tokens / took:,.0f} | {took / seconds['packed']:.2f} |")


if __name__ == "__main__":
    main()
