"""The wheel: what a user who never saw the repository installs, in an environment of what it asks for and no more."""

import importlib.metadata
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from vim_backbone import create_model, load

ROOT = Path(__file__).parents[1]
USE = """
import os, sys
from pathlib import Path
import numpy, PIL.Image, torch
for name in ("fork", "register_at_fork", "sched_getaffinity", "mkfifo"):  # as on Windows
    delattr(os, name)
sys.modules |= dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios"))
import vim_backbone, vim_backbone.embed, vim_kernels
from vim_kernels.dispatch.choice import available_backends
assert vim_backbone.embed.number_of_threads(None) > 0
assert "pip install numba" in available_backends()["cpu"]
home = Path(sys.prefix)
assert home in Path(vim_backbone.__file__).parents and home in Path(vim_kernels.__file__).parents
config = vim_backbone.VimConfig(d_model=32, depth=2, img_size=(32, 32), num_classes=0)
folder = vim_backbone.VisionMamba(config).save_pretrained(home / "published")
model, transform = vim_backbone.load(folder)
print(tuple(model(transform(torch.zeros(3, 40, 56, dtype=torch.uint8))).shape))
"""


def run(*command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)


def with_their_own(names):
    """Installed distributions of these names, and all that they need here."""
    met: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in met:
            continue
        met[name] = importlib.metadata.distribution(name)
        needs = map(Requirement, met[name].requires or ())
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return list(met.values())


def link(distributions, site):
    """Put what distributions hold into a folder of packages."""
    for each in distributions:
        for top in {file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(each.locate_file(top))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made of the sdist, as for an index."""
    out = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The programs of a fresh environment with the wheel, and links to what it asks for."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, symlinks=True, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    needs = map(Requirement, importlib.metadata.distribution("vision-mamba-pretrain").requires or ())
    link(with_their_own(need.name for need in needs if need.marker is None), site)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin/python")
    # with dependencies pip would install through the links, into the packages that they lead to
    done = run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr
    done = run(*pip, "check")
    assert done.returncode == 0, done.stdout
    return home / "bin"


@pytest.fixture
def call(programs, tmp_path):
    """Start a program of the environment, away from the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VIM_KERNELS_BACKEND": "torch"}
    return lambda name, *arguments: run(programs / name, *arguments, cwd=tmp_path, env=environment)


def test_it_holds_the_library_alone_with_its_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vim_backbone", "vim_kernels"}
    assert {"vim_backbone/py.typed", "vim_kernels/py.typed"} <= set(names)
    files = [path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels/vim_kernels").rglob("*.py")]
    files += [path.relative_to(ROOT) for path in (ROOT / "vim_backbone").rglob("*.py")]
    assert set(map(str, files)) <= set(names)


def test_the_index_would_take_it(wheel):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *wheel.parent.iterdir())
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_it_works_where_the_repository_is_not(call):
    done = call("python", "-P", "-c", USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 32)"


def test_a_folder_becomes_features_in_one_command(call, picture_folder, tmp_path):
    """With nothing of the extras: no rich, datasets, matplotlib or joblib."""
    extras = ["rich", "datasets", "matplotlib", "joblib", "timm", "pyarrow"]
    assert (
        call("python", "-c", f"from importlib.util import find_spec as f; assert not any(map(f, {extras}))").returncode
        == 0
    )
    model = create_model("vim_tiny", d_model=32, depth=2, img_size=32, num_classes=0)
    folder = model.save_pretrained(tmp_path / "backbone")
    (picture_folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    done = call("vim-backbone-embed", folder, picture_folder, "features.npy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "features.npy"
    assert "cannot use broken.jpg: no picture format that can be read, or an empty file" in done.stderr
    model, transform = load(folder)
    names = (tmp_path / "features.npy.names.txt").read_text().splitlines()
    with torch.no_grad():
        want = model(transform([picture_folder / name for name in names]))
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "features.npy")), want, rtol=1e-4, atol=1e-5)
    refused = call("vim-backbone-embed", folder, picture_folder, "features.parquet")
    assert refused.returncode == 2
    assert "pip install pyarrow" in refused.stderr


@pytest.mark.parametrize("name", ["convert", "export"])
def test_its_other_commands_start(call, name):
    wrong = call(f"vim-backbone-{name}", "nothing", "out.npy")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1
