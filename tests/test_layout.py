"""The shape of the repository: imports run one way, and no file takes a name that another package owns."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["vim_kernels", "vim_backbone", "launch", "pretrain", "finetune"]
FOLDERS = {name: ROOT / ("kernels/vim_kernels" if name == "vim_kernels" else name) for name in LAYERS}


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imports.append((node.lineno, node.module.split(".")[0]))
        elif isinstance(node, ast.ImportFrom) and node.level:
            imports.append((node.lineno, "a relative import"))
    return imports


def backward_imports(layer: str, source: str) -> list[str]:
    later = [*LAYERS[LAYERS.index(layer) + 1 :], "tests", "benchmarks", "a relative import"]
    return [f"line {line}: {name}" for line, name in imported(ast.parse(source)) if name in later]


def late_imports(source: str) -> list[int]:
    """Lines inside functions that import the project's own packages."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [line for function in functions for line, name in imported(function) if name in LAYERS]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    for path in FOLDERS[layer].rglob("*.py"):
        assert backward_imports(layer, path.read_text()) == [], path
        assert late_imports(path.read_text()) == [], path


ROOMS = ["state", "run", "data", "planning", "embedding"]
"""Of launch; each may import those before it."""


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_launch_import_one_way(room):
    later = {f"launch.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
    for path in (ROOT / "launch" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert ".".join(node.module.split(".")[:2]) not in later, f"{path} imports {node.module}"


def test_the_check_sees_violations():
    assert backward_imports("launch", "from pretrain.mae import x") == ["line 1: pretrain"]
    assert backward_imports("vim_kernels", "import vim_backbone.vim") == ["line 1: vim_backbone"]
    assert backward_imports("finetune", "import pretrain, torch") == []
    assert late_imports("def f():\n    import launch.cli") == [2]


def test_kernels_is_a_folder_and_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert [p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__"] == ["vim_kernels"]


def test_started_folders_shadow_nothing():
    """`python pretrain/main.py` puts pretrain/ on the path until the bootstrap replaces it; keep its names unique."""
    names = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names -= {*LAYERS, "tests", "benchmarks"}
    for folder in ("pretrain", "finetune"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.stem not in names, path


def test_files_stay_readable():
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            text = path.read_text()
            assert len(text.splitlines()) <= 400, f"{name}: {path} is too long to read at once"
            assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is for"
