"""The custom ops under PyTorch's own machinery on CPU tensors: opcheck, compile, export, autocast, checkpointing."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import vim_kernels
from tests.kernels.pooled_cases import draw_picture, lines_of
from vim_kernels import ScanWeights, add_rms_norm, available_backends, bidirectional_scan, causal_conv1d
from vim_kernels import selective_scan as scan
from vim_kernels.dispatch.library import fingerprint

BACKENDS = [name for name in ("cpu", "torch") if available_backends()[name] is None]
D, N, R = 16, 4, 2
library = torch.ops.vim_kernels
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def draw(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (0.4 * torch.randn(*shape, generator=generator)).requires_grad_(grad)


def weights(seed=0):
    shapes = ScanWeights((D, 4), (D,), (R + 2 * N, D), (D, R), (D,), (D, N), (D,))  # pyright: ignore
    return ScanWeights(*(draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)))


def cu(*borders):
    return torch.tensor(borders, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    borders, b, l = (cu(0, 2, 5), 1, 5) if packed else (None, 2, 5)
    x, bc = draw(b, l, D), draw(b, l, N, seed=1)
    gaps = torch.arange(1.0, 1 + 2 * b * l).view(2, b, l)
    A, state, xz = -draw(D, N, grad=False).exp(), draw(2, D, N), draw(b, l, 2 * D)
    pictures = (
        [draw_picture(1, 2), draw_picture(3, 2, 3)] if packed else [draw_picture(2, 3, 5, seed=i) for i in (0, 1)]
    )
    lines = lines_of(pictures, by_column=packed, packed=packed)
    cases = [
        (library.selective_scan, (x, x, A, bc, bc, draw(D), x, draw(D), borders, state, True, packed, backend, True)),
        (library.selective_scan, (x, x, A, bc, bc, None, None, None, borders, None, True, True, backend, True)),
        (library.bidirectional_scan, (xz, *weights(), *weights(9), borders, None, True, True, backend, True)),
        (library.bidirectional_scan, (x, *weights(), *weights(9), borders, gaps, False, False, backend, True)),
        (library.pooled_scan, (xz, *weights(), *weights(9), *lines, draw(D), draw(D, seed=5), 1e-5, backend, True)),
        (library.pooled_scan, (xz, *weights(), *weights(9), *lines, None, None, 1e-5, backend, True)),
        (library.causal_conv1d, (x, draw(D, 4), draw(D), borders, "silu", packed, backend)),
        (library.causal_conv1d, (x, draw(D, 3), None, borders, None, packed, backend)),
        (library.add_rms_norm, (x, draw(b, l, D, seed=3), draw(D), 1e-5, backend)),
        (library.add_rms_norm, (x, None, draw(D), 1e-5, backend)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments, test_utils=CHECKS)


class Layer(nn.Module):
    """All four public ops in a row."""

    def __init__(self, recompute="inputs"):
        super().__init__()
        self.recompute = recompute
        self.norm, self.taps = nn.Parameter(torch.ones(D)), nn.Parameter(draw(D, 4))
        self.into, self.forwards, self.backwards = (
            nn.Linear(D, 2 * D),
            *(nn.ParameterList(nn.Parameter(t.detach()) for t in weights(seed)) for seed in (10, 20)),
        )
        self.A, self.B = nn.Parameter(-draw(D, N).exp().detach()), nn.Linear(D, N)

    def forward(self, x):
        h, residual = add_rms_norm(x, None, self.norm)
        forward, backward = ScanWeights(*self.forwards), ScanWeights(*self.backwards)
        h = bidirectional_scan(self.into(h), forward, backward, recompute=self.recompute)
        h = causal_conv1d(h, self.taps, reverse=True)
        state = self.B(h)
        return scan(h, h.abs(), self.A, state, state, z=h, dt_softplus=True).float() + residual


def gradients(model, run, x):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def assert_same(got, want, tolerance=2e-5):
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= tolerance * w.norm().clamp(min=1e-6)


def test_compiled_without_a_graph_break_at_two_lengths():
    model = Layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (9, 14):
        x = draw(2, length, D)
        assert_same(gradients(model, compiled, x), gradients(model, model, x))


def test_a_compiled_training_step_scans_forwards_once():
    """What Dynamo tells of gradients and of exporting decides what an op saves; unsaved, its backward scans again."""
    model = Layer()
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), draw(2, 9, D)
    gradients(model, compiled, x)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        gradients(model, compiled, x)
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts["vim_kernels::bidirectional_scan_backward"] == counts["vim_kernels::bidirectional_scan"] == 1
    assert counts["vim_kernels::selective_scan_backward"] == counts["vim_kernels::selective_scan"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_states_made_again_are_not_kept_by_a_compiled_step(backend):
    """The forward op runs once in each pass, with either of the partitioners that decide what compiled code keeps."""
    kept, model, x = {}, Layer("states"), draw(2, 70, D)
    for recompute in ("inputs", "states"):
        layer = Layer(recompute)
        layer.load_state_dict(model.state_dict())
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        gradients(layer, compiled, x)
        shapes = kept.setdefault(recompute, [])
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, into=shapes: into.append(t) or t, lambda t: t),
            profile(activities=[ProfilerActivity.CPU]) as profiled,
        ):
            got = gradients(layer, compiled, x)
        counts = {event.key: event.count for event in profiled.key_averages()}
        assert counts["vim_kernels::bidirectional_scan"] == (2 if recompute == "states" else 1)
        assert counts["vim_kernels::bidirectional_scan_backward"] == 1
        for a, b in zip(got, gradients(model, model, x), strict=True):
            torch.testing.assert_close(a, b)
    sizes = {recompute: sum(t.untyped_storage().nbytes() for t in kept[recompute]) for recompute in kept}
    assert sizes["states"] < sizes["inputs"]


def test_exported_for_any_length():
    model = Layer().eval()
    with torch.no_grad():
        dynamic = {"x": {1: torch.export.Dim("length", min=2, max=64)}}
        program = torch.export.export(model, (draw(2, 9, D, grad=False),), dynamic_shapes=dynamic)
        for length in (9, 33):
            x = draw(2, length, D, grad=False)
            assert_same([program.module()(x)], [model(x)])


def test_autocast_gives_bfloat16_tokens_and_float32_gradients():
    model, x = Layer(), draw(2, 40, D)
    exact = gradients(model, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        h, residual = add_rms_norm(model.into(x)[..., :D], None, model.norm)
        assert (h.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
        xz = model.into(h)
        assert bidirectional_scan(xz, ScanWeights(*model.forwards), ScanWeights(*model.backwards)).dtype == xz.dtype
        rough = gradients(model, model, x)
    assert all(g.dtype == w.dtype == torch.float32 for g, w in zip(rough, exact, strict=True))
    assert_same(rough, exact, tolerance=0.1)
    assert not torch.equal(rough[0], exact[0])


def test_checkpointing_recomputes_the_same_gradients():
    model, x = Layer(), draw(2, 40, D)
    again = gradients(model, lambda t: checkpoint(model, t, use_reentrant=False), x)
    for g, w in zip(again, gradients(model, model, x), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_op_that_did_not_save_can_still_be_differentiated(backend):
    """save=False is how inference calls the ops; autograd then runs the forward again."""
    xz, *parameters = draw(2, 37, 2 * D), *weights(), *weights(9)
    calls = []
    for save in (False, True):
        y = library.bidirectional_scan(xz, *parameters, None, None, True, False, backend, save)[0]
        calls.append(torch.autograd.grad(y.square().sum(), [xz, *parameters]))
    for a, b in zip(*calls, strict=True):
        assert torch.equal(a, b)


def test_compiled_graphs_on_disk_are_of_this_version_of_the_ops(tmp_path):
    package = Path(vim_kernels.__file__).parent
    assert fingerprint(package) in torch.compiler.config.cache_key_tag
    assert torch.backends.cpu.get_cpu_capability() in torch.compiler.config.cache_key_tag
    copy = shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    assert fingerprint(copy) == fingerprint(package)
    contract = copy / "dispatch" / "contract.py"
    contract.write_text(contract.read_text() + "\n")
    assert fingerprint(copy) != fingerprint(package)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_an_error_and_never_zero(backend):
    x, bc, A, xz = draw(2, 5, D), draw(2, 5, N, seed=1), -draw(D, N, grad=False).exp(), draw(2, 5, 2 * D)
    for y, given in (
        (scan(x, x, A, bc, bc, backend=backend), x),
        (bidirectional_scan(xz, weights(), weights(9), backend=backend), xz),
        (causal_conv1d(x, draw(D, 4), None, backend=backend), x),
        (add_rms_norm(x, None, draw(D), backend=backend)[0], x),
    ):
        (gradient,) = torch.autograd.grad(y.sum(), given, create_graph=True)
        with pytest.raises(RuntimeError, match="autograd"):
            (y.sum() + gradient.square().sum()).backward()
