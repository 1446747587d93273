"""Next embedding prediction: nothing comes back from what is to be predicted, and the loss is NEPA's, in both ways."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch.run.randomness import generator
from pretrain.causal import apart
from pretrain.nepa.model import NextEmbedding
from vim_backbone import UserError, VimConfig, VisionMamba
from vim_backbone.block import set_recompute
from vim_backbone.memory import LEVELS

SIZES = {"d_model": 32, "depth": 3, "img_size": (32, 48), "patch_size": 8, "num_classes": 0, "position": "sincos"}


def encoder(**changes):
    torch.manual_seed(0)
    return VisionMamba(VimConfig(**(SIZES | changes)))


def pictures(count=2, channels=3, size=(32, 48)):
    return torch.randn(count, channels, *size, generator=generator(1))


def one_network(whole, images, reverse):
    """One direction as a causal network of its own, written out of PyTorch's layers, token by token."""
    weights = dict(whole.state_dict())
    special = whole.cls_token + whole.position_layout.split(whole.pos_embed)[0]
    tokens = whole.layout.join(special.expand(len(images), -1, -1), whole.embed_patches(images))
    stream = tokens = tokens.flip(1) if reverse else tokens
    b = "_b" if reverse else ""

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    for i in range(whole.config.depth):
        w = {n.removeprefix(f"layers.{i}.mixer."): v for n, v in weights.items() if n.startswith(f"layers.{i}.mixer.")}
        x, z = (norm(stream, weights[f"layers.{i}.norm.weight"]) @ w["in_proj.weight"].T).chunk(2, -1)
        d, n = w[f"A{b}_log"].shape
        padded = F.pad(x.transpose(1, 2), (3, 0))
        u = F.silu(F.conv1d(padded, w[f"conv1d{b}.weight"], w[f"conv1d{b}.bias"], groups=d)).transpose(1, 2)
        low, B, C = (u @ w[f"x_proj{b}.weight"].T).split([w[f"dt_proj{b}.weight"].shape[1], n, n], -1)
        dt = F.softplus(low @ w[f"dt_proj{b}.weight"].T + w[f"dt_proj{b}.bias"])
        state, outputs = torch.zeros(len(images), d, n, dtype=x.dtype), []
        for t in range(x.shape[1]):
            decay = torch.exp(-dt[:, t, :, None] * w[f"A{b}_log"].exp())
            state = decay * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            outputs.append((state * C[:, t, None]).sum(-1) + w[f"D{b}"] * u[:, t])
        y = torch.stack(outputs, 1)
        if "scan_norm.weight" in w:
            y = F.layer_norm(y, (d,), w["scan_norm.weight"], w["scan_norm.bias"])
        stream = stream + (y * F.silu(z)) @ w["out_proj.weight"].T
    out = norm(stream, weights["norm_f.weight"])
    return whole.layout.split(out.flip(1) if reverse else out)[1]


@pytest.mark.parametrize("mixer_norm", [False, True])
def test_each_direction_is_a_causal_network_of_its_own(mixer_norm):
    whole = encoder(mixer_norm=mixer_norm).double()
    images = pictures().double()
    with torch.no_grad():
        forward, backward = apart(whole, images)
        torch.testing.assert_close(forward, one_network(whole, images, reverse=False))
        torch.testing.assert_close(backward, one_network(whole, images, reverse=True))


@pytest.mark.parametrize("changes", [{}, {"class_token": "none", "global_pool": "avg"}, {"num_registers": 2}])
@pytest.mark.parametrize("patch", [0, 9, 17, 22])
def test_nothing_comes_back_from_what_is_predicted(patch, changes):
    """The gradient of a patch's output by the pixels of all later ones is zero, exactly; by its own and earlier not."""
    whole = encoder(**changes)
    for direction, sees in enumerate((lambda p: p <= patch, lambda p: p >= patch)):
        images = pictures().requires_grad_()
        apart(whole, images)[direction][0, patch].square().sum().backward()
        touched = images.grad[0].unfold(1, 8, 8).unfold(2, 8, 8).abs().amax(dim=(0, 3, 4)).flatten()
        assert [bool(each) for each in touched > 0] == [sees(p) for p in range(24)]
        assert images.grad[1].abs().max() == 0


def test_the_loss_is_the_cosine_with_the_next_embedding():
    model = NextEmbedding(encoder())
    images = pictures()
    forward, backward = (t.detach().double().numpy() for t in apart(model.encoder, images))
    weight, bias = (p.detach().double() for p in model.encoder.patch_embed.proj.parameters())
    targets = F.conv2d(images.double(), weight, bias, stride=8).flatten(2).transpose(1, 2).numpy()

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    ahead = [cosine(forward[i, p], targets[i, p + 1]) for i in range(2) for p in range(23)]
    back = [cosine(backward[i, p], targets[i, p - 1]) for i in range(2) for p in range(1, 24)]
    assert model(images).item() == pytest.approx(-(np.mean(ahead) + np.mean(back)) / 2, abs=1e-6)


def test_the_target_gets_no_gradient():
    """What the embedding learns it learns as input: of the last patch's nothing by the forward direction."""
    model = NextEmbedding(encoder(class_token="none", global_pool="avg"))
    embedded = []
    model.encoder.patch_embed.register_forward_hook(lambda module, arguments, out: embedded.append(out))
    model(pictures())
    assert sorted(each.requires_grad for each in embedded) == [False, True]


def test_every_trained_parameter_gets_a_gradient():
    model = NextEmbedding(encoder(num_registers=2, mixer_norm=True))
    model(pictures()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["encoder.pos_embed"]
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("channels", ["mixed", "tokens"])
def test_packed_pictures_are_as_if_alone(channels):
    """Values and gradients; every picture counts alike, though one has ten times the patches of another."""
    model = NextEmbedding(encoder(num_registers=2, channels=channels))
    images = [pictures(1, 3, size)[0] for size in [(32, 48), (8, 16), (64, 24), (40, 40)]]
    loss = model(images)
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.stack([model(image[None]) for image in images])
    alone.mean().backward()
    torch.testing.assert_close(loss, alone.mean())
    assert alone.std() > 1e-3
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_where_channels_are_tokens_each_predicts_its_own():
    """Of pictures that lack some, too: the output at a token is compared with its channel at the next place."""
    model = NextEmbedding(encoder(in_chans=4, channels="tokens", channel_sets=((0, 2),)))
    images = pictures(1, 2)
    forward, backward = apart(model.encoder, images)
    targets = model.targets(images).unflatten(1, (24, 2))
    forward, backward = forward.unflatten(1, (24, 2)), backward.unflatten(1, (24, 2))
    ahead = F.cosine_similarity(forward[:, :-1], targets[:, 1:], dim=-1)
    back = F.cosine_similarity(backward[:, 1:], targets[:, :-1], dim=-1)
    torch.testing.assert_close(model(images), -(ahead.mean() + back.mean()) / 2)


def test_all_levels_of_recomputing_give_the_same_gradients():
    gradients = []
    for level in LEVELS:
        model = NextEmbedding(encoder())
        set_recompute(model, level)
        model(pictures()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=0)


def test_compiled_without_a_graph_break():
    model, images = NextEmbedding(encoder(depth=1)), pictures()
    set_recompute(model, "inputs")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(compiled, model(images))
    compiled.backward()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scan": "pooled", "class_token": "none", "global_pool": "avg"}, "set model.scan to full"),
        ({"stride": 4}, "pretrain with stride = patch_size"),
        ({"img_size": (8, 8)}, "needs two patches at least"),
    ],
)
def test_what_cannot_be_predicted_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        NextEmbedding(encoder(**changes))
