"""One sequence over 2 and 4 processes (gloo): values and gradients of one process, whoever holds which token."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from tests.launch.real import begin, environment
from tests.vim_backbone.test_vim import small
from tests.waiting import LIMIT
from vim_backbone import UserError
from vim_backbone.sequence_parallel import Rows, embed_rows, encode_stretch
from vim_backbone.stretch import Stretch, StretchLayout
from vim_backbone.tokens import TokenLayout

ROOT = Path(__file__).parents[2]
MEASURED = logging.getLogger(__name__)
"""Shown by `pytest -rA --log-level=INFO`."""
BF16 = 0.1
"""Largest error under autocast, whose own rounding it is: 0.055 is the worst seen (CPU, 2026-11-27)."""


INTERPRETED = {"VIM_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1"}
"""The fused scan of a part, without a GPU."""


def errors_of(processes, folder, device="cpu", dtype="float32", first=None, **variables):
    """Case -> largest error of values and gradients, over their largest value; of the FIRST so many cases."""
    argv = [sys.executable, "-m", "tests.vim_backbone.stretches", str(folder)]
    paths = environment(device, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", **variables)
    some = [] if first is None else [str(first)]
    own = [[*argv, str(rank), str(processes), dtype, *some] for rank in range(processes)]
    running = [begin(each, ROOT, paths, device) for each in own]
    for process in running:
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, out + err
    return json.loads((folder / "errors.json").read_text())


def test_values_and_gradients_are_those_of_one_process(tmp_path):
    """Four processes: two halves of them at once, then all."""
    errors = errors_of(4, tmp_path)
    assert {case.split(" processes")[0] for case in errors} == {"2", "4"}
    assert sum("masked" in case for case in errors) == 5
    assert len(errors) >= 21
    assert max(errors.values()) < 5e-5, errors


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_fused_scan_gives_those_of_one_process(processes, tmp_path):
    """The Triton backend, in its interpreter: of other cases it is tests/kernels/test_part.py that has the parts."""
    pytest.importorskip("triton", reason="Triton is not installed")
    errors = errors_of(processes, tmp_path, first=1, **INTERPRETED)
    assert f"{processes} processes, cpu, class token in the middle, inputs" in errors
    assert max(errors.values()) < 5e-5, errors


@pytest.mark.gpus(2)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-5), ("bfloat16", BF16)])
def test_values_and_gradients_on_two_gpus(dtype, bound, tmp_path):
    errors = errors_of(2, tmp_path, "cuda", dtype)
    MEASURED.info("%s %s", dtype, errors)
    assert all("cuda" in case for case in errors)
    assert max(errors.values()) < bound, errors


@pytest.mark.slow
def test_values_and_gradients_in_bf16(tmp_path):
    errors = errors_of(2, tmp_path, dtype="bfloat16")
    assert max(errors.values()) < BF16, errors


@pytest.mark.parametrize("class_token", ["middle", "first", "none"])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("lengths", [(3, 4, 2), (1, 1, 7), (9,)])
def test_special_tokens_are_where_the_whole_sequence_has_them(class_token, registers, lengths):
    layout = TokenLayout(class_token, registers)
    special = -1.0 - torch.arange(layout.num_special)[None, :, None]
    patches = torch.arange(float(sum(lengths)))[None, :, None]
    parts = [StretchLayout(layout, Stretch(lengths, rank)) for rank in range(len(lengths))]
    joined = [part.join(special, patches[:, part.stretch.patches]) for part in parts]
    assert torch.equal(torch.cat(joined, dim=1), layout.join(special, patches))


def test_what_cannot_be_over_several_processes_is_refused():
    tokens, stretch = torch.zeros(1, 8, 32), Stretch((8, 8), 0)
    pooled = small(scan="pooled", class_token="none", global_pool="avg")
    with pytest.raises(UserError, match="scan is 'pooled'"):
        encode_stretch(pooled, tokens, stretch)
    with pytest.raises(UserError, match=r"drop_path_rate is 0\.1"):
        encode_stretch(small(drop_path_rate=0.1).train(), tokens, stretch)
    with pytest.raises(UserError, match="there are 8 patches, the stretch has 9"):
        encode_stretch(small(), tokens, Stretch((9, 8), 0))
    with pytest.raises(UserError, match=r"pictures have 4 x 4 patches: for range\(0, 2\) of \(4, 4\) give 2 x 4"):
        embed_rows(small(), torch.zeros(1, 3, 64, 64), Rows(range(2), (4, 4)))


def test_a_stretch_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"hold \[5, 2\] tokens of a sequence: each needs 3 at least"):
        Stretch((5, 2), 0).check(4)
