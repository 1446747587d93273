"""Small teachers of timm with drawn weights, as folders."""

import json

import timm
import torch
from safetensors.torch import save_file

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def write_teacher(folder, in_chans=3, model="vit_tiny_patch16_224", **sizes):
    """A ViT of `SIZES`, and its name for timm; `model` is timm's name of its kind."""
    sizes = SIZES | sizes
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = timm.create_model(model, num_classes=0, in_chans=in_chans, **sizes)
    folder.mkdir(parents=True)
    side = sizes["img_size"]
    height, width = side if isinstance(side, tuple) else (side, side)
    about = {"input_size": [in_chans, height, width], "mean": MEAN, "std": STD, "num_classes": 0,
             "first_conv": "patch_embed.proj", "classifier": "head", "interpolation": "bicubic"}  # fmt: skip
    config = {"architecture": model, "num_classes": 0, "model_args": sizes, "pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(made.state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}"
