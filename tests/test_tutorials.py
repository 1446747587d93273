"""The notebooks run, small: Python in a kernel, commands forked from a process that has imported everything."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_readme import SMALL, assert_runs, place  # noqa: F401 - a fixture
from tests.waiting import LIMIT

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
COMMANDS = "%%bash\n"
TINY = "--steps=1 --model.img_size=32 --batch_size=4 --data.workers=0 --trackers=[]"
LESS = {r"size=224": "size=32", r'draw\("(train|val)", \d+': r'draw("\1", 4'}
"""What is smaller in the Python of a test."""


class Client(NotebookClient):
    """Runs the commands of a notebook beside its kernel."""

    async def async_execute_cell(self, cell, cell_index, **more):
        if not cell.source.startswith(COMMANDS):
            return await super().async_execute_cell(cell, cell_index, **more)
        for line in cell.source.removeprefix(COMMANDS).splitlines():
            assert_runs(small(line), Path(self.resources["metadata"]["path"]))
        return cell


def small(line):
    if "main.py" in line:
        line = f"{line} {TINY}"
    if "pretrain/main.py" in line:
        line = f"{line} {SMALL} --model.patch_size=8"
    if "pretrain.look" in line:
        line += " --model.img_size=32"
    return line.replace("--size 224", "--size 32")


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
def test_they_run(place, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", f"{place}:{place / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for path in reversed(NOTEBOOKS):  # the detector starts from the backbone of the folder
        notebook = read(path)
        for cell in notebook.cells:
            for words, fewer in LESS.items():
                cell.source = re.sub(words, fewer, cell.source)
        limits = {"timeout": LIMIT, "startup_timeout": LIMIT}
        Client(notebook, **limits, resources={"metadata": {"path": str(place)}}).execute()
    rows = (place / "runs/my_detector/predictions/predictions.jsonl").read_text().splitlines()
    assert len(rows) == 4
    assert (place / "sample/detections.png").exists()
    assert (place / "sample/features_pictures/neighbours.png").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_run(path):
    """Every cell was run, in order and without an error; nothing is bulky, and nothing says on what machine."""
    assert path.stat().st_size < 500_000
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert len(text.splitlines()) <= 100
            assert not re.search(r"(?<![\w.])/(work|tmp|home|root|Users)/", text), text
