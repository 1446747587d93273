"""The official Vim model written again from its equations, slowly and in float64, over an official state dict.

Independent of vim_backbone and vim_kernels: sequences are flipped, states looped over, positions added by hand.
"""

import math

import torch
import torch.nn.functional as F


def random_state(d=192, depth=24, patches=196, patch=16, classes=1000, seed=0):
    """Random weights under the official names, of sizes that keep activations near 1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=g) * std

    e, r, n = 2 * d, math.ceil(d / 16), 16
    state = {
        "cls_token": normal(1, 1, d),
        "pos_embed": normal(1, patches + 1, d),
        "patch_embed.proj.weight": normal(d, 3, patch, patch, std=(3 * patch * patch) ** -0.5),
        "patch_embed.proj.bias": normal(d),
        "head.weight": normal(classes, d, std=d**-0.5),
        "head.bias": normal(classes),
        "norm_f.weight": 1 + normal(d, std=0.1),
    }
    for i in range(depth):
        m = f"layers.{i}.mixer."
        state[f"layers.{i}.norm.weight"] = 1 + normal(d, std=0.1)
        state[m + "in_proj.weight"] = normal(2 * e, d, std=d**-0.5)
        state[m + "out_proj.weight"] = normal(d, e, std=e**-0.5)
        for b in ("", "_b"):
            state[m + f"A{b}_log"] = torch.log(torch.arange(1, n + 1.0)).repeat(e, 1) + normal(e, n, std=0.2)
            state[m + f"D{b}"] = 1 + normal(e, std=0.1)
            state[m + f"conv1d{b}.weight"] = normal(e, 1, 4, std=0.5)
            state[m + f"conv1d{b}.bias"] = normal(e, std=0.2)
            state[m + f"x_proj{b}.weight"] = normal(r + 2 * n, e, std=e**-0.5)
            state[m + f"dt_proj{b}.weight"] = normal(e, r, std=r**-0.5)
            state[m + f"dt_proj{b}.bias"] = normal(e) - 4
    return state


def forward(state, images, stride):
    """Logits of the official model: middle class token, bidirectional v2 mixer, halved sum, final token."""
    w = {k: v.double() for k, v in state.items()}
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=stride)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    x = torch.cat((x[:, :middle], w["cls_token"].expand(len(x), -1, -1), x[:, middle:]), dim=1) + w["pos_embed"]
    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("layers."))
    hidden, residual = x, None
    for i in range(depth):
        residual = hidden if residual is None else residual + hidden
        hidden = mixer(w, f"layers.{i}.mixer.", rms(residual, w[f"layers.{i}.norm.weight"]))
    return F.linear(rms(residual + hidden, w["norm_f.weight"])[:, middle], w["head.weight"], w["head.bias"])


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mixer(w, m, h):
    xz = h @ w[m + "in_proj.weight"].T
    flipped = direction(w, m, "_b", xz.flip(1)).flip(1)
    return ((direction(w, m, "", xz) + flipped) / 2) @ w[m + "out_proj.weight"].T


def direction(w, m, b, xz):
    x, z = xz.chunk(2, dim=-1)
    taps = w[m + f"conv1d{b}.weight"]
    length, channels = x.shape[1:]
    u = F.conv1d(x.transpose(1, 2), taps, w[m + f"conv1d{b}.bias"], padding=3, groups=channels)[..., :length]
    u = F.silu(u).transpose(1, 2)
    rank = w[m + f"dt_proj{b}.weight"].shape[1]
    low, B, C = (u @ w[m + f"x_proj{b}.weight"].T).split((rank, 16, 16), dim=-1)
    dt = F.softplus(low @ w[m + f"dt_proj{b}.weight"].T + w[m + f"dt_proj{b}.bias"])
    A = -w[m + f"A{b}_log"].exp()
    h, out = torch.zeros(len(x), channels, 16, dtype=torch.float64), []
    for t in range(length):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        out.append((h * C[:, t, None, :]).sum(-1))
    return (torch.stack(out, dim=1) + u * w[m + f"D{b}"]) * F.silu(z)
