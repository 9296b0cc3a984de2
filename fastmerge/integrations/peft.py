"""PEFT's merges of adapters, computed by fastmerge's kernels: what
``peft.utils.merge_utils`` holds and ``add_weighted_adapter`` calls.

::

    from fastmerge.integrations import peft

    peft.install()  # until peft.uninstall(); or: with peft.installed(): ...
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="ties", density=0.5)

Same arguments, same values to rounding and of the same type, in fp32 whatever the tensors' type;
but a tensor of weight 0 is not read, and has no vote and no share in `ties` and `dare_ties`, as it
has in PEFT. What is dropped at random follows from torch's generator, as in PEFT, and is another
draw than PEFT's. While they are installed PEFT computes the rest as before: float64, and tensors
whose gradient is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastmerge import ops
from fastmerge.arguments import plain
from fastmerge.errors import FastmergeError, ResourceError, UnsupportedError
from fastmerge.integrations.replacement import Places, Replacement
from fastmerge.integrations.torch_ops import torch_tensors
from fastmerge.integrations.value_errors import as_value_error

if TYPE_CHECKING:
    import torch

__all__ = ["install", "installed", "uninstall"]

_MODULES = ("peft.utils.merge_utils", "peft.tuners.lora.model")  # that hold the functions by name
_VOTES = {"total": "plain", "frequency": "frequency"}
_NOT_OURS = ("float64", "complex64", "complex128")

C = TypeVar("C", bound=Callable[..., Any])


def _or_theirs(ours: C) -> C:
    """The function, but for what PEFT's own computes, where it is that function's place."""
    name = ours.__name__

    @wraps(ours)
    def either(task_tensors: Any, weights: Any, *others: Any, **named: Any) -> Any:
        theirs = next((own for place, own in _replacement.theirs.items() if place[1] == name), None)
        if theirs is None or _takes(task_tensors, weights):
            return ours(task_tensors, weights, *others, **named)
        return theirs(task_tensors, weights, *others, **named)

    return cast(C, either)


def _takes(task_tensors: Any, weights: Any) -> bool:
    """Whether it is for the kernels, to compute or to refuse."""
    import torch

    listed = task_tensors if isinstance(task_tensors, (list, tuple)) else ()
    given = [own for own in (*listed, weights) if isinstance(own, torch.Tensor)]
    recorded = torch.is_grad_enabled() and any(own.requires_grad for own in given)
    named = [str(own.dtype).removeprefix("torch.") for own in given]
    return not recorded and not any(name in _NOT_OURS for name in named)


@_or_theirs
def task_arithmetic(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """sum_i w_i d_i (Ilharco et al. 2022)."""
    return _merged("task_arithmetic", task_tensors, weights)


@_or_theirs
def magnitude_prune(
    task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float
) -> torch.Tensor:
    """sum_i w_i of the int(density * n) largest entries of d_i."""
    return _merged("breadcrumbs", task_tensors, weights, density=density, gamma=0.0)


@_or_theirs
def ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    """Trim, elect by unweighted deltas, divide what agrees by its number (Yadav et al. 2023)."""
    given = _elected(majority_sign_method)
    return _merged("ties", task_tensors, weights, density=density, normalize=True, **given)


@_or_theirs
def dare_linear(
    task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float
) -> torch.Tensor:
    """sum_i w_i of what is left of d_i when entries were dropped at random, over the density (Yu et
    al. 2023).
    """
    return _merged("dare_linear", task_tensors, weights, density=density, rescale="density")


@_or_theirs
def dare_ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    """As `dare_linear`, with `ties`' election and average."""
    given = _elected(majority_sign_method)
    given |= {"normalize": True, "rescale": "density"}
    return _merged("dare_ties", task_tensors, weights, density=density, **given)


_OURS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (task_arithmetic, magnitude_prune, ties, dare_linear, dare_ties)
}


def _places() -> Places:
    """What holds the functions of PEFT, and these."""
    import importlib

    try:
        modules = [importlib.import_module(name) for name in _MODULES]
    except ImportError as error:
        raise ResourceError(f"peft cannot be imported ({error}); pip install peft") from error
    for module in modules:
        for name in _OURS:
            if not callable(getattr(module, name, None)):
                raise UnsupportedError(
                    f"this peft has no {module.__name__}.{name}; use peft 0.10 to 0.21"
                )
    return {(module, name): ours for module in modules for name, ours in _OURS.items()}


_replacement = Replacement(_places)


def install() -> None:
    """Puts these functions in the place of PEFT's; again is no error. Raises ResourceError where
    peft is not installed, UnsupportedError where it has not the functions of 0.10 to 0.21.
    """
    _replacement.install()


def uninstall() -> None:
    """Puts PEFT's own functions back; without `install` it does nothing."""
    _replacement.uninstall()


def installed() -> AbstractContextManager[None]:
    """`install` for the time of a ``with``; where it was installed before, it stays so. Returns the
    context manager. Raises ResourceError and UnsupportedError, when it is entered, as `install`
    does.
    """
    return _replacement.installed()


def _elected(method: str) -> dict[str, Any]:
    if method not in _VOTES:
        raise RuntimeError(f'Unimplemented mask method "{method}"')  # as PEFT does
    return {"votes": _VOTES[method], "divisor": "count"}


def _merged(
    method: str, task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, **given: Any
) -> torch.Tensor:
    """What `ops.merge` makes of deltas; an error that is a ValueError too, as PEFT raises."""
    import torch

    try:
        tensors = [own.detach().contiguous() for own in torch_tensors(task_tensors, method)]
        numbers = plain(weights, f"{method}: weights")
        density = plain(given.get("density"), f"{method}: density")
    except FastmergeError as error:
        raise as_value_error(error) from error
    if isinstance(density, (int, float)) and density >= 1:
        given["density"] = density = 1.0
    trims = method in ("ties", "breadcrumbs")
    least = 1 / max(1, tensors[0].numel())
    # As PEFT has it: of the tensors' products with the weights, fp32 where signs are elected.
    dtype = torch.float32 if "votes" in given else tensors[0].dtype
    for other in (*tensors[1:], weights):
        if isinstance(other, torch.Tensor) and other.ndim:
            dtype = torch.promote_types(dtype, other.dtype)
    if density == 0 or (trims and isinstance(density, (int, float)) and 0 < density < least):
        # Nothing stays, which a recipe may not ask for.
        return torch.zeros_like(tensors[0], dtype=dtype)
    seed = None
    if method.startswith("dare"):
        seed = int(torch.randint(1 << 62, (1,)).item())
    wider = any(own.dtype != dtype for own in tensors)
    out = torch.empty_like(tensors[0], dtype=dtype) if wider else None
    try:
        made: torch.Tensor = ops.merge(
            method, tensors, {"weight": numbers, **given}, seed=seed, out=out
        )
    except FastmergeError as error:
        raise as_value_error(error) from error
    return made
