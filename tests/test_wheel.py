"""The wheel: what a user who never saw the repository installs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys
from pathlib import Path
import torch, vim_backbone, vim_kernels
home = Path(sys.argv[1])
assert home in Path(vim_backbone.__file__).parents and home in Path(vim_kernels.__file__).parents
config = vim_backbone.VimConfig(d_model=32, depth=2, img_size=(32, 32), num_classes=0)
folder = vim_backbone.VisionMamba(config).save_pretrained(home / "published")
model, transform = vim_backbone.load(folder)
print(tuple(model(transform(torch.zeros(3, 40, 56, dtype=torch.uint8))).shape))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, and a folder that it alone is installed into."""
    home = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(home), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = home.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(home / "in"),
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return wheel, home / "in"


def test_it_holds_the_library_alone_with_its_types(installed):
    wheel, _ = installed
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vim_backbone", "vim_kernels"}
    assert {"vim_backbone/py.typed", "vim_kernels/py.typed"} <= set(names)
    files = [path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels/vim_kernels").rglob("*.py")]
    files += [path.relative_to(ROOT) for path in (ROOT / "vim_backbone").rglob("*.py")]
    assert set(map(str, files)) <= set(names)


def test_it_works_where_the_repository_is_not(installed, tmp_path):
    _, home = installed
    command = [sys.executable, "-P", "-c", USE, str(home)]
    environment = os.environ | {"PYTHONPATH": str(home), "VIM_KERNELS_BACKEND": "torch"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 32)"


@pytest.mark.parametrize("name", ["convert", "export"])
def test_its_commands_explain_themselves(installed, tmp_path, name):
    _, home = installed
    command, environment = str(home / f"bin/vim-backbone-{name}"), os.environ | {"PYTHONPATH": str(home)}

    def call(*arguments):
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        return subprocess.run([command, *arguments], check=False, **options)

    assert f"vim_backbone.{name}" in call("--help").stdout
    wrong = call("nothing", "out.onnx")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1
