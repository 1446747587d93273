"""What the public ops refuse, and how a backend is chosen."""

import pytest
import torch

from vim_kernels import available_backends, causal_conv1d, selective_scan, set_backend, use_backend
from vim_kernels.backend import resolve


def scan(**changed):
    given = {"x": torch.ones(1, 6, 4), "dt": torch.ones(1, 6, 4), "A": -torch.ones(4, 2), "B": torch.ones(1, 6, 2),
             "C": torch.ones(1, 6, 2)} | changed  # fmt: skip
    return selective_scan(**given)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.ones(1, 6)}, ValueError, r"x has shape \(1, 6\), wanted \(any, any, any\)"),
        ({"dt": torch.ones(1, 5, 4)}, ValueError, r"dt has shape \(1, 5, 4\), wanted \(1, 6, 4\)"),
        ({"A": torch.ones(3, 2)}, ValueError, r"A has shape \(3, 2\), wanted \(4, 2\)"),
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
        assert resolve(None, cpu).__name__ == "vim_kernels.reference"
    monkeypatch.setenv("VIM_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="VIM_KERNELS_BACKEND: unknown backend 'nonsense'"):
        resolve(None, cpu)
    with use_backend("reference"):  # a narrower choice wins over the environment
        assert resolve(None, cpu).__name__ == "vim_kernels.reference"
    with pytest.raises(ValueError, match="set_backend"):
        set_backend("nonsense")
