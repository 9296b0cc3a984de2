"""One merge of tensors in memory, by any method of the table: what `fastmerge.ops` calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.arguments import a_list, a_text
from fastmerge.compute.arrays import Operands
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.tensor import Computation
from fastmerge.errors import FastmergeError, is_whole, nearest
from fastmerge.methods import REQUIRED, Method, find
from fastmerge.tree.nodes import Merge, Node, Stored
from fastmerge.tree.unread import keeps_equal, without_unread


def merge(
    method: str,
    tensors: Sequence[Any],
    parameters: Mapping[str, Any] | None = None,
    *,
    base: Any = None,
    seed: int | None = None,
    name: str = "",
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """``tensors`` merged by any method of the table, one that was registered, too.

    ``parameters`` by their names in recipes; per model one number, or one for each tensor.
    """
    row, given = find(a_text(method, "method"), "method"), parameters or {}
    if not isinstance(given, Mapping):
        raise FastmergeError(f"{row.name}: parameters must be a mapping of names to values")
    name = a_text(name, f"{row.name}: name")
    tensors = a_list(tensors, f"{row.name}: tensors")
    count = len(tensors)
    for unknown in (key for key in given if row.parameter(key) is None):
        hint = nearest(unknown, [p.name for p in row.parameters])
        raise FastmergeError(f"{row.name}: unknown parameter '{unknown}'; {hint}")
    if count < row.min_operands or (row.max_operands and count > row.max_operands):
        raise FastmergeError(f"{row.name}: got {count} tensors; {_arity(row)}")
    deltas = base is None and row.of_deltas
    if row.base == "required" and base is None and not deltas:
        raise FastmergeError(f"{row.name}: needs a base tensor")
    if row.base in ("none", "first", "operand") and base is not None:
        raise FastmergeError(f"{row.name}: takes no base tensor of its own; put it in the list")
    operands = Operands(row.name, [*tensors] if base is None else [*tensors, base])
    # Every tensor is its own source here: the model index is its place in the list.
    leaves = [
        Stored(index, "", operands.shape, dtype) for index, dtype in enumerate(operands.dtypes)
    ]
    views = operands.views
    if deltas:
        views = [*views, operands.zeros()]
        leaves.append(Stored(count, "", operands.shape))
    root = Merge(
        row,
        tuple(leaves[:count]),
        leaves[count] if len(leaves) > count else None,
        {p.name: _value(row, p.name, given) for p in row.parameters if not p.per_model},
        tuple(_operand_values(row, given, index, count) for index in range(count)),
        _seed(row, seed),
    )
    result, sink = operands.output(out)
    backend = operands.backend(threads)
    computation = Computation(backend, lambda source: views[source.model], name, operands.shape)
    tree = without_unread(root)
    # Of deltas the base is another tensor than they are, however equal they may be.
    if isinstance(backend, CpuBackend) and not deltas and _is_kept(tree, operands, backend):
        tree = Merge(find("passthrough"), (leaves[0],), None, {}, ({},))
    computation.run(tree, sink)
    return result


def _is_kept(tree: Node, operands: Operands, backend: CpuBackend) -> bool:
    """Whether the result is what all tensors are: the same bytes."""
    return operands.equal(backend.pool) and keeps_equal(tree)


def _seed(method: Method, seed: Any) -> int | None:
    if not method.random:
        return None
    if not is_whole(seed) or not 0 <= seed < 1 << 64:
        raise FastmergeError(f"{method.name}: 'seed' must be a whole number in [0, 2^64)")
    return int(seed)


def _arity(method: Method) -> str:
    if method.max_operands == method.min_operands:
        return f"it takes {method.min_operands}"
    return f"it takes at least {method.min_operands}"


def _value(method: Method, name: str, values: Mapping[str, Any]) -> Any:
    parameter = method.parameter(name)
    assert parameter is not None
    value = values.get(name, parameter.default)
    if value is REQUIRED:
        raise FastmergeError(f"{method.name}: '{name}' is required")
    if value is None and parameter.default is None:
        return None
    return parameter.check(plain(value), method.name)


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy's and torch's as Python's own numbers and lists of them."""
    if getattr(value, "device", None) is not None and str(value.device) == "meta":
        raise FastmergeError("a tensor on 'meta' has no numbers")
    return value.tolist() if hasattr(value, "tolist") else value


def _operand_values(
    method: Method, given: Mapping[str, Any], index: int, count: int
) -> dict[str, Any]:
    own: dict[str, Any] = {}
    names = [p.name for p in method.parameters if p.per_model]
    for name in (name for name in names if name in given):
        value = plain(given[name])
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != count:
                raise FastmergeError(
                    f"{method.name}: {count} tensors but {len(value)} values for '{name}'"
                )
            value = value[index]
        own[name] = value
    return {name: _value(method, name, own) for name in names}
