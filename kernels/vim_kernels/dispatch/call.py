"""One call of an op on a backend: the custom op where something traces or watches, else straight past it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from vim_kernels import reference
from vim_kernels.dispatch.choice import MODULES, function, package
from vim_kernels.dispatch.library import REGISTERED, Direct

PLAIN = (Tensor, torch.nn.Parameter)


def call(backend: str, arguments: Any, *, save: bool = True, **allowed: bool) -> Any:
    """The output of the op whose arguments these are, or a tuple of them; `allowed` as `overwrite` in the contract.

    Without `save` the backward pass runs the forward again for what it needs, and nothing but the arguments is kept.
    """
    op = REGISTERED[type(arguments)]
    flat = op.layout.flatten(arguments)
    tensors = [t for t in flat[: op.tensors] if t is not None]
    double = any([t.dtype == torch.float64 for t in tensors])  # noqa: C419 - twice as fast
    if double or backend in MODULES:
        module = reference if double or backend == "reference" else package(backend)
        return getattr(module, op.name)(**dict(zip(arguments._fields, arguments, strict=True)))
    needs_grad = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])  # noqa: C419
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    watched = tracing or is_in_torch_dispatch_mode() or not all([type(t) in PLAIN for t in tensors])  # noqa: C419
    options = (backend, save and needs_grad and not exporting()) if op.saves else (backend,)
    if watched:
        outputs = op.forward(*flat, *options)
        return outputs if not op.saves else outputs[0] if op.outputs == 1 else tuple(outputs[: op.outputs])
    if needs_grad:
        return Direct.apply(op, *flat, *options)
    outputs = function(backend, op.room, op.forward_name)(arguments, *([False] if op.saves else []), **allowed)
    if not op.saves:
        return outputs
    outputs = outputs[:-1]  # what was saved is last
    return outputs[0] if op.outputs == 1 else tuple(outputs)


def exporting() -> bool:
    """Whether `torch.export` is at work, whose programs are for inference and have open sizes.

    Asked under Dynamo, PyTorch 2.11 calls every compiled call exported; a training step would then scan forwards twice.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
