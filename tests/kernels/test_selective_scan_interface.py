"""The names of mamba_ssm: values and gradients beside its equations written out; a model of transformers on them."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vim_kernels.selective_scan_interface import mamba_inner_fn, selective_scan_fn

PAGE = Path(__file__).parents[2] / "docs/kernels-alone.md"
B, D, N, L, R = 2, 6, 3, 11, 2


def scan_written_out(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, borders=()):
    """(b, d, l), in float64: token by token. The state starts anew at each border."""
    u, delta, A, B, C = (t.double() for t in (u, delta, A, B, C))
    delta = delta if delta_bias is None else delta + delta_bias.double()[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    grouped = [t if t.dim() == 4 else t[:, None] for t in (B, C)]
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], dim=1) for t in grouped)
    h, outputs = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        h = h * 0 if t in borders else h
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=2)
    y = y if D is None else y + u * D.double()[:, None]
    return (y if z is None else y * F.silu(z.double())), h


def draw(*shape, seed=0):
    return (0.7 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).requires_grad_()


def assert_same_with_gradients(got, want, inputs):
    pulls = [draw(*t.shape, seed=3).detach() for t in got]
    losses = [sum((t * pull).sum() for t, pull in zip(side, pulls, strict=True)) for side in (got, want)]
    for side in zip(got, want, strict=True):
        torch.testing.assert_close(side[0].double(), side[1].double(), rtol=1e-4, atol=1e-5)
    for pair in zip(*(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_the_scan_with_all_that_it_takes(groups):
    shape = (B, N, L) if groups is None else (B, groups, N, L)
    u, delta, z, b, c = draw(B, D, L), draw(B, D, L, seed=1), draw(B, D, L, seed=2), draw(*shape), draw(*shape, seed=1)
    logs, skip, bias = draw(D, N), draw(D), draw(D, seed=1)
    A = -torch.exp(logs)
    got = selective_scan_fn(u, delta, A, b, c, skip, z, bias, delta_softplus=True, return_last_state=True)
    want = scan_written_out(u, delta, A, b, c, skip, z, bias, delta_softplus=True)
    assert got[1].shape == (B, D, N)
    assert_same_with_gradients(got, want, [u, delta, z, b, c, logs, skip, bias])


def test_the_bare_scan_and_packed_sequences():
    u, delta, b, c, logs = draw(1, D, L), draw(1, D, L, seed=1), draw(1, N, L), draw(1, N, L, seed=1), draw(D, N)
    A, step = -torch.exp(logs), delta.abs()
    assert_same_with_gradients(
        [selective_scan_fn(u, step, A, b, c)], [scan_written_out(u, step, A, b, c)[0]], [u, b, c, logs]
    )
    borders = torch.tensor([0, 4, 5, L], dtype=torch.int32)
    got = selective_scan_fn(u, step, A, b, c, return_last_state=True, cu_seqlens=borders)
    assert_same_with_gradients(got, scan_written_out(u, step, A, b, c, borders=(4, 5)), [u, b, c, logs])


@pytest.mark.parametrize("given", [False, True])
def test_the_inner_function(given):
    """With B and C projected and biased, or given."""
    xz, conv, conv_bias, x_proj = draw(B, 2 * D, L), draw(D, 1, 4), draw(D), draw(R + 2 * N, D)
    dt_proj, out_proj, out_bias, logs, skip, bias = (
        draw(D, R),
        draw(5, D),
        draw(5),
        draw(D, N),
        draw(D, seed=2),
        draw(D, seed=3),
    )
    A = -torch.exp(logs)
    ours = (
        {"B": draw(B, N, L), "C": draw(B, N, L, seed=1)}
        if given
        else {"B_proj_bias": draw(N), "C_proj_bias": draw(N, seed=1)}
    )
    got = mamba_inner_fn(xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D=skip, delta_bias=bias, **ours)
    x, z = xz.double().chunk(2, dim=1)
    u = F.silu(F.conv1d(F.pad(x, (3, 0)), conv.double(), conv_bias.double(), groups=D))
    low, b, c = torch.einsum("pd,bdl->bpl", x_proj.double(), u).split([R, N, N], dim=1)
    b, c = (
        (ours["B"], ours["C"])
        if given
        else (t + ours[name][:, None] for t, name in ((b, "B_proj_bias"), (c, "C_proj_bias")))
    )
    y, _ = scan_written_out(
        u, torch.einsum("dr,brl->bdl", dt_proj.double(), low), A, b, c, skip, z, bias, delta_softplus=True
    )
    want = torch.einsum("bdl,md->blm", y, out_proj.double()) + out_bias
    inputs = [xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, logs, skip, bias, *ours.values()]
    assert_same_with_gradients([got], [want], inputs)


def test_what_is_not_supported_is_refused():
    u, A, b = draw(B, D, L), -draw(D, N).exp(), draw(B, N, L)
    for arguments, words in [
        ((u, u, A, draw(D, N), b), r"B has shape \(6, 3\): only B of every token"),
        ((u, u, A.to(torch.complex64), b, b), "only real A"),
        ((u, u, A, draw(B, 4, N, L), b), "B has 4 groups and C 1, wanted one number that divides 6"),
    ]:
        with pytest.raises(ValueError, match=words):
            selective_scan_fn(*arguments)
    with pytest.raises(ValueError, match="seq_idx is given without cu_seqlens"):
        mamba_inner_fn(draw(B, 2 * D, L), *[u] * 6, A, seq_idx=torch.zeros(B, L).int())


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_transformers_by_the_lines_of_the_page(monkeypatch):
    from transformers import MambaConfig, MambaForCausalLM
    from transformers.models.mamba import modeling_mamba

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
    tokens = torch.randint(0, 40, (2, 13))

    def run():
        with torch.no_grad():
            logits, said = model.eval()(tokens).logits, model.generate(tokens, max_new_tokens=5, do_sample=False)
        model.train().zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return logits, said, [parameter.grad.clone() for parameter in model.parameters()]

    want, calls = run(), []
    for name in ("mamba_selective_scan", "mamba_inner_fn"):
        monkeypatch.setattr(modeling_mamba, name, None)  # given back at the end
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, {})
    for name in ("mamba_selective_scan", "mamba_inner_fn"):
        fast = getattr(modeling_mamba, name)
        monkeypatch.setattr(modeling_mamba, name, lambda *a, f=fast, n=name, **k: calls.append(n) or f(*a, **k))
    got = run()
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)
    assert torch.equal(got[1], want[1])
    for pair in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)
    assert {*calls} == {"mamba_selective_scan", "mamba_inner_fn"}
