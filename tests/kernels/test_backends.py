"""Every fast backend against the float64 reference: values and gradients of every op.

Triton runs on the GPU where there is one, else on CPU tensors in its interpreter (see tests/conftest.py).
"""

import itertools

import pytest
import torch

from vim_kernels import ScanWeights, add_rms_norm, available_backends, bidirectional_scan, causal_conv1d, selective_scan

DEVICES = {"cpu": "cpu", "torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
BACKENDS = [name for name, device in DEVICES.items() if available_backends(device)[name] is None]
VALUE, GRADIENT = 2e-6, 5e-6  # float32: relative RMS error; gradients sum over tokens and channels
LOW_VALUE, LOW_GRADIENT = 6e-3, 1.5e-2  # 16-bit
INTERPRETED = DEVICES["triton"] == "cpu"  # its bfloat16 stores truncate instead of rounding to nearest
BORDERS = {2: [0, 1, 2], 7: [0, 3, 4, 7], 33: [0, 1, 17, 33], 65: [0, 64, 65], 130: [0, 31, 33, 97, 130]}

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_close(got, want, tolerance, name=""):
    assert got.shape == want.shape, name
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = (got - want).norm() / want.norm().clamp(min=1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance}"


def compare(op, tensors, backend, dtype=torch.float32, value=VALUE, gradient=GRADIENT):
    """Outputs and gradients of op(tensors, backend) in `dtype` against the reference in float64 on the same inputs."""
    rounded = {k: None if t is None else t.to(dtype if k in LOW else torch.float32) for k, t in tensors.items()}
    device = DEVICES[backend]
    fast = {k: None if t is None else t.detach().clone().to(device).requires_grad_() for k, t in rounded.items()}
    exact = {k: None if t is None else t.double().requires_grad_() for k, t in rounded.items()}
    got, want = op(fast, backend), op(exact, "reference")
    weights = [draw(*w.shape, seed=77) for w in want]
    for g, w, output in zip(got, want, weights, strict=True):
        torch.autograd.backward(g, output.to(g), retain_graph=True)
        if w.requires_grad:  # the reference's final state of no tokens does not
            torch.autograd.backward(w, output.to(g.dtype).double(), retain_graph=True)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(g, w, value, f"output {i}")
    for name, tensor in fast.items():
        if tensor is not None:
            assert tensor.grad.dtype == tensor.dtype
            expected = exact[name].grad  # None where the reference never touches it: no tokens
            assert_close(tensor.grad, torch.zeros_like(tensor) if expected is None else expected, gradient, name)


LOW = {"x", "dt", "B", "C", "z", "xz"}
"""Inputs that come in the dtype of the tokens; weights and states stay in float32."""


def scan_tensors(b, l, d, n, *, options=True, states=0):
    inputs = {
        "x": draw(b, l, d),
        "dt": draw(b, l, d, seed=1),
        "A": -draw(d, n, seed=2).exp(),
        "B": draw(b, l, n, seed=3),
        "C": draw(b, l, n, seed=4),
    }
    names = ("D", "z", "dt_bias")
    shapes = ((d,), (b, l, d), (d,))
    inputs |= {k: draw(*s, seed=5 + i) if options else None for i, (k, s) in enumerate(zip(names, shapes, strict=True))}
    return inputs | {"h0": draw(states, d, n, seed=9) if states else None}


def beside(cu_seqlens, x):
    return None if cu_seqlens is None else cu_seqlens.to(x.device)


def run_scan(t, backend, *, cu_seqlens=None, **options):
    t = dict(t)
    options |= {"initial_state": t.pop("h0"), "cu_seqlens": beside(cu_seqlens, t["x"])}
    return selective_scan(**t, return_final_state=True, backend=backend, **options)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 33, 65])
def test_scan(backend, length, reverse):
    tensors = scan_tensors(2, length, 16, 16, states=2)
    compare(lambda t, name: run_scan(t, name, dt_softplus=True, reverse=reverse), tensors, backend)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", list(BORDERS))
def test_scan_packed(backend, length, reverse):
    cu = torch.tensor(BORDERS[length], dtype=torch.int32)
    tensors = scan_tensors(1, length, 16, 16, states=len(cu) - 1)
    compare(lambda t, name: run_scan(t, name, dt_softplus=True, reverse=reverse, cu_seqlens=cu), tensors, backend)


@every_backend
@pytest.mark.parametrize(("d", "n"), [(1, 1), (5, 3), (24, 16), (48, 7), (32, 40)])
def test_scan_of_any_width_without_options(backend, d, n):
    tensors = scan_tensors(2, 37, d, n, options=False)
    tensors["dt"] = tensors["dt"].abs()
    compare(lambda t, name: run_scan(t, name), tensors, backend)


def mixer_tensors(b, l, d, n, r, w, *, gated=True, bias=True):
    tensors = {"xz": draw(b, l, 2 * d if gated else d)}
    for seed, direction in ((10, "f"), (20, "b")):
        tensors |= {
            f"{direction}.conv_weight": draw(d, w, seed=seed),
            f"{direction}.conv_bias": draw(d, seed=seed + 1) if bias else None,
            f"{direction}.x_proj": draw(r + 2 * n, d, seed=seed + 2) / d**0.5,
            f"{direction}.dt_proj": draw(d, r, seed=seed + 3) / r**0.5,
            f"{direction}.dt_bias": draw(d, seed=seed + 4) - 2,
            f"{direction}.A_log": draw(d, n, seed=seed + 5) / 2 + 1,
            f"{direction}.D": draw(d, seed=seed + 6),
        }
    return tensors


def run_mixer(t, backend, *, gated=True, cu_seqlens=None, gaps=None):
    forward, backward = (ScanWeights(**{f: t[f"{q}.{f}"] for f in ScanWeights._fields}) for q in "fb")
    options = {"cu_seqlens": beside(cu_seqlens, t["xz"]), "gaps": beside(gaps, t["xz"])}
    return (bidirectional_scan(t["xz"], forward, backward, gated=gated, backend=backend, **options),)


@every_backend
@pytest.mark.parametrize("length", [1, 2, 33, 65])
def test_mixer(backend, length):
    compare(run_mixer, mixer_tensors(2, length, 32, 16, 12, 4), backend)


def kept_by(run, xz):
    """Gradients of run(xz), and the bytes that autograd keeps for them beside xz and the weights."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, parameters = run(xz)
    known = {t.untyped_storage().data_ptr() for t in (xz, *parameters) if t is not None}
    gradients = torch.autograd.grad(y, (xz, *parameters), torch.linspace(-1, 1, y.numel()).to(y).view(y.shape))
    return [y, *gradients], sum(size for where, size in kept.items() if where not in known)


def check_levels(backend, tensors, run):
    """Levels of recomputation: the same bits of bfloat16 tokens; returns the bytes kept at each."""
    own = {k: None if t is None else t.to(DEVICES[backend], torch.float32).requires_grad_() for k, t in tensors.items()}
    xz = own["xz"].detach().bfloat16().requires_grad_()
    (none, inputs, states), kept = zip(
        *(kept_by(lambda xz, level=level: run(own, xz, level), xz) for level in ("none", "inputs", "states")),
        strict=True,
    )
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(none, inputs, states, strict=True))
    return kept


@every_backend
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_what_is_kept_or_made_again_gives_the_same_bits(backend, gated, packed):
    borders = torch.tensor(BORDERS[33], dtype=torch.int32) if packed else None

    def run(t, xz, recompute):
        forward, backward = (ScanWeights(**{f: t[f"{q}.{f}"] for f in ScanWeights._fields}) for q in "fb")
        cu_seqlens = beside(borders, xz)
        options = {"gated": gated, "cu_seqlens": cu_seqlens, "recompute": recompute, "backend": backend}
        return bidirectional_scan(xz, forward, backward, **options), (*forward, *backward)

    none, inputs, states = check_levels(backend, mixer_tensors(1 if packed else 2, 33, 32, 16, 12, 4, gated=gated), run)
    tables = 4 * 4 * packed  # the borders
    assert states == tables < inputs
    assert (none > inputs) == (backend == "triton")


@every_backend
@pytest.mark.parametrize("length", list(BORDERS))
def test_mixer_packed(backend, length):
    cu = torch.tensor(BORDERS[length], dtype=torch.int32)
    compare(lambda t, name: run_mixer(t, name, cu_seqlens=cu), mixer_tensors(1, length, 32, 16, 12, 4), backend)


@every_backend
@pytest.mark.parametrize(("length", "packed", "gated"), [(7, False, True), (33, True, False), (65, True, True)])
def test_mixer_with_gaps(backend, length, packed, gated):
    cu = torch.tensor(BORDERS[length], dtype=torch.int32) if packed else None
    gaps = draw(2, 1 if packed else 2, length).abs().mul(4).ceil().float()
    options = {"cu_seqlens": cu, "gaps": gaps, "gated": gated}
    tensors = mixer_tensors(gaps.shape[1], length, 32, 16, 12, 4, gated=gated)
    compare(lambda t, name: run_mixer(t, name, **options), tensors, backend)


@every_backend
@pytest.mark.parametrize(("d", "n", "r", "w"), [(3, 2, 1, 1), (24, 16, 5, 3), (40, 5, 2, 6)])
@pytest.mark.parametrize("gated", [True, False])
def test_mixer_of_any_width(backend, d, n, r, w, gated):
    tensors = mixer_tensors(2, 41, d, n, r, w, gated=gated, bias=gated)
    compare(lambda t, name: run_mixer(t, name, gated=gated), tensors, backend)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("d", "w", "activation", "bias"), [(16, 4, "silu", True), (20, 3, None, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_conv(backend, d, w, activation, bias, reverse, packed):
    for length in (1, 7, 33):
        borders = BORDERS.get(length) if packed else None
        cu = None if borders is None else torch.tensor(borders, dtype=torch.int32)
        tensors = {"x": draw(1 if packed else 2, length, d), "weight": draw(d, w), "bias": draw(d) if bias else None}

        def op(t, name, cu=cu):
            borders = beside(cu, t["x"])
            return (causal_conv1d(**t, activation=activation, reverse=reverse, cu_seqlens=borders, backend=name),)

        compare(op, tensors, backend)


@every_backend
@pytest.mark.parametrize("width", [16, 48, 7])
@pytest.mark.parametrize("has_residual", [True, False])
def test_norm(backend, width, has_residual):
    tensors = {"x": draw(2, 5, width), "residual": draw(2, 5, width, seed=1) if has_residual else None}
    tensors["weight"] = draw(width, seed=2)
    compare(lambda t, name: add_rms_norm(**t, backend=name), tensors, backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend, dtype):
    truncates = 4 if backend == "triton" and INTERPRETED else 1
    low = {"dtype": dtype, "value": truncates * LOW_VALUE, "gradient": truncates * LOW_GRADIENT}
    compare(run_mixer, mixer_tensors(2, 65, 48, 16, 12, 4), backend, **low)
    gaps = draw(2, 2, 65).abs().mul(4).ceil().float()
    compare(lambda t, name: run_mixer(t, name, gaps=gaps), mixer_tensors(2, 65, 48, 16, 12, 4), backend, **low)
    compare(lambda t, name: run_scan(t, name, dt_softplus=True), scan_tensors(2, 65, 32, 16), backend, **low)
    conv = {"x": draw(2, 33, 32), "weight": draw(32, 4), "bias": draw(32)}
    compare(lambda t, name: (causal_conv1d(**t, backend=name),), conv, backend, **low)
    norm = {"x": draw(2, 9, 32), "residual": draw(2, 9, 32, seed=1), "weight": draw(32, seed=2)}
    compare(lambda t, name: add_rms_norm(**t, backend=name), norm, backend, **low)


@every_backend
def test_empty_inputs(backend):
    for b, l in ((0, 3), (2, 0)):
        tensors = scan_tensors(b, l, 16, 4, states=b)
        compare(lambda t, name: run_scan(t, name, dt_softplus=True), tensors, backend)
        compare(run_mixer, mixer_tensors(b, l, 16, 4, 2, 4), backend)
        conv = {"x": draw(b, l, 16), "weight": draw(16, 4), "bias": None}
        compare(lambda t, name: (causal_conv1d(**t, backend=name),), conv, backend)
        norm = {"x": draw(b, l, 16), "residual": None, "weight": draw(16)}
        compare(lambda t, name: add_rms_norm(**t, backend=name), norm, backend)


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
def test_bad_dt_stays_in_its_packed_image(backend, bad, reverse):
    borders = [0, 40, 75, 110]
    cu = torch.tensor(borders, dtype=torch.int32, device=DEVICES[backend])
    inputs = {k: None if t is None else t.float().to(cu.device) for k, t in scan_tensors(1, 110, 32, 16).items()}
    inputs.pop("h0")
    clean = selective_scan(**inputs, dt_softplus=True, reverse=reverse, cu_seqlens=cu, backend=backend)
    inputs["dt"][0, 50, 3] = bad
    inputs = {k: t.requires_grad_() for k, t in inputs.items()}
    y = selective_scan(**inputs, dt_softplus=True, reverse=reverse, cu_seqlens=cu, backend=backend)
    affected = slice(40, 51) if reverse else slice(50, 75)
    assert not torch.isfinite(y[0, affected, 3]).any()
    for start, stop in itertools.pairwise(borders):
        if start != 40:
            assert torch.equal(y[0, start:stop], clean[0, start:stop])
    y.sum().backward()
    for start, stop in ((0, 40), (75, 110)):
        assert torch.isfinite(inputs["x"].grad[0, start:stop]).all()


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(("length", "packed"), [(65, False), (130, True)])
def test_triton_in_chunks(backend, length, packed, monkeypatch):
    """A chip that one sequence does not fill: states of chunks, carries between them, then the scan itself."""
    plan = pytest.importorskip("vim_kernels.triton_backend.plan", reason="Triton is not installed")
    monkeypatch.setattr(plan, "processors", lambda device: 1000)
    monkeypatch.setattr(plan, "CARRY_CHUNKS", 2)  # the interpreter takes a minute for the shipped 64
    borders = [0, 64, length] if packed else None
    cu = torch.tensor(borders, dtype=torch.int32) if borders else None
    assert plan.chunk_size(plan.tokens_of(draw(1 if packed else 2, length, 16), cu), 1, 1000, 1.0) == plan.INTERVAL
    for reverse in (False, True):
        scan = scan_tensors(1 if packed else 2, length, 16, 16, states=2)
        options = {"dt_softplus": True, "reverse": reverse, "cu_seqlens": cu}
        compare(lambda t, name, options=options: run_scan(t, name, **options), scan, backend)
    mixer = mixer_tensors(1 if packed else 2, length, 32, 16, 12, 4)
    compare(lambda t, name: run_mixer(t, name, cu_seqlens=cu), mixer, backend)


@pytest.mark.parametrize("backend", ["triton"])
def test_triton_gives_the_same_bits_every_time(backend):
    inputs = {
        k: None if t is None else t.float().to(DEVICES[backend]) for k, t in mixer_tensors(2, 35, 40, 16, 3, 4).items()
    }

    def run():
        leaves = {k: None if t is None else t.clone().requires_grad_() for k, t in inputs.items()}
        (out,) = run_mixer(leaves, backend)
        out.square().sum().backward()
        return [out, *(t.grad for t in leaves.values() if t is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
