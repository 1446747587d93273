"""A published folder through timm and transformers, each in a fresh process: the features of vim_backbone."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vim_backbone import Preprocessing, create_model, from_pretrained, load

ROOT = Path(__file__).parents[2]
COMMIT = "1" * 40
PREAMBLE = """
import sys
import torch
from safetensors.torch import load_file

import vim_backbone

heavy = {"timm", "transformers", "torchvision", "huggingface_hub", "numba", "datasets"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)  # importing the library stays quick
folder = sys.argv[1]
want = load_file(sys.argv[2])
image = want.pop("image").numpy()
images, grey, large = (want.pop(name) for name in ("images", "grey", "large_pictures"))
torch.set_grad_enabled(False)


def same(got, name, **tolerance):
    torch.testing.assert_close(got, want[name], **(tolerance or {"rtol": 0, "atol": 0}))
"""
TIMM = """
import timm
import vim_backbone.timm

for name in (f"local-dir:{folder}", "hf-hub:someone/vim"):
    same(timm.create_model(name, pretrained=True).eval()(images), "logits")
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
same(model.forward_features(images), "tokens")
same(model.get_intermediate_layers(images, [0, 2], reshape=True)[0], "first")
maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(0, 2)).eval()
assert (maps.feature_info.channels(), maps.feature_info.reduction()) == ([32, 32], [16, 16])
for got, name in zip(maps(images), ("first", "third"), strict=True):
    same(got, name)
data = timm.data.resolve_data_config(model=model)
assert (data["input_size"], data["mean"], data["crop_mode"]) == ([3, 64, 64], [0.4, 0.5, 0.6], "squash")
adapted = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=96, in_chans=1, num_classes=0).eval()
same(adapted(grey), "adapted")
model.set_input_size((96, 96))
same(model.forward_features(large), "large", rtol=1e-5, atol=1e-5)
names = [f"vim_{size}_patch{side}_224" for size, side in
         (("base", 16), ("huge", 14), ("large", 16), ("small", 16), ("tiny", 16))]
assert timm.list_models("vim_*_patch*") == names
fresh = timm.create_model(names[-1], depth=1, img_size=32, in_chans=2, num_classes=7, drop_rate=0.0)
assert fresh(torch.rand(1, 2, 32, 32)).shape == (1, 7)
assert list(fresh.default_cfg["input_size"]) == [2, 32, 32]
assert fresh.embed_dim == 192
same(timm.create_model("vim", pretrained=True, pretrained_cfg_overlay={"file": f"{folder}/model.safetensors"},
                       d_model=32, depth=3, img_size=64, num_classes=5).eval()(images), "logits")
for options in ({"widht": 3}, {"drop_rate": 0.1}):
    try:
        timm.create_model("vim", d_model=32, depth=1, **options)
        raise AssertionError(options)
    except vim_backbone.UserError as error:
        assert next(iter(options)) in str(error)
"""
TRANSFORMERS = """
import huggingface_hub
import transformers
import vim_backbone.transformers
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import UperNetConfig, UperNetForSemanticSegmentation
from vim_backbone.transformers import VimBackbone

out = sys.argv[3]
config = AutoConfig.from_pretrained(folder)
assert (config.model_type, config.hidden_size, config.num_labels, config.num_channels) == ("vim", 32, 5, 3)
for name in (folder, "someone/vim"):
    output = AutoModel.from_pretrained(name)(images)
    same(output.last_hidden_state, "tokens")
    same(output.pooler_output, "pooled")
classifier = AutoModelForImageClassification.from_pretrained(folder)
output = classifier(images, labels=torch.tensor([1, 2]))
same(output.logits, "logits")
expected = torch.nn.functional.cross_entropy(want["logits"], torch.tensor([1, 2]))
torch.testing.assert_close(output.loss, expected)
huggingface_hub.HfApi.repo_exists = lambda self, name: True  # AutoBackbone asks the network, even for what it has
for backbone in (AutoBackbone.from_pretrained("someone/vim", out_indices=[0, 1, 3]),
                 VimBackbone.from_pretrained(folder, out_features=["stem", "stage1", "stage3"])):
    stem, *maps = backbone(images).feature_maps
    assert (stem.shape, backbone.channels) == ((2, 32, 4, 4), [32] * 3)
    for got, name in zip(maps, ("first", "third"), strict=True):
        same(got, name)
streams = AutoModel.from_pretrained(folder)(images, output_hidden_states=True).hidden_states
same(streams[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4)), "first")
pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
same(pixels, "pixels", rtol=0, atol=1e-5)
try:
    AutoImageProcessor.from_pretrained(f"{out}/bands")
    raise AssertionError("bands")
except vim_backbone.UserError as error:
    assert "takes bands [1] of files" in str(error)
upernet = UperNetForSemanticSegmentation(UperNetConfig(
    backbone_config=VimBackbone.from_pretrained(folder, out_indices=[1, 2, 3]).config,
    num_labels=4, use_auxiliary_head=False, pool_scales=[1, 2], hidden_size=16))
assert upernet.backbone.__class__ is VimBackbone
assert upernet(images).logits.shape == (2, 4, 64, 64)
upernet.save_pretrained(f"{out}/upernet")
again = UperNetForSemanticSegmentation.from_pretrained(f"{out}/upernet").eval()
torch.testing.assert_close(again(images).logits, upernet.eval()(images).logits)
classifier.save_pretrained(f"{out}/classifier")
AutoModel.from_pretrained(folder).save_pretrained(f"{out}/model")
for saved in ("classifier", "model"):
    pixels = AutoImageProcessor.from_pretrained(f"{out}/{saved}")(image, return_tensors="pt")["pixel_values"]
    same(pixels, "pixels", rtol=0, atol=1e-5)
    assert vim_backbone.load(f"{out}/{saved}")[1].preprocessing.mean == (0.4, 0.5, 0.6)
fresh = AutoModelForImageClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
assert fresh(images).logits.shape == (2, 7)
assert 0.01 < fresh.vim.head.weight.std() < 0.03
drawn = AutoModel.from_config(config)
assert abs(drawn.vim.layers[0].mixer.D.mean() - 1) < 1e-6  # drawn by the backbone, not by transformers
for broken, words in (("lacking", "lacks A_log of Mixer"), ("headless", "no classifier: give num_labels")):
    try:
        AutoModelForImageClassification.from_pretrained(f"{out}/{broken}")
        raise AssertionError(broken)
    except vim_backbone.UserError as error:
        assert words in str(error), error
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A published folder, the same in the Hub's cache, and what vim_backbone makes of pictures."""
    place = tmp_path_factory.mktemp("doors")
    torch.manual_seed(0)
    model = create_model("vim_tiny", d_model=32, depth=3, img_size=64, num_classes=5).eval()
    folder = model.save_pretrained(place / "published", mean=(0.4, 0.5, 0.6))
    cached = place / "cache/models--someone--vim"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    images, grey, large = torch.rand(2, 3, 64, 64), torch.rand(1, 1, 96, 96), torch.rand(1, 3, 96, 96)
    image = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8)
    with torch.no_grad():
        tokens, (first, _, third) = model.forward_intermediates(images)
        want = {
            "image": image, "images": images, "grey": grey, "large": model.forward_features(large),
            "logits": model(images), "tokens": tokens, "first": first, "third": third,
            "pooled": model.forward_head(tokens, pre_logits=True), "pixels": load(folder, size=64)[1](image),
            "adapted": from_pretrained(folder, img_size=96, in_chans=1, num_classes=0)(grey),
        }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in want.items()} | {"large_pictures": large}, place / "want")
    (place / "out").mkdir()
    without = {name: t for name, t in model.state_dict().items() if name != "layers.1.mixer.A_log"}
    save_file(without, shutil.copytree(folder, place / "out/lacking") / "model.safetensors", {"format": "pt"})
    create_model("vim_tiny", d_model=32, depth=1, img_size=32, num_classes=0).save_pretrained(place / "out/headless")
    bands = Preprocessing(mean=(0.5,), std=(0.5,), bands=(1,), dtype="uint16", range=((0.0,), (1000.0,)))
    one = create_model("vim_tiny", d_model=32, depth=1, img_size=32, num_classes=0, in_chans=1)
    one.save_pretrained(place / "out/bands", preprocessing=bands)
    return place


def through(place, code):
    argv = [sys.executable, "-c", PREAMBLE + code, place / "published", place / "want", place / "out"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    settings = os.environ | {"HF_HUB_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=settings, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]


def test_timm(place):
    through(place, TIMM)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers(place):
    through(place, TRANSFORMERS)
    images = torch.rand(1, 3, 64, 64)
    want = from_pretrained(place / "published")
    with torch.no_grad():  # what transformers saved is a backbone's folder again
        torch.testing.assert_close(from_pretrained(place / "out/classifier")(images), want(images))
        bare = from_pretrained(place / "out/model")
        torch.testing.assert_close(bare.forward_features(images), want.forward_features(images))
    assert bare.num_classes == 0
    saved = json.loads((place / "out/classifier/config.json").read_text())
    assert saved["pretrained_cfg"]["mean"] == [0.4, 0.5, 0.6]
    assert saved["model_args"]["d_model"] == 32
