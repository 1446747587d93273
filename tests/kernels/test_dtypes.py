"""Every tensor of every op must be of floating point: whole and complex numbers are refused by name."""

import pytest
import torch

import vim_kernels
from vim_kernels import ScanWeights

D, N, R = 4, 2, 3


def weights():
    return ScanWeights(torch.ones(D, 3), torch.ones(D), torch.ones(R + 2 * N, D), torch.ones(D, R), torch.ones(D),
                       torch.ones(D, N), torch.ones(D))  # fmt: skip


SCAN = {"x": (1, 5, D), "dt": (1, 5, D), "A": (D, N), "B": (1, 5, N), "C": (1, 5, N), "D": (D,), "z": (1, 5, D),
        "dt_bias": (D,), "initial_state": (1, D, N)}  # fmt: skip
CONV = {"x": (1, 5, D), "weight": (D, 3), "bias": (D,)}
NORM = {"x": (1, 5, D), "weight": (D,), "residual": (1, 5, D)}
OPS = {"selective_scan": SCAN, "causal_conv1d": CONV, "add_rms_norm": NORM}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, tensors in OPS.items() for name in tensors])
def test_arguments(op, name, dtype):
    tensors = {key: torch.ones(shape) for key, shape in OPS[op].items()}
    more = {"eps": 1e-5} if op == "add_rms_norm" else {}
    getattr(vim_kernels, op)(**tensors, **more)
    with pytest.raises(TypeError, match=f"^{name} has dtype {dtype}, wanted one of"):
        getattr(vim_kernels, op)(**tensors | {name: tensors[name].to(dtype)}, **more)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("field", ScanWeights._fields)
def test_weights_of_a_mixer(field, direction, dtype):
    both = [weights(), weights()]
    vim_kernels.bidirectional_scan(torch.ones(1, 5, 2 * D), *both)
    both[direction] = both[direction]._replace(**{field: getattr(both[direction], field).to(dtype)})
    name = ("forward", "backward")[direction]
    with pytest.raises(TypeError, match=f"^{name}.{field} has dtype {dtype}"):
        vim_kernels.bidirectional_scan(torch.ones(1, 5, 2 * D), *both)
