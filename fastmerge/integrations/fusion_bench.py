"""FusionBench's sums of state dictionaries (``fusion_bench.utils.state_dict_arithmetic``) on
fastmerge's kernels: each tensor in one pass and with one rounding, where FusionBench has a pass and
a rounding for each model.

::

    from fastmerge.integrations import fusion_bench

    fusion_bench.install()  # until uninstall(); or: with fusion_bench.installed(): ...

Same arguments, same values to rounding. FusionBench computes as before what is not of float32,
float16 or bfloat16 (or not all of one type), what is sparse, or recorded for a gradient, and all
that it refuses. Its modules hold the functions by name: those that are imported by the time of
`install` get ours, and those imported until `uninstall` keep ours until then.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fastmerge import ops
from fastmerge.errors import ResourceError, UnsupportedError
from fastmerge.integrations.replacement import Places, Replacement

if TYPE_CHECKING:
    import torch

__all__ = ["install", "installed", "uninstall"]

_MODULE = "fusion_bench.utils.state_dict_arithmetic"
StateDict = Mapping[str, Any]


def state_dict_avg(state_dicts: list[StateDict]) -> StateDict:
    """The mean of each tensor."""

    def mean(tensors: list[torch.Tensor]) -> Any:
        return ops.linear(tensors, [1.0] * len(tensors))

    return _by_name("state_dict_avg", state_dicts, [], mean)


def state_dict_sum(state_dicts: list[StateDict]) -> StateDict:
    """The sum of each tensor."""

    def total(tensors: list[torch.Tensor]) -> Any:
        return ops.combine(tensors, [1.0] * len(tensors))

    return _by_name("state_dict_sum", state_dicts, [], total)


def state_dict_interpolation(state_dicts: list[StateDict], scalars: list[float]) -> StateDict:
    """sum_i s_i x_i."""
    return _by_name("state_dict_interpolation", state_dicts, [scalars], _weighted(scalars))


def state_dict_weighted_sum(
    state_dicts: list[StateDict],
    weights: list[float],
    device: torch.device | str | None = None,
) -> StateDict:
    """sum_i w_i x_i, a model of weight 0 not read; ``device``: where the result goes."""
    made = _by_name("state_dict_weighted_sum", state_dicts, [weights], _weighted(weights))
    if device is None:
        return made
    return OrderedDict((key, value.to(device, non_blocking=True)) for key, value in made.items())


_OURS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        state_dict_avg,
        state_dict_sum,
        state_dict_interpolation,
        state_dict_weighted_sum,
    )
}


def _places() -> Places:
    """Every module of FusionBench that holds one of its functions, and ours."""
    import importlib

    try:
        home = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ResourceError(
            f"fusion_bench cannot be imported ({error}); pip install fusion-bench"
        ) from error
    for name in _OURS:
        if not callable(getattr(home, name, None)):
            raise UnsupportedError(f"this fusion_bench has no {_MODULE}.{name}; use 0.2")
    theirs = {name: getattr(home, name) for name in _OURS}
    return {
        (module, name): ours
        for name, ours in _OURS.items()
        for module in _holding(name, theirs[name])
    }


def _holding(name: str, function: Any) -> list[Any]:
    """FusionBench's modules that are imported and call ``function`` by ``name``."""
    modules = [m for key, m in [*sys.modules.items()] if key.partition(".")[0] == "fusion_bench"]
    return [module for module in modules if vars(module).get(name) is function]


class _Everywhere(Replacement):
    def restore(self) -> None:
        """Also in what was imported in the meantime, with ours by name."""
        theirs = {name: function for (_, name), function in self.theirs.items()}
        super().restore()
        for name, function in theirs.items():
            for module in _holding(name, _OURS[name]):
                setattr(module, name, function)


_replacement = _Everywhere(_places)


def install() -> None:
    """Puts these functions in the place of FusionBench's; again is no error. Raises ResourceError
    where fusion_bench is not installed, UnsupportedError where it has not these functions.
    """
    _replacement.install()


def uninstall() -> None:
    """Puts FusionBench's own functions back; without `install` it does nothing."""
    _replacement.uninstall()


def installed() -> AbstractContextManager[None]:
    """`install` for the time of a ``with``; where it was installed before, it stays so. Returns the
    context manager. Raises ResourceError and UnsupportedError, when it is entered, as `install`
    does.
    """
    return _replacement.installed()


def _theirs(name: str) -> Callable[..., Any]:
    """FusionBench's own function, whether ours stand in its place or not."""
    for (_, held), function in _replacement.theirs.items():
        if held == name:
            found: Callable[..., Any] = function
            return found
    _places()  # ResourceError without FusionBench, whose business these tensors are
    own: Callable[..., Any] = vars(sys.modules[_MODULE])[name]
    return own


def _weighted(weights: Sequence[float]) -> Callable[[list[torch.Tensor]], Any]:
    return lambda tensors: ops.combine(tensors, weights)


def _by_name(
    name: str,
    state_dicts: list[StateDict],
    arguments: list[Any],
    merged: Callable[[list[torch.Tensor]], Any],
) -> StateDict:
    """``merged`` of the tensors that have one name; by FusionBench's function where it has to."""
    if not _fit(state_dicts, arguments):
        made: StateDict = _theirs(name)(state_dicts, *arguments)  # which says what does not
        return made
    found: OrderedDict[str, Any] = OrderedDict()
    for key in state_dicts[0]:
        tensors = [state_dict[key] for state_dict in state_dicts]
        if _takes(tensors):
            found[key] = merged([tensor.detach().contiguous() for tensor in tensors])
        else:
            found[key] = _theirs(name)([{key: tensor} for tensor in tensors], *arguments)[key]
    return found


def _fit(state_dicts: Any, arguments: list[Any]) -> bool:
    """Whether they are dictionaries of the same keys, with a finite number for each."""
    return (
        isinstance(state_dicts, (list, tuple))
        and bool(state_dicts)
        and all(isinstance(own, dict) and own for own in state_dicts)
        and all(own.keys() == state_dicts[0].keys() for own in state_dicts)
        and all(
            isinstance(numbers, (list, tuple))
            and len(numbers) == len(state_dicts)
            and all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
            for numbers in arguments
        )
    )


def _takes(tensors: list[Any]) -> bool:
    import torch

    first = tensors[0]
    return (
        all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        and first.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and first.device.type in ("cpu", "cuda")
        and all(tensor.layout == torch.strided for tensor in tensors)
        and all((t.dtype, t.shape) == (first.dtype, first.shape) for t in tensors)
        and all(tensor.device == first.device for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
