"""What the public ops refuse, and how a backend is chosen."""

import pytest
import torch

from vim_kernels import (
    ScanWeights,
    add_rms_norm,
    available_backends,
    bidirectional_scan,
    causal_conv1d,
    selective_scan,
    set_backend,
    use_backend,
)
from vim_kernels.dispatch.choice import choose


def scan(**changed):
    inputs = {"x": torch.ones(1, 6, 4), "dt": torch.ones(1, 6, 4), "A": -torch.ones(4, 2), "B": torch.ones(1, 6, 2),
             "C": torch.ones(1, 6, 2)} | changed  # fmt: skip
    return selective_scan(**inputs)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.ones(1, 6)}, ValueError, r"x has shape \(1, 6\), wanted \(any, any, any\)"),
        ({"dt": torch.ones(1, 5, 4)}, ValueError, r"dt has shape \(1, 5, 4\), wanted \(1, 6, 4\)"),
        ({"A": torch.ones(3, 2)}, ValueError, r"A has shape \(3, 2\), wanted \(4, any\)"),
        ({"B": torch.ones(1, 6, 3)}, ValueError, "B has shape"),
        ({"D": torch.ones(3)}, ValueError, r"D has shape \(3,\), wanted \(4,\)"),
        ({"x": torch.ones(1, 6, 4, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"z": torch.ones(1, 6, 4, device="meta")}, ValueError, "z is on meta, wanted cpu"),
        ({"initial_state": torch.ones(2, 4, 2)}, ValueError, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 6])}, TypeError, "cu_seqlens has dtype torch.int64, wanted int32"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "from 0 to 5, wanted 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 3, 3, 6], dtype=torch.int32)}, ValueError, "must increase"),
        ({"cu_seqlens": torch.tensor([6], dtype=torch.int32)}, ValueError, r"wanted \(images \+ 1,\)"),
        ({"backend": "warp"}, ValueError, "unknown backend 'warp'"),
    ],
)
def test_bad_input_is_named(changed, error, words):
    with pytest.raises(error, match=words):
        scan(**changed)


def mixer(xz=None, backend=None, cu_seqlens=None, **changed):
    shapes = ScanWeights((4, 3), (4,), (6, 4), (4, 2), (4,), (4, 2), (4,))  # pyright: ignore
    good = ScanWeights(*(torch.ones(shape) for shape in shapes))  # pyright: ignore
    xz = torch.ones(1, 6, 8) if xz is None else xz
    return bidirectional_scan(xz, good, good._replace(**changed), cu_seqlens=cu_seqlens, backend=backend)


def conv(x=None, weight=None, **changed):
    x, weight = torch.ones(1, 6, 4) if x is None else x, torch.ones(4, 3) if weight is None else weight
    return causal_conv1d(x, weight, **changed)


def norm(x=None, residual=None, weight=None, **changed):
    return add_rms_norm(torch.ones(2, 4) if x is None else x, residual, torch.ones(4) if weight is None else weight)


@pytest.mark.parametrize(
    ("op", "changed", "error", "words"),
    [
        (scan, {"A": torch.ones(())}, ValueError, r"A has shape \(\), wanted \(4, any\)"),
        (scan, {"dt": torch.ones(1, 6, 4, dtype=torch.int32)}, TypeError, "dt has dtype torch.int32"),
        (scan, {"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)}, ValueError, "from 1 to 6, wanted 0 to 6"),
        (mixer, {"xz": torch.ones(1, 6, 7)}, ValueError, r"xz has shape \(1, 6, 7\), wanted \(any, any, 8\)"),
        (mixer, {"xz": torch.ones(6, 8)}, ValueError, r"xz has shape \(6, 8\)"),
        (mixer, {"xz": torch.ones(1, 6, 8, dtype=torch.int64)}, TypeError, "xz has dtype torch.int64"),
        (mixer, {"A_log": torch.ones(4)}, ValueError, r"backward.A_log has shape \(4,\), wanted \(4, 2\)"),
        (mixer, {"x_proj": torch.ones(5, 4)}, ValueError, r"backward.x_proj has shape \(5, 4\), wanted \(6, 4\)"),
        (mixer, {"dt_proj": torch.ones(4)}, ValueError, r"backward.dt_proj has shape \(4,\), wanted \(4, any\)"),
        (mixer, {"D": torch.ones(3)}, ValueError, r"backward.D has shape \(3,\), wanted \(4,\)"),
        (mixer, {"D": torch.ones(4, device="meta")}, ValueError, "backward.D is on meta, wanted cpu"),
        (mixer, {"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}, ValueError, "must increase"),
        (conv, {"x": torch.ones(6, 4)}, ValueError, r"x has shape \(6, 4\), wanted \(any, any, any\)"),
        (conv, {"weight": torch.ones(3, 3)}, ValueError, r"weight has shape \(3, 3\), wanted \(4, any\)"),
        (conv, {"bias": torch.ones(3)}, ValueError, r"bias has shape \(3,\), wanted \(4,\)"),
        (conv, {"weight": torch.ones(4, 3, device="meta")}, ValueError, "weight is on meta, wanted cpu"),
        (norm, {"weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\), wanted \(4,\)"),
        (norm, {"x": torch.ones(())}, ValueError, "x has shape .*, wanted"),
        (norm, {"residual": torch.ones(3, 4)}, ValueError, r"residual has shape \(3, 4\), wanted \(2, 4\)"),
        (norm, {"residual": torch.ones(2, 4, device="meta")}, ValueError, "residual is on meta, wanted cpu"),
    ],
)  # fmt: skip
def test_every_op_names_what_is_wrong_in_one_line(op, changed, error, words):
    with pytest.raises(error, match=words) as caught:
        op(**changed)
    assert "\n" not in str(caught.value)


def test_a_backend_that_cannot_run_says_why_and_which_can():
    pytest.importorskip("numba", reason="without numba the reason is another")
    x = torch.ones(1, 6, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"'cpu' \(backend=\) cannot run on meta: .*; available: \['reference'"):
        causal_conv1d(x, torch.ones(4, 3, device="meta"), backend="cpu")


def test_packing_needs_one_row():
    cu = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch 1, got batch 2"):
        causal_conv1d(torch.ones(2, 6, 4), torch.ones(4, 3), cu_seqlens=cu)


def test_conv_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        causal_conv1d(torch.ones(1, 6, 4), torch.ones(4, 3), activation="relu")  # pyright: ignore


def test_choice_of_backend(monkeypatch):
    cpu = torch.device("cpu")
    assert available_backends()["reference"] is None
    with use_backend("reference"):
        assert choose(None, cpu) == "reference"
    monkeypatch.setenv("VIM_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="VIM_KERNELS_BACKEND: unknown backend 'nonsense'"):
        choose(None, cpu)
    with use_backend("reference"):  # a narrower choice wins over the environment
        assert choose(None, cpu) == "reference"
    with pytest.raises(ValueError, match="set_backend"):
        set_backend("nonsense")
