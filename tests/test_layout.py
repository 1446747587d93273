"""The shape of the repository: imports run one way, and no file takes a name that another package owns."""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from vim_kernels.dispatch.contract import OPS

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


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for folder in FOLDERS.values() for path in folder.rglob("*.py")]


def test_finetuning_needs_nothing_of_pretraining():
    assert not [
        path for path, tree in trees() if "finetune" in path.parts and "pretrain" in dict(imported(tree)).values()
    ]


def test_a_signature_of_an_op_is_written_once():
    """Headers of functions named after ops, in lines; 555 before the arguments of an op became one named tuple."""
    headers = [
        max(1, node.body[0].lineno - node.lineno)
        for path, tree in trees()
        for node in ast.walk(tree)
        if "vim_kernels" in path.parts and isinstance(node, ast.FunctionDef) and any(op in node.name for op in OPS)
    ]
    assert len(headers) > 50
    assert sum(headers) < 250


PARTICIPLE = re.compile(
    r"(^|[_.])(asked|drawn|found|given|got|held(?!_out)|judged?|kept|known|lost|made|meant|met|own|said|seen|shown|taken"
    r"|told|wanted)($|_)"
)


def bindings(tree: ast.AST) -> list[str]:
    """Names of functions, classes and parameters, and of variables and attributes once in each function."""
    names: list[str] = []
    for scope in ast.walk(tree):
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(scope.name)
        if isinstance(scope, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            names += set(stored(scope))
    return names


def stored(scope: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else f".{node.attr}"
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from stored(node)


def test_bindings_have_the_fields_words():
    """Participles such as `found`, `told` and `wanted` say little of a value; 203 at the start, held_out apart."""
    names = [name for _, tree in trees() for name in bindings(tree)]
    assert len([name for name in names if PARTICIPLE.search(name.lower())]) < 40


@pytest.mark.parametrize(
    ("words", "path", "definition"),
    [
        ("the training loop", "pretrain/train.py", "train"),
        ("their losses", "pretrain/mae/model.py", "forward"),
        (
            "the scan's backward kernels",
            "kernels/vim_kernels/triton_backend/tiled_scan_backward.py",
            "tiled_scan_backward_kernel",
        ),
        (
            "the scan's backward kernels",
            "kernels/vim_kernels/triton_backend/scan_backward.py",
            "scan_backward_kernel",
        ),
        ("verifies", "launch/state/checkpoint.py", "verify"),
    ],
)
def test_a_stranger_finds_it_by_the_map(words, path, definition):
    """The row of README's map with these words names the file, which has the definition."""
    (row,) = (
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `") and words in line
    )
    folder, name = path.rsplit("/", 1)
    assert name in row
    assert re.search(rf"\b{folder.rsplit('/', 1)[-1]}/", row)
    assert definition in {
        node.name for node in ast.walk(dict(trees())[ROOT / path]) if isinstance(node, ast.FunctionDef)
    }
