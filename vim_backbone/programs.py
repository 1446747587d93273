"""A model as a program that runs without its Python: traced once, written as ONNX, torch.export or AOTInductor.

A program takes pictures "images" (batch, channels, height, width), all but the channels open, and gives named outputs.
"""

import logging
import operator
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vim_backbone.errors import UserError, first_line
from vim_kernels import use_backend

INPUT = "images"
OPSET = 18
"""Of ONNX: the earliest that PyTorch's exporter writes."""
SIDES = {"patches": ("rows", "columns"), "logits": ("height", "width")}
"""What the third and the fourth axis of an output are called, where it has them."""
Run = Callable[[Tensor], Sequence[Tensor]]
"""Pictures to the outputs of a program."""


class Format(NamedTuple):
    """A kind of file."""

    ending: str
    write: Callable[[ExportedProgram, Path, Sequence[str], dict[str, str]], None]
    """Program, file, names of the outputs, texts to put beside them. It may write more files beside the file."""
    load: Callable[[Path], Run]
    check: Callable[[], None]
    """Raises UserError where something is missing that it needs."""


class PicturesIn(nn.Module):
    """A model with one input of this name, whose outputs are float32."""

    def __init__(self, model: nn.Module, outputs: Callable[[Any, Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(b, c, h, w) -> the outputs."""
        return tuple(output.float() for output in self.outputs(self.model, images))


def trace(model: PicturesIn, channels: int, stride: int, smallest: int) -> ExportedProgram:
    """The model as a program.

    Args:
        channels: of the pictures.
        stride: pixels of which the sides of pictures are multiples.
        smallest: strides that a side has at least.

    Raises:
        UserError: PyTorch cannot trace it.
    """
    shapes = (
        {0: Dim("batch", min=1), 2: stride * Dim("rows", min=smallest), 3: stride * Dim("columns", min=smallest)},
    )
    images = torch.zeros(3, channels, (smallest + 4) * stride, (smallest + 6) * stride)
    with _quiet("PyTorch cannot trace the model"), torch.no_grad(), use_backend("export"):
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


def write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str], texts: dict[str, str]) -> None:
    """Beyond 1.5 GB the weights lie in a second file, PATH.data."""
    with _quiet("PyTorch cannot write the program as ONNX"):
        onnx = torch.onnx.export(
            program, input_names=[INPUT], output_names=list(outputs), opset_version=OPSET, verbose=False
        )
        assert onnx is not None
        graph: Any = onnx.model.graph
        (images,), shape = graph.inputs, type(graph.inputs[0].shape)
        images.shape = shape(["batch", images.shape[1], "height", "width"])
        for output in graph.outputs:
            output.shape = shape(["batch", output.shape[1], *SIDES.get(output.name, ())[: len(output.shape) - 2]])
        onnx.model.metadata_props.update(texts)
        onnx.save(path)


def load_onnx(path: Path) -> Run:
    """In onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with _quiet("onnxruntime cannot load the program"):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]


def write_exported(program: ExportedProgram, path: Path, outputs: Sequence[str], texts: dict[str, str]) -> None:
    """For `torch.export.load`."""
    with _quiet("PyTorch cannot write the program"):
        torch.export.save(program, path, extra_files=texts | {"outputs": " ".join(outputs)})


def load_exported(path: Path) -> Run:
    """In PyTorch."""
    with _quiet("PyTorch cannot load the program"):
        return torch.export.load(path).module()


def write_aoti(program: ExportedProgram, path: Path, outputs: Sequence[str], texts: dict[str, str]) -> None:
    """For `torch._inductor.aoti_load_package`; compiled for this machine's kind of processor."""
    stride = int(texts["stride"])
    options = {"aot_inductor.metadata": texts | {"outputs": " ".join(outputs)}}
    with _quiet("PyTorch cannot compile the program"):
        name_sizes(program, stride)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def load_aoti(path: Path) -> Run:
    """As a shared library."""
    with _quiet("PyTorch cannot load the program"):
        return torch._inductor.aoti_load_package(str(path))


def name_sizes(program: ExportedProgram, stride: int) -> None:
    """Hand batch, rows and columns to every scan.

    Inductor sizes the output of a scan by symbols that the scan itself has been given, and knows no others.
    """
    graph = program.graph
    images = next(node for node in graph.nodes if node.name in program.graph_signature.user_inputs)
    shape = images.meta["val"].shape
    sizes = []
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for axis, unit in ((0, 1), (2, stride), (3, stride)):
            size = graph.call_function(torch.ops.aten.sym_size.int, (images, axis))
            size.meta["val"] = shape[axis]
            if unit > 1:
                size = graph.call_function(operator.floordiv, (size, unit))
                size.meta["val"] = shape[axis] // unit
            sizes.append(size)
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
        body, initial, rows, more = node.args
        node.args = (body, initial, rows, (*more, *sizes))
        step = getattr(program.graph_module, body.target)
        with step.graph.inserting_before(next(part for part in step.graph.nodes if part.op != "placeholder")):
            for size in sizes:
                step.graph.placeholder(size.name).meta["val"] = size.meta["val"]
        step.recompile()
    program.graph_module.recompile()


def require_onnx() -> None:
    """Raise UserError where a package is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, which ONNX needs: pip install 'vision-mamba-pretrain[export]'"
        ) from error


def require_compiler() -> None:
    """Raise UserError where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        compiler = None
    if compiler is None:
        raise UserError("there is no C++ compiler, which AOTInductor needs: install g++, or name one in CXX")


def _nothing_needed() -> None:
    pass


@contextmanager
def _quiet(failure: str) -> Iterator[None]:
    """Without warnings for developers; any error becomes a UserError of one line."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # tracers and compilers raise dozens of classes
        raise UserError(f"{failure}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        logging.disable(level)


FORMATS = {
    "onnx": Format(".onnx", write_onnx, load_onnx, require_onnx),
    "exported": Format(".pt2", write_exported, load_exported, _nothing_needed),
    "aoti": Format(".pt2", write_aoti, load_aoti, require_compiler),
}
