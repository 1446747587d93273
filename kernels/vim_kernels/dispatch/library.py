"""Every op of `contract.OPS` as PyTorch custom ops: forward and backward, fake kernels and autograd formula.

The backward of each is a custom op of its own, so that `torch.compile`, `torch.export`, autocast, gradient
checkpointing and `opcheck` see one opaque node. Schemas come from the named tuples of arguments, and the argument
`backend` selects the package that computes. Gradients travel between ops as lists without the absent ones, because an
op cannot return None. An op called with save=False can still be differentiated: its backward runs the forward again.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim_kernels.dispatch.choice import function
from vim_kernels.dispatch.contract import OPS, AddRmsNorm, Layout, Leaf, OpSpec, leaf, leaves


class Op:
    """The custom ops `vim_kernels::<name>` and `vim_kernels::<name>_backward`."""

    def __init__(self, spec: OpSpec) -> None:
        self.name, self.room, self.layout = spec.name, spec.room, Layout(spec.arguments)
        self.saves, self.outputs = spec.saves, len(spec.outputs)
        values = leaves(spec.arguments)
        self.tensors = sum(value.is_tensor for value in values)
        assert all(value.is_tensor for value in values[: self.tensors]), "tensors come before options"
        backend, save = leaf("backend", str), leaf("save", bool)
        saved = [leaf("saved", list[Tensor])] if self.saves else []
        one_or_more: Any = Tensor if self.outputs == 1 else tuple[(Tensor,) * self.outputs]
        forward = _custom_op(
            spec.name,
            self.run_forward,
            [*values, backend, save] if self.saves else [*values, backend],
            list[Tensor] if self.saves else one_or_more,
        )
        forward.register_fake(self._empty_outputs)
        forward.register_autograd(self._gradients, setup_context=self.keep)
        first, *others = (f"d{name}" for name in spec.outputs)
        incoming = [leaf(first, Tensor), *(leaf(name, Tensor | None) for name in others)]
        kind = spec.backward or spec.arguments
        values, self.backward_layout = leaves(kind), Layout(kind)
        self.end = self.outputs + len(values)  # of the arguments, among the flat values of the backward
        self.with_gradient = [i for i, value in enumerate(values) if value.has_gradient]
        all_tensors = all(values[i].kind is Tensor for i in self.with_gradient)  # a tuple takes 8 us less than a list
        backward = _custom_op(
            f"{spec.name}_backward",
            self.run_backward,
            [*incoming, *values, *saved, backend],
            tuple[(Tensor,) * len(self.with_gradient)] if all_tensors else list[Tensor],
        )
        self.results = tuple if all_tensors else list
        backward.register_fake(self._empty_gradients)
        self.forward = getattr(torch.ops.vim_kernels, spec.name).default
        self.backward = getattr(torch.ops.vim_kernels, f"{spec.name}_backward").default
        self.forward_name, self.backward_name = f"{spec.name}_forward", f"{spec.name}_backward"

    def run_forward(self, *flat: Any) -> Any:
        """What the forward op does."""
        if not self.saves:
            *values, backend = flat
            return function(backend, self.room, self.forward_name)(self.layout.unflatten(values))
        *values, backend, save = flat
        *outputs, saved = function(backend, self.room, self.forward_name)(self.layout.unflatten(values), save)
        return [*outputs, *saved]

    def _empty_outputs(self, *flat: Any) -> Any:
        if not self.saves:
            outputs = self.layout.unflatten(flat[:-1]).outputs()
            return outputs if self.outputs > 1 else outputs[0]
        *values, backend, save = flat
        arguments = self.layout.unflatten(values)
        saved = function(backend, self.room, f"{self.name}_saved")(arguments) if save else []
        return [*arguments.outputs(), *saved]

    def run_backward(self, *flat: Any) -> Sequence[Tensor]:
        """What the backward op does."""
        values, layout = flat[self.outputs : self.end], self.backward_layout
        run = function(flat[-1], self.room, self.backward_name)
        gradients = layout.flatten(run(layout.unflatten(values), *flat[: self.outputs], *flat[self.end : -1]))
        return self.results([gradients[i] for i in self.with_gradient if values[i] is not None])

    def _empty_gradients(self, *flat: Any) -> Sequence[Tensor]:
        values = flat[self.outputs : self.end]
        return self.results([values[i].new_empty(values[i].shape) for i in self.with_gradient if values[i] is not None])

    def keep(self, ctx: Any, inputs: tuple, output: Any) -> None:
        """Keep for the backward pass what it reads."""
        ctx.set_materialize_grads(False)
        ctx.options = inputs[self.tensors :]
        saved = output[self.outputs :] if self.saves else ()
        ctx.save_for_backward(*inputs[: self.tensors], *saved)

    def _gradients(self, ctx: Any, *incoming: Any) -> tuple[Tensor | None, ...]:
        """The custom op's formula: the gradients of a list of outputs come as a list."""
        return self.gradients(ctx, incoming[0] if self.saves else incoming, self.forward, self.backward)

    def gradients(
        self, ctx: Any, incoming: Sequence[Tensor | None], forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> tuple[Tensor | None, ...]:
        """Of all values of the forward op, by these two: the custom ops, or what they run."""
        tensors = ctx.saved_tensors
        values, saved, backend = [*tensors[: self.tensors], *ctx.options], [], ctx.options[-1]
        if self.saves:
            incoming = incoming[: self.outputs]
            *values, backend, _ = values
            saved = [list(tensors[self.tensors :]) or forward(*values, backend, True)[self.outputs :]]
        else:
            values.pop()
        first, *others = incoming
        if first is None:
            first = torch.zeros_like(self.layout.unflatten(values).outputs()[0])
        others = [None if gradient is None else gradient.contiguous() for gradient in others]
        results = backward(first.contiguous(), *others, *values, *saved, backend)
        gradients: list[Tensor | None] = [None] * (self.tensors + len(ctx.options))
        for gradient, i in zip(results, [i for i in self.with_gradient if values[i] is not None], strict=True):
            gradients[i] = gradient
        return tuple(gradients)


class AddRmsNormOp(Op):
    """Keeps the sum, not what was added: one tensor, whose gradient x and residual share."""

    def keep(self, ctx: Any, inputs: tuple, output: Any) -> None:
        """Keep for the backward pass the sum and the weight."""
        x, residual, weight, ctx.eps, ctx.backend = inputs
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], weight)

    def gradients(
        self, ctx: Any, incoming: Sequence[Tensor | None], forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> tuple[Tensor | None, ...]:
        """Of all values of the forward op, which is not run again."""
        del forward
        dnormed, dtotal = incoming
        total, weight = ctx.saved_tensors
        dnormed = torch.zeros_like(total, dtype=ctx.x_dtype) if dnormed is None else dnormed.contiguous()
        dtotal = None if dtotal is None else dtotal.contiguous()
        dsum, dweight = backward(dnormed, dtotal, total, weight, ctx.eps, ctx.backend)
        dresidual = None if ctx.residual_dtype is None else dsum.to(ctx.residual_dtype)
        return dsum.to(ctx.x_dtype), dresidual, dweight, None, None


class Direct(torch.autograd.Function):
    """An op and its gradients past the dispatcher, for tensors that nothing traces or watches."""

    @staticmethod
    def forward(ctx: Any, op: Op, *flat: Any) -> Any:
        """The outputs of `op`, one or a tuple, from its flat values."""
        with named(op.name):
            results = op.run_forward(*flat)
        ctx.op = op
        op.keep(ctx, flat, results)
        return tuple(results[: op.outputs]) if op.outputs > 1 else results[0] if op.saves else results

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of the op's values.

        By the custom ops where they are to be differentiated again, which raises RuntimeError: they have no second
        derivative, and what is computed past autograd would count as constant without a word.
        """
        op = ctx.op
        watched = torch.is_grad_enabled()  # here that is `create_graph`
        ops = (op.forward, op.backward) if watched else (op.run_forward, op.run_backward)
        with named(f"{op.name}_backward"):
            return None, *op.gradients(ctx, incoming, *ops)


def named(op: str) -> AbstractContextManager[Any]:
    """In a profile, where there is one, the name that the custom op would have."""
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return torch.profiler.record_function(f"vim_kernels::{op}") if profiled else nullcontext()


def _custom_op(name: str, run: Callable[..., Any], values: list[Leaf], results: Any) -> Any:
    def prototype() -> None: ...

    parameters = [Parameter(value.name, Parameter.POSITIONAL_OR_KEYWORD, annotation=value.kind) for value in values]
    prototype.__signature__ = Signature(parameters, return_annotation=results)  # pyright: ignore[reportFunctionMemberAccess]
    schema = torch.library.infer_schema(prototype, mutates_args=())
    return torch.library.custom_op(f"vim_kernels::{name}", run, mutates_args=(), schema=schema)


REGISTERED = {spec.arguments: AddRmsNormOp(spec) if spec.arguments is AddRmsNorm else Op(spec) for spec in OPS.values()}
"""Named tuple of arguments -> its op."""


def fingerprint(package: Path) -> str:
    """Of all Python files of a package, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _tag_compiled_graphs() -> None:
    """Have what `torch.compile` keeps on disk be of this version of the ops.

    Its keys hold the ops' names, not their fake kernels, formulas of autograd or layouts of what is saved: a graph kept
    by another version would run against these, wrong or not at all.
    """
    config = getattr(torch.compiler, "config", None)
    if hasattr(config, "cache_key_tag"):
        # a graph kept for wider vectors, compiled for narrower ones, leaves out half of each tensor
        made_for = f"{fingerprint(Path(__file__).parents[1])} {torch.backends.cpu.get_cpu_capability()}"
        config.cache_key_tag += f" vim_kernels {made_for}"  # pyright: ignore[reportOptionalMemberAccess]


_tag_compiled_graphs()
