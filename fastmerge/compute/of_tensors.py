"""One merge of tensors in memory, by any method of the table: what `fastmerge.ops` calls.

What a call says is checked and planned once, and kept for calls that say the same of tensors of the
same shape and types (`_Form`): kernels of 4 Ki entries take 2 us, checking and planning 50 to 200.
What then is left to Python takes it 10: tensors on the CPU that are like those of before go to C++
at once, with the call's program. Whatever else they are, the full path below takes or refuses.
"""

from __future__ import annotations

import marshal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge import _C
from fastmerge.arguments import a_list, a_mapping, a_text, plain
from fastmerge.compute.arrays import Again, Known, Operands, T, equal, known, operands
from fastmerge.compute.cpu import CpuBackend
from fastmerge.compute.programs import program_of
from fastmerge.compute.tensor import Computation, Step, steps
from fastmerge.dtypes import F32
from fastmerge.errors import FastmergeError, brief, is_whole, nearest
from fastmerge.methods import METHODS, REQUIRED, Method, find
from fastmerge.once import cached_property
from fastmerge.tree.nodes import Merge, Node, Stored
from fastmerge.tree.unread import keeps_equal, without_unread

_MOST_FORMS, _MOST_NAMES = 1024, 64
_PLAIN = frozenset((int, float, bool, str, type(None)))  # equal where they are written alike


@dataclass(eq=False)
class _Form:
    """How a call's tensors are merged; a leaf's model is the tensor's place in the call."""

    row: Method
    tree: Node
    known: Known | None = None  # its tensors, once a call has found them to be

    @cached_property
    def steps(self) -> list[Step]:
        """In order; a tree that is a tensor is that tensor, passed through."""
        return steps(self.tree if isinstance(self.tree, Merge) else _passed(self.tree))

    @cached_property
    def _keeps_equal(self) -> bool:
        return keeps_equal(self.tree)

    def keeps_equal(self) -> bool:
        """Whether tensors that are all equal come out as they are."""
        return self._keeps_equal

    @cached_property
    def of_equals(self) -> list[Step]:
        """The same of tensors that are all equal: one of them, where they come out as they are."""
        return steps(_passed(Stored(0, ""))) if self._keeps_equal else self.steps

    @cached_property
    def programs(self) -> dict[str, _C.Program | None]:
        """By the tensor's name, which draws and errors follow."""
        return {}

    def program(self, name: str, known: Known) -> _C.Program | None:
        """For tensors that are ``known``; None where Python has a part in the merge."""
        try:
            return self.programs[name]
        # Another thread may clear them at any time; ValueError: no hash of a writable memoryview.
        except (KeyError, TypeError, ValueError):
            pass
        name = a_text(name, f"{self.row.name}: name")
        count, to_fp32 = len(known.dtypes), known.dtypes[0] is F32
        made = program_of(self.steps, name, known.shape, count=count, to_fp32=to_fp32)
        if len(self.programs) >= _MOST_NAMES:
            self.programs.clear()
        self.programs[name] = made
        return made


_forms: dict[tuple[object, ...], _Form] = {}


def merge(
    method: str,
    tensors: Sequence[T],
    parameters: Mapping[str, Any] | None = None,
    *,
    base: T | None = None,
    seed: int | None = None,
    name: str = "",
    out: T | None = None,
    threads: int | None = None,
) -> T:
    """``tensors`` merged by any method of the table, one that was registered, too.

    ``parameters`` by their names in recipes; per model one number, or one for each tensor.
    """
    key = _key(method, tensors, parameters, base, seed)
    form = None if key is None else _forms.get(key)
    if form is None or form.row is not METHODS.get(method):  # or registered anew
        form = None
        row = _row(method)
        given = {} if parameters is None else a_mapping(parameters, f"{row.name}: parameters")
        name = a_text(name, f"{row.name}: name")
        tensors = a_list(tensors, f"{row.name}: tensors")
        _check(row, given, len(tensors), base is not None)
    else:
        row = form.row
    inputs = [*tensors] if base is None else [*tensors, base]
    # Of deltas the base is another tensor than they are, however equal they may be.
    deltas = base is None and row.of_deltas
    if form is not None:
        form.known = like = form.known or known(inputs)
        program = None if like is None else form.program(name, like)
        if like is not None and program is not None:
            keeps = None if deltas else form.keeps_equal
            made: T | None = like.run(program, inputs, out, threads, keeps)
            if made is not None:
                return made
        name = a_text(name, f"{row.name}: name")
    taken = operands(row.name, inputs)
    if form is None:
        form = _Form(row, _tree(row, given, len(tensors), taken, base is not None, seed))
        if key is not None:
            if len(_forms) >= _MOST_FORMS:
                _forms.clear()
            _forms[key] = form
    views = [*taken.views, taken.zeros()] if deltas else taken.views
    result: T
    result, sink = taken.output(out)
    backend, order = taken.backend(threads), form.steps
    if isinstance(backend, CpuBackend) and not deltas and equal(backend.pool, views):
        order = form.of_equals
    computation = Computation(
        backend, lambda source: views[source.model], name, taken.shape, reported=False
    )
    computation.take(order, sink)
    return result


def _row(method: Any) -> Method:
    row = METHODS.get(method) if isinstance(method, str) else None
    return find(a_text(method, "method"), "method") if row is None else row


def _check(row: Method, given: Mapping[str, Any], count: int, has_base: bool) -> None:
    """Raises FastmergeError for what the method does not take, whatever the tensors are."""
    for name in given:
        if row.parameter(name) is None:
            hint = nearest(name, [p.name for p in row.parameters])
            raise FastmergeError(f"{row.name}: unknown parameter {brief(name)}; {hint}")
    if count < row.min_operands or (row.max_operands and count > row.max_operands):
        raise FastmergeError(f"{row.name}: got {count} tensors; {_arity(row)}")
    if row.base == "required" and not has_base and not row.of_deltas:
        raise FastmergeError(f"{row.name}: needs a base tensor")
    if row.base in ("none", "first", "operand") and has_base:
        raise FastmergeError(f"{row.name}: takes no base tensor of its own; put it in the list")


def _key(
    method: Any, tensors: Any, parameters: Any, base: Any, seed: Any
) -> tuple[object, ...] | None:
    """What a call says but for its tensors' numbers, its name and where it goes: calls of one key
    take the same parameters for tensors of one shape and types. None where that is not plain.
    """
    if type(method) is not str or (type(tensors) is not list and type(tensors) is not tuple):
        return None
    try:
        if type(seed) is not int and seed is not None:
            seed = plain(seed, "seed")
            if type(seed) is not int:
                return None
        said = _said(parameters or {})
        first, *others = tensors if base is None else [*tensors, base]
        key = (method, said, len(tensors), seed, first.shape, first.dtype)
        return None if said is None else (*key, *[tensor.dtype for tensor in others])
    except (AttributeError, FastmergeError, RuntimeError, TypeError, ValueError):
        return None  # odd ones: others see what they are


def _said(given: Mapping[str, Any]) -> bytes | None:
    """The parameters as bytes, which differ where any value or its type does (1 and True, 0.0 and
    -0.0); None where one is of no plain kind.
    """
    numbers = given
    for name, value in given.items():
        kind = type(value)
        if kind in _PLAIN or (kind is list and _PLAIN.issuperset(map(type, value))):
            continue
        value = plain(value, name)
        if type(value) in (list, tuple):
            value = [plain(own, name) for own in value]
        if type(value) not in _PLAIN and not _is_plain_list(value):
            return None
        numbers = {**numbers, name: value}
    # Version 2 has no back references, by which equal values may be written differently.
    return marshal.dumps(numbers if type(numbers) is dict else dict(numbers), 2)


def _is_plain_list(value: Any) -> bool:
    return type(value) in (list, tuple) and _PLAIN.issuperset(map(type, value))


def _tree(
    row: Method,
    given: Mapping[str, Any],
    count: int,
    taken: Operands[Any] | Again[Any],
    has_base: bool,
    seed: int | None,
) -> Node:
    """Raises FastmergeError for parameters that the method does not take."""
    # Every tensor is its own source here: the model index is its place in the list.
    leaves = [Stored(index, "", taken.shape, dtype) for index, dtype in enumerate(taken.dtypes)]
    if not has_base and row.of_deltas:
        leaves.append(Stored(count, "", taken.shape))
    return without_unread(
        Merge(
            row,
            tuple(leaves[:count]),
            leaves[count] if len(leaves) > count else None,
            {p.name: _value(row, p.name, given) for p in row.parameters if not p.per_model},
            tuple(_operand_values(row, given, index, count) for index in range(count)),
            _seed(row, seed),
        )
    )


def _passed(node: Node) -> Merge:
    return Merge(METHODS["passthrough"], (node,), None, {}, ({},))


def _seed(method: Method, seed: Any) -> int | None:
    if not method.random:
        return None
    if not is_whole(seed) or not 0 <= seed < 1 << 64:
        given = "it draws at random" if seed is None else f"not {brief(seed)}"
        raise FastmergeError(f"{method.name}: 'seed' must be a whole number in [0, 2^64); {given}")
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
    return parameter.check(plain(value, f"{method.name}: {name}"), method.name)


def _operand_values(
    method: Method, given: Mapping[str, Any], index: int, count: int
) -> dict[str, Any]:
    own: dict[str, Any] = {}
    names = [p.name for p in method.parameters if p.per_model]
    for name in (name for name in names if name in given):
        value = plain(given[name], f"{method.name}: {name}")
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != count:
                raise FastmergeError(
                    f"{method.name}: {count} tensors but {len(value)} values for '{name}'"
                )
            value = value[index]
        own[name] = value
    return {name: _value(method, name, own) for name in names}
