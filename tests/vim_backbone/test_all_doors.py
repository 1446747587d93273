"""The folder that a run published, and converted official weights: the same features through every door.

Each door is a fresh process, as a user has it; it gets the folders, which are in the Hub's cache too, and no network.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from launch.run.cli import parse
from pretrain.config import PretrainConfig
from pretrain.train import pretrain
from tests.vim_backbone import official
from vim_backbone import from_pretrained
from vim_backbone.convert import convert

ROOT = Path(__file__).parents[2]
COMMIT = "1" * 40
RUN = ["--model.depth=2", "--model.img_size=32", "--model.patch_size=8", "--decoder.width=32", "--decoder.depth=1",
       "--batch_size=4", "--optim.warmup_steps=1", "--data.workers=0", "--trackers=[]", "--steps=1"]  # fmt: skip
START = """
import sys
import torch
from PIL import Image
from safetensors.torch import save_file
import vim_backbone

torch.set_grad_enabled(False)
out, *folders = sys.argv[1:]
given = {}


def give(**features):
    given.update({f"{folder} {name}": tensor.contiguous() for name, tensor in features.items()})
    save_file(given, out)
"""
DOORS = {
    "load": """
for folder in folders:
    model, transform = vim_backbone.load(folder)
    images = transform(f"{folder}.png")
    give(images=images, pooled=model(images), maps=model.forward_intermediates(images, 1, intermediates_only=True)[0])
    give(hub=vim_backbone.load("someone/" + folder.split("/")[-1])[0](images))
""",
    "timm": """
import timm
import vim_backbone.timm

for folder in folders:
    for name, place in (("pooled", f"local-dir:{folder}"), ("hub", "hf-hub:someone/" + folder.split("/")[-1])):
        model = timm.create_model(place, pretrained=True, num_classes=0).eval()
        images = timm.data.create_transform(**timm.data.resolve_data_config(model=model))(Image.open(f"{folder}.png"))
        give(**{name: model(images[None]), "images": images[None]})
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(-1,)).eval()
    give(maps=maps(images[None])[0])
""",
    "transformers": """
import huggingface_hub
import vim_backbone.transformers
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification

huggingface_hub.HfApi.repo_exists = lambda self, name: True  # AutoBackbone asks the network, even for what it has
for folder in folders:
    name = "someone/" + folder.split("/")[-1]
    picture = Image.open(f"{folder}.png")
    images = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    give(images=images, pooled=AutoModel.from_pretrained(folder)(images).pooler_output)
    give(hub=AutoModel.from_pretrained(name)(images).pooler_output)
    give(maps=AutoBackbone.from_pretrained(name, out_indices=[-1])(images).feature_maps[0])
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=5)
    tokens = classifier.vim.forward_features(images)
    give(classifier=classifier.vim.forward_head(tokens, pre_logits=True))
""",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a run and of official weights, each with a picture of its size beside it."""
    place = tmp_path_factory.mktemp("all_doors")
    pictures = place / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(pictures / f"{number}.png")
    options = [*RUN, f"--out={place}/runs", f"--data.source={pictures}"]
    torch.manual_seed(0)
    shutil.copytree(pretrain(parse(PretrainConfig, options, "", "")) / "backbone", place / "run")
    torch.save(official.random_state(d=32, depth=2, patches=16, classes=5), place / "official.pth")
    convert(place / "official.pth", place / "official")
    for folder in (place / "run", place / "official"):
        snapshots = place / f"cache/models--someone--{folder.name}"
        shutil.copytree(folder, snapshots / "snapshots" / COMMIT)
        (snapshots / "refs").mkdir()
        (snapshots / "refs/main").write_text(COMMIT)
        size = from_pretrained(folder).config.img_size
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(f"{folder}.png")
    return [place / "run", place / "official"]


@pytest.mark.parametrize("door", DOORS)
def test_the_same_features(door, folders):
    if door == "transformers" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    place = folders[0].parent
    argv = [sys.executable, "-c", START + DOORS[door], place / door, *folders]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    settings = os.environ | {"HF_HUB_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=settings, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    given = load_file(place / door)
    for folder in folders:
        pixels = np.asarray(Image.open(f"{folder}.png")).transpose(2, 0, 1) / 255
        mean, deviation = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        images = torch.from_numpy((pixels - mean) / deviation).float()[None]
        with torch.no_grad():
            model = from_pretrained(folder)
            tokens, (maps,) = model.forward_intermediates(images, 1)
            pooled = model.forward_head(tokens, pre_logits=True)
        for name, want in {"images": images, "pooled": pooled, "hub": pooled, "maps": maps}.items():
            torch.testing.assert_close(given[f"{folder} {name}"], want, rtol=1e-4, atol=1e-4)
        if door == "transformers":
            torch.testing.assert_close(given[f"{folder} classifier"], pooled, rtol=1e-4, atol=1e-4)
