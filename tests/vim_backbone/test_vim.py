"""The Vim model: sizes, layouts, feature interface, pictures of other shapes, stochastic depth."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.optim._param_groups import param_groups_layer_decay

from vim_backbone import SIZES, UserError, VimConfig, VisionMamba, create_model
from vim_backbone.block import drop_path
from vim_backbone.mixer import Mixer
from vim_backbone.tokens import TokenLayout
from vim_backbone.weights import init_mixer

LAYOUTS = [("middle", 0), ("first", 0), ("none", 0), ("middle", 3), ("first", 2), ("none", 12)]


def small(**changes):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "depth": 3, "img_size": (64, 64), "num_classes": 7}
    return VisionMamba(VimConfig(**(sizes | changes))).eval()


def pictures(height=64, width=64, count=2, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "count"), [("vim_tiny", 7_148_008), ("vim_small", 25_796_584), ("vim_base", 97_598_440)]
)
def test_parameter_counts_of_the_paper(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(model.state_dict()) == 415


@pytest.mark.parametrize("name", SIZES)
def test_every_named_size_can_be_built(name):
    with torch.device("meta"):
        model = create_model(name, num_classes=0, in_chans=1)
    assert len(model.layers) == SIZES[name]["depth"]
    assert model.patch_embed.proj.in_channels == 1


@pytest.mark.parametrize(("class_token", "registers"), LAYOUTS)
@pytest.mark.parametrize("patches", [1, 2, 7, 49, 196])
def test_join_and_split_are_inverse(class_token, registers, patches):
    layout = TokenLayout(class_token, registers)
    special = torch.arange(layout.num_special).view(1, -1, 1) + 1000.0
    tokens = torch.arange(patches).view(1, -1, 1) + 0.0
    joined = layout.join(special, tokens)
    assert [joined[0, slot, 0].item() for slot in layout.slots(patches)] == special[0, :, 0].tolist()
    assert joined[joined < 1000].tolist() == list(range(patches))  # patches keep the scan order
    again_special, again = layout.split(joined)
    assert torch.equal(again_special, special)
    assert torch.equal(again, tokens)


def test_where_special_tokens_sit():
    assert TokenLayout("middle", 0).slots(196) == [98]
    assert TokenLayout("middle", 0).slots(729) == [364]
    assert TokenLayout("first", 0).slots(196) == [0]
    registers = TokenLayout("none", 3).slots(100)
    assert registers == [25, 51, 77]  # runs of 25 patches between them
    assert TokenLayout("middle", 1).slots(10) == [5, 6]


@pytest.mark.parametrize(("class_token", "registers"), LAYOUTS)
def test_every_layout_runs(class_token, registers):
    pool = "avg" if class_token == "none" else "token"
    model = small(class_token=class_token, num_registers=registers, global_pool=pool)
    tokens = model.forward_features(pictures())
    assert tokens.shape == (2, model.num_prefix_tokens + 16, 32)
    assert model(pictures()).shape == (2, 7)
    pooled = tokens[:, 0] if pool == "token" else tokens[:, registers:].mean(1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    torch.testing.assert_close(model(pictures()), F.linear(pooled, model.head.weight, model.head.bias))


def test_without_a_head_the_model_returns_pooled_features():
    model = small(num_classes=0)
    torch.testing.assert_close(model(pictures()), model.forward_features(pictures())[:, 0])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 64), (16, 16), (128, 48)])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_pictures_of_other_shapes(height, width, position):
    model = small(position=position)
    assert model.forward_features(pictures(height, width)).shape == (2, (height // 16) * (width // 16) + 1, 32)


def test_stride_8_overlaps_patches():
    model = small(stride=8)
    assert model.grid_size == (7, 7)
    assert model.forward_features(pictures(72, 64)).shape == (2, 8 * 7 + 1, 32)


@pytest.mark.parametrize(("height", "width", "words"), [(60, 64, "height is 60"), (64, 8, "width is 8")])
def test_sizes_that_the_stride_does_not_divide(height, width, words):
    with pytest.raises(UserError, match=f"image {words} pixels: it must be a multiple of the stride 16"):
        small()(pictures(height, width))


def test_wrong_number_of_channels():
    with pytest.raises(UserError, match="pictures have 3 channels, the backbone wants 1"):
        small(in_chans=1)(pictures())


def test_intermediates_are_the_streams_after_each_block():
    model = small()
    final, streams = model.forward_intermediates(pictures(48, 80))
    torch.testing.assert_close(final, model.forward_features(pictures(48, 80)))
    assert [s.shape for s in streams] == [(2, 32, 3, 5)] * 3
    normed = model.forward_intermediates(pictures(48, 80), indices=1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed.flatten(2).transpose(1, 2), final[:, 1:])  # after the last block: the features
    only = model.forward_intermediates(pictures(48, 80), indices=[0, -2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(only, streams[:2])
    with_prefix = model.forward_intermediates(
        pictures(48, 80), indices=[2], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(with_prefix[0][0], final[:, 1:])
    torch.testing.assert_close(with_prefix[0][1], final[:, :1])
    with pytest.raises(UserError, match="block index 3 is out of range: the model has 3 blocks"):
        model.forward_intermediates(pictures(), indices=[3])


def test_pruning_keeps_the_earlier_features():
    model = small()
    want = model.forward_intermediates(pictures(), indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.layers) == 2
    got = model.forward_intermediates(pictures(), indices=[1], intermediates_only=True)[0]
    assert torch.equal(got, want)


def test_reset_classifier():
    model = small()
    model.reset_classifier(4, global_pool="avg")
    assert model(pictures()).shape == (2, 4)
    assert model.config.num_classes == 4
    assert model.config.global_pool == "avg"
    model.reset_classifier(0)
    assert model(pictures()).shape == (2, 32)


def test_decay_groups_cover_every_parameter_in_depth_order():
    model = small(num_registers=2)
    undecayed = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "register_tokens", "layers.0.mixer.A_log", "layers.2.mixer.D_b"} <= undecayed
    assert not any(n.endswith((".in_proj.weight", "head.weight", "conv1d.weight")) for n in undecayed)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=undecayed, no_opt_scale=None
    )
    name_of = {id(p): n for n, p in model.named_parameters()}
    scale = {name_of[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert scale.keys() == dict(model.named_parameters()).keys()
    by_depth = ["cls_token", "layers.0.norm.weight", "layers.1.mixer.D", "layers.2.mixer.A_log", "head.weight"]
    assert [scale[a] / scale[b] for a, b in itertools.pairwise(by_depth)] == [0.5] * 4
    assert scale["norm_f.weight"] == scale["layers.2.mixer.A_log"]
    decay = {name_of[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decay["layers.0.mixer.A_log"] == 0
    assert decay["layers.0.mixer.in_proj.weight"] == 0.05


def test_stochastic_depth():
    rates = [block.drop_path for block in small(drop_path_rate=0.4, depth=5).layers]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3])  # the full rate is left for the final add
    h = torch.ones(4000, 1, 1)
    dropped = drop_path(h, 0.25, training=True)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert drop_path(h, 0.25, training=False) is h


def test_mixer_norm_normalises_between_scan_and_gate():
    model = small(mixer_norm=True, depth=1)
    mixer = model.layers[0].mixer
    h = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(3))
    outputs = {}
    mixer.scan_norm.register_forward_hook(lambda module, inputs, out: outputs.update(y=out))
    out = mixer(h)
    gate = F.silu(mixer.in_proj(h)[..., 64:])
    torch.testing.assert_close(out, mixer.out_proj(outputs["y"] * gate))
    torch.testing.assert_close(outputs["y"].mean(-1), torch.zeros(1, 9), atol=1e-5, rtol=0)


def test_initial_time_steps_lie_in_their_range():
    torch.manual_seed(0)
    mixer = Mixer(VimConfig(d_model=192, depth=24))
    init_mixer(mixer, depth=24)
    for dt_proj in (mixer.dt_proj, mixer.dt_proj_b):
        dt = F.softplus(dt_proj.bias)
        assert 1e-3 * 0.999 <= dt.min().item() < 2e-3
        assert 5e-2 < dt.max().item() <= 1e-1 * 1.001
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(384, 16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_token": "last"}, "class_token is 'last': choose from middle, first, none"),
        ({"class_token": "none"}, "set global_pool to 'avg'"),
        ({"img_size": (60, 64)}, "height is 60"),
        ({"depth": 0}, "depth is 0: it must be at least 1"),
        ({"drop_path_rate": 1.0}, r"must lie in \[0, 1\)"),
        ({"position": "sincos", "d_model": 30}, "need a multiple of 4"),
    ],
)
def test_configs_that_do_not_fit(changes, words):
    with pytest.raises(UserError, match=words):
        small(**changes)


def test_unknown_names_get_a_hint():
    with pytest.raises(UserError, match="unknown model 'vim_tny': did you mean 'vim_tiny'"):
        create_model("vim_tny")
    with pytest.raises(UserError, match="'strid' is no field of a Vim backbone: did you mean 'stride'"):
        create_model("vim_tiny", strid=8)


@pytest.mark.parametrize("left_open", [0, None])
def test_a_config_holds_numbers_where_a_file_leaves_them_open(left_open):
    """As the papers have them: patches that do not overlap, and a rank of a sixteenth of the width, rounded up."""
    config = VimConfig.from_dict(
        {"d_model": 200, "depth": 1, "patch_size": 14, "stride": left_open, "dt_rank": left_open}
    )
    assert (config.stride, config.dt_rank) == (14, 13)
    assert config.to_dict()["stride"] == 14
