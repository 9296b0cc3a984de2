"""mergekit 0.1.5's registered methods on fastmerge's kernels, wherever mergekit calls them: its
recipes, ``merge_tensors``, ``merge_state_dicts``, and methods got by name.

::

    from fastmerge.integrations import mergekit_methods

    mergekit_methods.install()  # until uninstall(); or: with mergekit_methods.installed(): ...

fastmerge computes what it has kernels for: float32, float16 and bfloat16 to one of these, in fp32
with one rounding. mergekit computes the rest as before: float64, tensors whose gradient is recorded
(results of ours carry none), what is no plain tensor, a base alone, a density of 0, and numbers
that fastmerge refuses, as weights that sum to 0. What is drawn at random follows from torch's
generator, and is another draw than mergekit's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from fastmerge import ops
from fastmerge.errors import FastmergeError, RecipeError, ResourceError, UnsupportedError
from fastmerge.integrations.replacement import Places, Replacement
from fastmerge.integrations.value_errors import as_value_error
from fastmerge.methods import METHODS, Method

if TYPE_CHECKING:
    import torch

__all__ = ["install", "installed", "uninstall"]

_NAME = "_execute_resolved"
_WIDER = ("arcee_fusion", "ramplus_tl")  # whose results are float32 in mergekit, of any inputs


def _places() -> Places:
    """mergekit's own function, by which all its methods run, and ours."""
    try:
        from mergekit.merge_methods.base import MergeMethod
    except ImportError as error:
        raise ResourceError(f"mergekit cannot be imported ({error}); install it") from error
    if not callable(getattr(MergeMethod, _NAME, None)):
        raise UnsupportedError("this mergekit's methods are not those of 0.1.5; install that")
    return {(MergeMethod, _NAME): _executed}


_replacement = Replacement(_places)


def install() -> None:
    """Puts fastmerge's kernels under mergekit's methods; again is no error. Raises ResourceError
    where mergekit is not installed, UnsupportedError where it is not built as 0.1.5 is.
    """
    _replacement.install()


def uninstall() -> None:
    """Puts mergekit's own function back; without `install` it does nothing."""
    _replacement.uninstall()


def installed() -> AbstractContextManager[None]:
    """`install` for the time of a ``with``; where it was installed before, it stays so. Returns the
    context manager. Raises ResourceError and UnsupportedError, when it is entered, as `install`
    does.
    """
    return _replacement.installed()


def _executed(
    method: Any,
    groups: Sequence[Any],
    parameters: Sequence[dict[str, Any]],
    *,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    batch_options: Any = None,
) -> tuple[torch.Tensor, ...]:
    """`MergeMethod._execute_resolved`: one tensor for each group, in order."""
    kept = [*_replacement.theirs.values()]  # none where another thread puts it back just now
    row = METHODS.get(method.spec.name) if _is_registered(method) else None
    results: list[torch.Tensor | None] = [None] * len(groups)
    for index, (group, given) in enumerate(zip(groups, parameters, strict=True)):
        if row is not None and _takes(group, dtype, out_dtype) and not _keeps_nothing(given):
            with suppress(RecipeError):  # numbers that mergekit may take, or refuses in its words
                results[index] = _merged(row, group, given, dtype, out_dtype)
    left = [index for index, result in enumerate(results) if result is None]
    if left:
        theirs = kept[0] if kept else getattr(type(method), _NAME)
        made = theirs(
            method, [groups[i] for i in left], [parameters[i] for i in left],
            dtype=dtype, out_dtype=out_dtype, batch_options=batch_options,
        )  # fmt: skip
        for index, tensor in zip(left, made, strict=True):
            results[index] = tensor
    return tuple(tensor for tensor in results if tensor is not None)


def _is_registered(method: Any) -> bool:
    """Whether it is mergekit's own, and no other that somebody gave its name."""
    from mergekit.merge_methods.registry import registered_methods

    return any(method is known for known in registered_methods())


def _keeps_nothing(given: Mapping[str, Any]) -> bool:
    """A density of 0, which only mergekit takes in every method."""
    density = given.get("density")
    return isinstance(density, Mapping) and 0 in density.values()


def _takes(group: Any, dtype: torch.dtype | None, out_dtype: torch.dtype | None) -> bool:
    import torch

    with_kernels = (torch.float32, torch.float16, torch.bfloat16)
    tensors = group.tensors
    return (
        len(tensors) > (group.base is not None)
        and tensors[0].numel() > 0
        and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        and all(tensor.dtype in with_kernels for tensor in tensors)
        and all(given is None or given in with_kernels for given in (dtype, out_dtype))
        and all(tensor.device.type in ("cpu", "cuda") for tensor in tensors)
        and all(tensor.layout == torch.strided for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def _merged(
    row: Method,
    group: Any,
    given: dict[str, Any],
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    import torch
    from mergekit.merge_methods.dtype import promoted_dtype

    entries, base = list(group.entries), None
    if row.base == "first":
        entries.sort(key=lambda entry: not entry.is_base)
    elif row.base in ("required", "optional") and group.base is not None:
        entries.remove(group.base)
        base = group.base.tensor
    wanted = promoted_dtype(group) if dtype is None else dtype
    if row.name in _WIDER:
        wanted = torch.float32
    tensors = [_aligned(entry.tensor, dtype) for entry in entries]
    values = {
        name: [own for _, own in value.items()] if hasattr(value, "items") else value
        for name, value in given.items()
        if row.parameter(name) is not None  # task arithmetic has a density there, and no trim
    }
    out = torch.empty(group.tensors[0].shape, dtype=out_dtype or wanted, device=tensors[0].device)
    try:
        made: torch.Tensor = ops.merge(
            row.name,
            tensors,
            values,
            base=None if base is None else _aligned(base, dtype),
            seed=int(torch.randint(1 << 62, (1,)).item()) if row.random else None,
            name=group.metadata.name or "",
            out=out,
        )
    except RecipeError:
        raise
    except FastmergeError as error:
        raise as_value_error(error) from error
    return made


def _aligned(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()
