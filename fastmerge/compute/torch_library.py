"""The calls of `fastmerge.ops` as operators of torch's, which programs of torch's may hold.

Importing it, which imports torch, registers ``torch.ops.fastmerge.ties`` and so on, one for each
method of the table that is there by then, and ``combine`` and ``gram``. torch.compile and
torch.export know the shapes and types of their results, and torch.jit.trace records them. Gradients
flow through ``combine`` and ``gram``, of any order, to tensors and coefficients: each one's
gradient is made of the two. They flow through the methods that are linear in their tensors; the
others have none, and say so in ``backward``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.compute import combining, of_tensors
from fastmerge.compute.recording import refuse_traces
from fastmerge.dtypes import WITH_KERNELS
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.methods import METHODS, Method, Parameter
from fastmerge.models.memory import is_float8

if TYPE_CHECKING:
    import torch

_NAMESPACE = "fastmerge"
_AFTER = "int? seed=None, str name='', int? threads=None"  # of every method's operator
_LINEAR = ("linear", "task_arithmetic", "passthrough")  # in the tensors, whatever they hold
_WORDS = {True: "true", False: "false"}
_TAKEN = [dtype.name for dtype in WITH_KERNELS]


def _type(parameter: Parameter) -> str:
    """A parameter's type in an operator's schema; None stands for what is not given."""
    named = parameter.words or parameter.choices
    kind = "str" if named else parameter.kind.__name__
    return f"{kind}[]?" if parameter.per_model else f"{kind}?"


_PARAMETERS = {
    row.name: {p.name: (p.argument, p.per_model, "str" in _type(p)) for p in row.parameters}
    for row in METHODS.values()
}


def merge(
    method: str,
    tensors: Sequence[torch.Tensor],
    parameters: Mapping[str, Any] | None = None,
    *,
    base: torch.Tensor | None = None,
    seed: int | None = None,
    name: str = "",
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """`of_tensors.merge` as a program of torch's holds it: numbers are Python's, and like all
    results of `fastmerge.ops` it carries no gradient.
    """
    import torch

    if method not in _PARAMETERS:
        raise UnsupportedError(
            f"{method}: no operator of torch's; register the method before the first program "
            "that holds one is recorded"
        )
    tensors = [tensor.detach() for tensor in tensors]
    given: dict[str, Any] = {}
    for key, value in (parameters or {}).items():
        if key not in _PARAMETERS[method]:
            raise FastmergeError(f"{method}: unknown parameter '{key}'")
        argument, per_model, is_text = _PARAMETERS[method][key]
        if value is None:
            continue
        own = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(number, (torch.Tensor, np.ndarray)) for number in own):
            raise FastmergeError(
                f"{method}: '{key}': numbers beside the tensors are Python's where torch records "
                "a program; fastmerge.integrations.torch_ops takes tensors of them"
            )
        if is_text and isinstance(value, bool):
            value = _WORDS[value]
        if per_model:
            value = [*value] if isinstance(value, (list, tuple)) else [value] * len(tensors)
        given[argument] = value
    operator = getattr(torch.ops.fastmerge, method)
    origin = None if base is None else base.detach()
    made: torch.Tensor = operator(tensors, origin, **given, seed=seed, name=name, threads=threads)
    return _written(made, out, method)


def combine(
    tensors: Sequence[torch.Tensor],
    coefficients: Any,
    *,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """`combining.combine` as a program of torch's holds it, without a gradient."""
    import torch

    if not isinstance(coefficients, torch.Tensor):  # full: torch.tensor is a constant to a trace
        each = [torch.full((1,), value, dtype=torch.float64) for value in coefficients]
        coefficients = torch.cat(each)
    tensors = [tensor.detach() for tensor in tensors]
    made: torch.Tensor = torch.ops.fastmerge.combine(
        tensors, coefficients.detach(), threads=threads
    )
    return _written(made, out, "combine")


def gram(
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    threads: int | None = None,
) -> Any:
    """`combining.gram` as a program of torch's holds it."""
    import torch

    refuse_traces("gram", "trace fastmerge.integrations.torch_ops.gram, or use torch.export")
    origin = None if base is None else base.detach()
    products = torch.ops.fastmerge.gram(
        [tensor.detach() for tensor in tensors], origin, threads=threads
    )
    return products.numpy()


def _written(made: torch.Tensor, out: torch.Tensor | None, where: str) -> torch.Tensor:
    """``made``, in ``out`` where there is one: of its shape, and of a type that holds its numbers,
    as torch's own copy asks neither.
    """
    if out is None:
        return made
    if out.shape != made.shape or str(out.dtype).removeprefix("torch.") not in _TAKEN:
        raise FastmergeError(
            f"{where}: out: {out.dtype} of shape {[*out.shape]} where the result has shape "
            f"{[*made.shape]}; its types are {', '.join(_TAKEN)}"
        )
    return out.copy_(made)


def _result_like(tensors: Sequence[torch.Tensor], where: str) -> torch.Tensor:
    """What `Operands.output` makes for them."""
    import torch

    for tensor in tensors[1:]:
        if tensor.shape != tensors[0].shape:
            raise FastmergeError(
                f"{where}: shapes differ: {[*tensors[0].shape]} and {[*tensor.shape]}"
            )
    types = {torch.bfloat16 if is_float8(tensor.dtype) else tensor.dtype for tensor in tensors}
    dtype = types.pop() if len(types) == 1 else torch.float32
    return torch.empty(tensors[0].shape, dtype=dtype, device=tensors[0].device)


def _register_method(row: Method) -> None:
    import torch

    parameters = [f"{_type(p)} {p.argument}=None" for p in row.parameters]
    arguments = ", ".join(["Tensor[] tensors, Tensor? base, *", *parameters, _AFTER])
    names = {p.argument: p.name for p in row.parameters}
    yes_or_no = {p.argument for p in row.parameters if p.kind is bool}

    def computed(
        tensors: list[torch.Tensor],
        base: torch.Tensor | None,
        *,
        seed: int | None = None,
        name: str = "",
        threads: int | None = None,
        **numbers: Any,
    ) -> torch.Tensor:
        given = {}
        for argument, value in numbers.items():
            if argument in yes_or_no and value in _WORDS.values():
                value = value == "true"
            if value is not None:
                given[names[argument]] = value
        made: torch.Tensor = of_tensors.merge(
            row.name, [tensor.contiguous() for tensor in tensors], given,
            base=None if base is None else base.contiguous(),
            seed=seed, name=name, threads=threads,
        )  # fmt: skip
        return made

    operator = torch.library.custom_op(
        f"{_NAMESPACE}::{row.name}", computed, mutates_args=(), schema=f"({arguments}) -> Tensor"
    )

    @operator.register_fake
    def _(tensors: list[torch.Tensor], base: torch.Tensor | None, **_: Any) -> torch.Tensor:
        return _result_like(tensors if base is None else [*tensors, base], row.name)

    if row.name in _LINEAR:
        operator.register_autograd(_by_tensors(operator), setup_context=_keep_types)


def _keep_types(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: Any,  # noqa: ARG001
) -> None:
    tensors, base = inputs
    ctx.types = [tensor.dtype for tensor in tensors]
    ctx.base_type = None if base is None else base.dtype
    ctx.given = keyword_only_inputs


def _by_tensors(operator: Any) -> Any:
    """The gradient of a method whose result is sum_i c_i x_i with c_i of its parameters alone: c_i
    is what it makes of 1 at the i-th place and 0 elsewhere.
    """
    import torch

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        count = len(ctx.types)
        types = [*ctx.types] if ctx.base_type is None else [*ctx.types, ctx.base_type]
        grads: list[Any] = []
        for i, dtype in enumerate(types):
            *units, last = torch.eye(len(types), count + 1)[i].view(-1, 1).unbind()
            base = None if ctx.base_type is None else last
            factor = operator(units, base, **ctx.given).double()
            grads.append(torch.ops.fastmerge.combine([grad], factor).to(dtype))
        return grads[:count], None if ctx.base_type is None else grads[-1]

    return backward


def _register_combine() -> None:
    import torch

    def computed(
        tensors: list[torch.Tensor], coefficients: torch.Tensor, *, threads: int | None = None
    ) -> torch.Tensor:
        if coefficients.shape != (len(tensors),):
            raise FastmergeError(
                f"combine: {len(tensors)} tensors but coefficients of shape "
                f"{list(coefficients.shape)}"
            )
        factors = tuple(coefficients.detach().to("cpu", torch.float64).tolist())
        whole = [tensor.contiguous() for tensor in tensors]
        made: torch.Tensor = combining.combined(whole, factors, threads=threads)
        return made

    operator = torch.library.custom_op(
        f"{_NAMESPACE}::combine",
        computed,
        mutates_args=(),
        schema="(Tensor[] tensors, Tensor coefficients, *, int? threads=None) -> Tensor",
    )

    @operator.register_fake
    def _(tensors: list[torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        return _result_like(tensors, "combine")

    def setup(
        ctx: Any,
        inputs: tuple[Any, ...],
        keyword_only_inputs: dict[str, Any],
        output: Any,  # noqa: ARG001
    ) -> None:
        tensors, coefficients = inputs
        ctx.threads = keyword_only_inputs["threads"]
        ctx.save_for_backward(*tensors, coefficients)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """By x_i: c_i grad. By c_i: <grad, x_i>."""
        *tensors, coefficients = ctx.saved_tensors
        by_tensors, by_coefficients = ctx.needs_input_grad
        calls = torch.ops.fastmerge
        grads = [
            calls.combine([grad], coefficients[i : i + 1], threads=ctx.threads).to(tensor.dtype)
            if wanted
            else None
            for i, (tensor, wanted) in enumerate(zip(tensors, by_tensors, strict=True))
        ]
        products = None
        if by_coefficients:
            products = calls.gram([grad, *tensors], None, threads=ctx.threads)[0, 1:].to(
                coefficients
            )
        return grads, products

    operator.register_autograd(backward, setup_context=setup)


def _register_gram() -> None:
    import torch

    def computed(
        tensors: list[torch.Tensor], base: torch.Tensor | None, *, threads: int | None = None
    ) -> torch.Tensor:
        origin = None if base is None else base.contiguous()
        whole = [tensor.contiguous() for tensor in tensors]
        return torch.from_numpy(combining.gram(whole, base=origin, threads=threads))

    operator = torch.library.custom_op(
        f"{_NAMESPACE}::gram",
        computed,
        mutates_args=(),
        schema="(Tensor[] tensors, Tensor? base, *, int? threads=None) -> Tensor",
    )

    @operator.register_fake
    def _(tensors: list[torch.Tensor], base: torch.Tensor | None, **_: Any) -> torch.Tensor:
        size = len(tensors) + (base is not None)
        return torch.empty((size, size), dtype=torch.float64)

    def setup(
        ctx: Any,
        inputs: tuple[Any, ...],
        keyword_only_inputs: dict[str, Any],
        output: Any,  # noqa: ARG001
    ) -> None:
        tensors, base = inputs
        ctx.threads = keyword_only_inputs["threads"]
        ctx.has_base = base is not None
        ctx.save_for_backward(*([base] if ctx.has_base else []), *tensors)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """By the i-th vector: sum_j (grad_ij + grad_ji) v_j; with a base the vectors are
        differences to it, and what each gets the base loses.
        """
        tensors = ctx.saved_tensors
        factors = grad + grad.T
        if ctx.has_base:
            to_deltas = torch.eye(len(tensors), dtype=torch.float64)
            to_deltas[1:, 0] = -1  # vectors = to_deltas @ tensors
            factors = to_deltas.T @ factors @ to_deltas
        grads = [
            torch.ops.fastmerge.combine(tensors, row, threads=ctx.threads).to(tensor.dtype)
            for tensor, row in zip(tensors, factors, strict=True)
        ]
        return (grads[1:], grads[0]) if ctx.has_base else (grads, None)

    operator.register_autograd(backward, setup_context=setup)


for _row in METHODS.values():
    _register_method(_row)
_register_combine()
_register_gram()
