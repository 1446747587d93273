"""Inference takes little memory: what is live at the peak of a forward pass, in bytes a token, and that it stays right.

Bytes are counted with the kernels left out, which allocate nothing (on a GPU with them). The budgets are those that
docs/kernels-memory.md derives for Vim-Ti in bfloat16.
"""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import peak_allocated
from vim_backbone import VisionMamba
from vim_backbone.block import Block
from vim_backbone.config import named_config
from vim_backbone.vim import PatchEmbed
from vim_kernels import ScanWeights, available_backends, bidirectional_scan, less_memory, use_backend

plan = pytest.importorskip("vim_kernels.triton_backend.plan", reason="Triton is not installed")
from vim_kernels.triton_backend import conv, mixer, norm, recurrence  # noqa: E402 - after the check that Triton is there

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, N, R = 32, 16, 2


def draw(*shape):
    return 0.4 * torch.randn(*shape, device=DEVICE)


def weights():
    shapes = ScanWeights((D, 4), (D,), (R + 2 * N, D), (D, R), (D,), (D, N), (D,))  # pyright: ignore
    return ScanWeights(*(draw(*shape) for shape in shapes))


@pytest.mark.parametrize("backend", ["triton", "cpu", "torch", "reference"])
@pytest.mark.parametrize("gated", [True, False])
def test_overwriting_gives_the_same_bits(backend, gated):
    if reason := available_backends(DEVICE)[backend]:
        pytest.skip(reason)
    xz, two = draw(3, 21, 2 * D if gated else D), (weights(), weights())
    want = bidirectional_scan(xz, *two, gated=gated, backend=backend)
    inputs = xz.clone()
    with torch.no_grad():
        got = bidirectional_scan(inputs, *two, gated=gated, overwrite=True, backend=backend)
    assert torch.equal(got, want)
    assert (got.data_ptr() == inputs.data_ptr()) == (backend == "triton")


def test_overwriting_waits_until_nothing_is_differentiated():
    xz, two = draw(1, 9, 2 * D).requires_grad_(), (weights(), weights())
    before = xz.detach().clone()
    bidirectional_scan(xz, *two, overwrite=True, backend="triton").sum().backward()
    assert torch.equal(xz, before)


def test_slices_of_a_batch_give_the_same_numbers(monkeypatch):
    xz, two = draw(3, 21, 2 * D), (weights(), weights())
    whole = bidirectional_scan(xz, *two, backend="triton")
    calls = []
    monkeypatch.setattr(plan, "slices", lambda *inputs: calls.append(inputs) or 2)
    torch.testing.assert_close(bidirectional_scan(xz, *two, backend="triton"), whole, rtol=1e-5, atol=1e-6)
    assert calls


@pytest.mark.parametrize(
    ("batch", "length", "channels", "slices", "tight"),
    [
        (64, 6085, 384, 1, 2),  # 768 blocks of 32 channels, twice, for 132 multiprocessors: they all run at once
        (128, 6085, 384, 2, 4),
        (64, 6085, 768, 2, 2),
        (512, 197, 384, 1, 1),  # kernels of less than a millisecond: more launches would cost more than memory is worth
        (1, 6085, 384, 1, 1),
    ],
)
def test_slices_leave_the_chip_full(batch, length, channels, slices, tight):
    rows = plan.Tokens(batch * length, length, batch, None, plan.INTERVAL)
    assert plan.slices(rows, channels, processors=132) == slices
    with less_memory():
        assert plan.slices(rows, channels, processors=132) == tight
    assert plan.slices(rows._replace(cu_seqlens=torch.tensor([0, batch * length])), channels, processors=132) == 1


def peak(model, pixels):
    """Bytes at the peak of a forward pass of two pictures, and tokens."""
    images = torch.randn(2, 3, pixels, pixels, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad(), use_backend("triton"):
        if DEVICE == "cuda":
            model(images)  # the workspaces of libraries stay
            requested = "requested_bytes.all."  # what is allocated is rounded up, by as much as a megabyte a tensor
            idle = torch.cuda.memory_stats()[requested + "current"]
            torch.cuda.reset_peak_memory_stats()
            model(images)
            most = torch.cuda.memory_stats()[requested + "peak"] - idle
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                model(images)
            most = peak_allocated(profiled)
    return most, 2 * ((pixels // 16) ** 2 + 1)


@pytest.mark.parametrize(("slices", "budget"), [(1, 5632), (2, 3968)])
def test_a_token_of_vim_tiny_takes_no_more_than_the_budget(slices, budget, monkeypatch):
    if DEVICE == "cpu":
        for module in (mixer, recurrence, conv, norm):
            monkeypatch.setattr(module, "launch", lambda *_, **__: None)
        # as on a GPU: for the convolution PyTorch takes 1.6 GB at 1024 pixels where the processor has AMX
        monkeypatch.setattr(PatchEmbed, "forward", PatchEmbed.as_product)
    monkeypatch.setattr(plan, "slices", lambda *_: slices)
    monkeypatch.setattr(plan, "FORWARD_FEW", 0)  # no chunks, which a GPU would cut two pictures into
    model = VisionMamba(named_config("vim_tiny", depth=3)).to(DEVICE, torch.bfloat16)
    (few, tokens_few), (many, tokens_many) = peak(model, 512), peak(model, 1024)
    assert 0.9 * budget < (many - few) / (tokens_many - tokens_few) <= 1.001 * budget


def test_hooks_see_whole_values():
    """Memory of what a hook may have kept is not used again."""
    torch.manual_seed(0)
    model = VisionMamba(named_config("vim_tiny", d_model=16, depth=2, img_size=(32, 32))).to(DEVICE)
    images, outputs = torch.randn(1, 3, 32, 32, device=DEVICE), []

    def keep(module: nn.Module, inputs: tuple, out: torch.Tensor) -> None:
        outputs.extend(
            (t, t.clone())
            for t in (*inputs, *(out if isinstance(out, tuple) else [out]))
            if isinstance(t, torch.Tensor)
        )

    with torch.no_grad(), use_backend("triton"):
        plain = model(images)
        for module in model.modules():
            if isinstance(module, (nn.Linear, Block)):
                module.register_forward_hook(keep)
        assert torch.equal(model(images), plain)
    assert len(outputs) > 8
    assert all(torch.equal(tensor, then) for tensor, then in outputs)


def test_a_model_traced_without_gradients_gives_the_same():
    torch.compiler.reset()  # sizes seen before would be traced as unknowns, which PyTorch 2.11 cannot sort by
    torch.manual_seed(0)
    model = VisionMamba(named_config("vim_tiny", d_model=16, depth=2, img_size=(32, 32)))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images), want)
        assert torch.equal(torch.export.export(model, (images,)).module()(images), want)
