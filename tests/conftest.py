"""Shared by all tests: no network, few threads, and small pictures in every format that people have."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several tests at a time share the cores: waiting must not spin
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves the trials beside other tests
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a GPU; read when Triton is first imported

import hypothesis
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from tests.brisk_interpreter import brisk_interpreter  # noqa: F401 - a fixture
from tests.waiting import LIMIT

# no test depends on how fast the machine is, or on the day; more examples than CI's (FUZZ=n) are drawn anew each time
hypothesis.settings.register_profile("anywhere", deadline=None, derandomize="FUZZ" not in os.environ)
hypothesis.settings.load_profile("anywhere")

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

TESTS = Path(__file__).parent
LARGEST = (
    "finetune/test_sweep.py", "kernels/test_triton_aot.py", "test_readme.py", "finetune/test_sweep_driver.py",
    "launch/test_strategies.py", "launch/test_faults.py", "pretrain/test_train.py", "vim_backbone/test_export.py",
    "benchmarks/test_kills.py",
)  # fmt: skip
"""Files of a minute and more of a core, the longest first."""


def pytest_collection_modifyitems(items):
    """The longest files first: started last, one of them would run alone while the other processes have nothing.

    What needs GPUs is skipped where there are fewer. Its limit is above that of the several runs that it starts, on the
    command line too (`--timeout`): each is ended by its own, with what it printed.
    """
    for item in items:
        marker = item.get_closest_marker("gpus")
        if marker is not None:
            item.add_marker(pytest.mark.timeout(4 * LIMIT))
        if marker is not None and torch.cuda.device_count() < marker.args[0]:
            item.add_marker(pytest.mark.skip(reason=f"needs {marker.args[0]} GPUs"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    places = {name: place for place, name in enumerate(LARGEST)}
    items.sort(
        key=lambda item: (item.path not in slow, places.get(item.path.relative_to(TESTS).as_posix(), len(LARGEST)))
    )


@pytest.fixture(autouse=True, scope="session")
def _signals_reach_what_tests_start():
    """What nohup or a shell's background ignores, children would ignore too."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fresh_process_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


@pytest.fixture
def photo():
    """(height, width) -> an RGB picture with structure: a colour ramp with a bright square."""

    def make(height: int = 48, width: int = 64, shift: int = 0) -> Image.Image:
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * 255 // width, y * 255 // height, (x + y + 20 * shift) % 256], axis=-1).astype(np.uint8)
        pixels[height // 4 : height // 2, width // 4 : width // 2] = 240
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def picture_folder(tmp_path, photo):
    """A nested folder of ten good pictures in several formats."""
    folder = tmp_path / "pictures"
    for i in range(10):
        where = folder / ("deep/er" if i % 2 else "top")
        where.mkdir(parents=True, exist_ok=True)
        photo(40 + i, 60 - i, shift=i).save(where / f"{i}.{('jpg', 'png', 'webp')[i % 3]}")
    return folder
