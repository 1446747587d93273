"""What `make` does on machines that are not this one: other Pythons, none at all, and tests that end their process."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.waiting import LIMIT

ROOT = Path(__file__).parents[1]
MAKEFILE = ROOT / "Makefile"


def make(where, *argv, path=os.environ["PATH"]):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["/usr/bin/env", f"PATH={path}", "make", "--file", MAKEFILE, *argv], cwd=where, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def clone(tmp_path):
    """A folder with what set-up looks at, and programs of the machine without any Python."""
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("make", "sh", "touch", "echo"):
        (programs / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    return tmp_path


def python(folder, name, version):
    """A stand-in that answers for its version and writes down what it is told to do."""
    path = folder / "programs" / name
    answer = f'case "$1$2" in -c*) exec {sys.executable} -c "import sys; sys.version_info = {version}; $2" ;; esac'
    path.write_text(f'#!/bin/sh\n{answer}\nprintf "%s\\n" "{name} $*" >> {folder}/ran\nexit 7\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"python3": (3, 13, 0)}, "python3"),
        ({"python3.14": (3, 14, 1), "python3": (3, 9, 2)}, "python3.14"),
        ({"python3.11": (3, 11, 2), "python3.12": (3, 12, 0)}, "python3.11"),
    ],
)
def test_any_supported_python_is_taken(there, chosen, clone):
    for name, version in there.items():
        python(clone, name, version)
    assert make(clone, "setup", path=clone / "programs").returncode != 0  # the stand-in makes no environment
    assert (clone / "ran").read_text().splitlines()[0] == f"{chosen} -m venv .venv"


@pytest.mark.parametrize(
    ("there", "argv", "words"),
    [
        ({}, [], "there is no Python of 3.11 to 3.14 with venv: make PYTHON="),
        ({"python3": (3, 10, 9), "python3.15": (3, 15, 0)}, [], "there is no Python of 3.11 to 3.14"),
        ({"python3": (3, 10, 9)}, ["PYTHON=python3"], "python3 is no Python of 3.11 to 3.14"),
    ],
)
def test_without_one_a_line_says_so(there, argv, words, clone):
    for name, version in there.items():
        python(clone, name, version)
    done = make(clone, "setup", *argv, path=clone / "programs")
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert re.search(words, line)
    assert not (clone / "ran").exists()


CRASHING = """
import os, pytest

@pytest.mark.parametrize("i", range(4))
def test_it(i):
    if i == 2: os.abort()
"""


@pytest.mark.slow
def test_a_test_that_ends_its_process_ends_the_tests(tmp_path):
    """With pytest-xdist's default, which starts such processes again, this run never ends."""
    (line,) = [line for line in make(ROOT, "--dry-run", "test").stdout.splitlines() if "-m pytest" in line]
    flags = line.split("-m pytest")[1].split()
    for letter in "abcdefgh":
        (tmp_path / f"test_{letter}.py").write_text(CRASHING if letter in "ab" else CRASHING.replace("i == 2", "i < 0"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", tmp_path, *flags, tmp_path],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    for letter in "ab":
        assert re.search(rf"crashed while running '.*test_{letter}\.py::test_it\[2\]'", done.stdout)


@pytest.mark.parametrize("version", ["3.11.0", "3.12.0", "3.13.0", "3.14.0"])
def test_a_pinned_version_serves_the_first_release_of_each_python(version):
    """Debian 12 has 3.11.2, and a package may ask for a later one of them."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = [Requirement(line) for line in lines]
    applies = {"python_full_version": version, "python_version": version.rpartition(".")[0]}
    pinned = {canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate(applies)}
    needs = {canonicalize_name(each.name): each.metadata.get("Requires-Python") or "" for each in distributions()}
    alternatives = {canonicalize_name(pin.name) for pin in pins if pin.marker is not None}
    here = {name: needs[name] for name in pinned - alternatives if name in needs}
    assert len(here) > 100
    assert {name: spec for name, spec in here.items() if version not in SpecifierSet(spec)} == {}
    assert alternatives <= pinned
