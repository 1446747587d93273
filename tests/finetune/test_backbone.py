"""Which parameter learns at which rate, and what a backbone becomes when it is taken up."""

import json
import shutil

import pytest
import torch

from finetune.backbone import layer_scales, read_backbone
from finetune.classification.model import Classifier
from finetune.config import BackboneConfig, FinetuneOptim
from launch.run.optim import build_optimizer, set_learning_rate
from vim_backbone import UserError, VimConfig, VisionMamba, from_pretrained
from vim_backbone.hub import find_backbone


def classifier(depth):
    return Classifier(VimConfig(d_model=32, depth=depth, img_size=(32, 32), patch_size=8, num_classes=5))


def test_only_pretraining_counts_what_fits():
    with pytest.raises(UserError, match=r"model.recompute is 'auto': only pretraining counts .* choose none, inputs"):
        BackboneConfig(recompute="auto")


def by_layer(scales):
    """Stem, each block, final norm, head -> the one scale that all its parameters have."""
    by_key = {}
    for name, scale in scales.items():
        parts = name.removeprefix("backbone.").split(".")
        key = int(parts[1]) if parts[0] == "layers" else {"norm_f": "norm", "head": "head"}.get(parts[0], "stem")
        assert by_key.setdefault(key, scale) == scale, name
    return by_key


def test_half_rate_layer_decay():
    """decay ** ceil((num_layers - i) / 2) with num_layers = depth + 1, the stem being i = 0 and block k i = k + 1."""
    model = classifier(5)
    scales = by_layer(layer_scales(model, model.backbone, FinetuneOptim(layer_decay=0.5)))
    assert scales == {"stem": 0.5**3, 0: 0.5**3, 1: 0.5**2, 2: 0.5**2, 3: 0.5, 4: 0.5, "norm": 1.0, "head": 1.0}


def test_full_rate_layer_decay_as_mae():
    model = classifier(3)
    scales = by_layer(layer_scales(model, model.backbone, FinetuneOptim(layer_decay=0.5, half_rate=False)))
    assert scales == {"stem": 0.5**4, 0: 0.5**3, 1: 0.5**2, 2: 0.5, "norm": 1.0, "head": 1.0}


def test_every_parameter_is_in_one_group_with_its_rate_and_decay():
    model = classifier(2)
    optim = FinetuneOptim(layer_decay=0.5, base_lr=1e-3, weight_decay=0.3)
    scales = layer_scales(model, model.backbone, optim)
    optimizer = build_optimizer(model, optim, 256, scales.__getitem__)
    set_learning_rate(optimizer, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert groups.keys() == set(names.values())
    assert groups["backbone.patch_embed.proj.weight"] == (pytest.approx(0.1 * 0.25), 0.3)
    assert groups["backbone.pos_embed"] == (pytest.approx(0.1 * 0.25), 0.0)
    assert groups["backbone.cls_token"] == (pytest.approx(0.1 * 0.25), 0.0)
    assert groups["backbone.layers.1.mixer.in_proj.weight"] == (pytest.approx(0.1 * 0.5), 0.3)
    assert groups["backbone.layers.1.mixer.A_log"] == (pytest.approx(0.1 * 0.5), 0.0)
    assert groups["backbone.layers.1.mixer.conv1d.bias"] == (pytest.approx(0.1 * 0.5), 0.0)
    assert groups["backbone.norm_f.weight"] == (pytest.approx(0.1), 0.0)
    assert groups["backbone.head.weight"] == (pytest.approx(0.1), 0.3)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("steps", [0.5, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [0.5, 1.0, 1.0, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]),
    ],
)
def test_schedules(schedule, rates):
    optim = FinetuneOptim(base_lr=1.0, warmup_steps=2, schedule=schedule, milestones=[0.5, 0.8])
    assert [optim.rate(step, 256, 10) for step in range(10)] == pytest.approx(rates, rel=1e-4)


def test_another_size_and_stride_go_through_the_positions(backbone):
    config = BackboneConfig(img_size=(32, 48), stride=4, drop_path_rate=0.3, global_pool="avg")
    loaded = read_backbone(backbone, config, seed=0, num_classes=7)
    model = VisionMamba(loaded.config)
    loaded.put_into(model)
    assert model.grid_size == (7, 11)
    expected = from_pretrained(backbone, img_size=(32, 48), stride=4).state_dict()
    torch.testing.assert_close({k: v for k, v in model.state_dict().items() if not k.startswith("head")}, expected)
    assert (loaded.config.drop_path_rate, loaded.config.global_pool) == (0.3, "avg")
    assert model(torch.rand(2, 3, 32, 48)).shape == (2, 7)


def test_the_fresh_head_and_fresh_weights_are_those_of_the_seed(backbone):
    for scratch in (False, True):
        config = BackboneConfig(from_scratch=scratch)
        a, b, c = (read_backbone(backbone, config, seed, 4).tensors for seed in (1, 1, 2))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert not torch.equal(a["head.weight"], c["head.weight"])
        same = torch.equal(a["layers.0.mixer.in_proj.weight"], from_pretrained(backbone).layers[0].mixer.in_proj.weight)
        assert same is not scratch


def test_a_backbone_that_is_not_there(tmp_path, monkeypatch):
    assert find_backbone(str(tmp_path)) == tmp_path
    assert find_backbone("runs/pretrain/backbone").parts[-1] == "backbone"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no-such/thing is no folder here, and the Hub .* without a network, give a"):
        find_backbone("no-such/thing")


def test_a_backbone_on_the_hub(backbone, tmp_path, monkeypatch):
    names = []

    def download(name, allow_patterns, revision):
        names.append(name)
        for pattern in allow_patterns:
            shutil.copy(backbone / pattern, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    tensors = read_backbone(find_backbone("someone/vim"), BackboneConfig(), seed=0, num_classes=0).tensors
    assert names == ["someone/vim"]
    torch.testing.assert_close(tensors, from_pretrained(backbone).state_dict(), rtol=0, atol=0)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name))
    with pytest.raises(UserError, match=r"someone/official on the Hub has no config.json: the official weights go thr"):
        find_backbone("someone/official")


def test_a_folder_of_another_width(backbone, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_model": 48}))
    with pytest.raises(UserError, match=r"wide/model.safetensors: .* is \(32, .*\), config.json wants .*48") as caught:
        read_backbone(folder, BackboneConfig(), seed=0, num_classes=3)
    assert "\n" not in str(caught.value)
