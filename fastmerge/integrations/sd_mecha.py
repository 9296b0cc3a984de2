"""fastmerge's methods as sd-mecha's, and some of sd-mecha's own on fastmerge's kernels.

::

    from fastmerge.integrations import sd_mecha as kernels

    ties = kernels.methods()["ties"]  # one for each method of the table
    delta = ties(sd_mecha.subtract(a, base), sd_mecha.subtract(b, base), density=0.5)

    kernels.install()  # until kernels.uninstall(); or: with kernels.installed(): ...

A method takes deltas where it is of deltas, then the base where it needs one, and its parameters by
their names in recipes (``lambda_``), one number for all models. Its identifier is its name after
``fastmerge_``. What is drawn follows from ``seed`` and the key. Arithmetic is fp32, whatever
``merge_dtype`` is.

`install` moves the arithmetic of ``slerp``, ``n_average`` and ``geometric_median``: the values that
sd-mecha has in float64, to rounding (in fp32 its median stops up to 1e-3 early, where its sum of
distances no longer changes). sd-mecha computes as before what is not of float32, float16 or
bfloat16, and a ``slerp`` whose ``alpha`` is no single number. Its ``ties_sum`` stays its own: where
votes are even it keeps nothing, which is none of `fastmerge.ops.ties`' elections.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge import ops
from fastmerge.errors import ResourceError, UnsupportedError
from fastmerge.integrations.replacement import Places, Replacement
from fastmerge.methods import METHODS, REQUIRED, Method, Parameter

if TYPE_CHECKING:
    import torch

__all__ = ["install", "installed", "methods", "uninstall"]

_PREFIX = "fastmerge_"
_DEFAULTS = {"weight": 1.0}  # of what a recipe must give


def _package() -> Any:
    try:
        import sd_mecha  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ResourceError(
            f"sd_mecha cannot be imported ({error}); pip install sd-mecha"
        ) from error
    if not all(hasattr(sd_mecha, name) for name in ("merge_method", "Parameter", "Return")):
        raise UnsupportedError("this sd_mecha has no merge_method with Parameter; use 1.1")
    return sd_mecha


@cache  # an identifier is registered once
def methods() -> Mapping[str, Any]:
    """Every method of the table as a merge method of sd-mecha's, registered there.

    Returns them by name. Raises ResourceError where sd_mecha is not installed, UnsupportedError
    where it registers no such methods.
    """
    package = _package()
    return {row.name: _registered(package, row) for row in METHODS.values()}


def _registered(package: Any, row: Method) -> Any:
    import torch

    def computed(*tensors: torch.Tensor, **given: Any) -> torch.Tensor:
        key = given.pop("key", "")
        for name in ("key_relation", "cache", "output_reused"):
            given.pop(name, None)
        kind = tensors[0].dtype
        narrow = [_taken(tensor) for tensor in tensors]
        base = narrow.pop() if has_base else None
        seed = given.pop("seed", None)
        given = {names[argument]: value for argument, value in given.items()}
        made: torch.Tensor = ops.merge(
            row.name, narrow, given, base=base, seed=None if seed is None else int(seed), name=key
        )
        return made.to(kind)

    names = {own.argument: own.name for own in row.parameters}
    has_base = row.base == "required" and not row.of_deltas
    space = ("delta",) if row.of_deltas else ()
    kinds = inspect.Parameter
    tensor = package.Parameter(torch.Tensor, *space)
    operands = [kinds("models", kinds.VAR_POSITIONAL, annotation=tensor)]
    if row.max_operands is not None:  # each by its place
        count = row.max_operands + has_base
        places = [*(f"model_{i}" for i in range(row.max_operands)), "base"]
        operands = [
            kinds(place, kinds.POSITIONAL_ONLY, annotation=tensor) for place in places[:count]
        ]
    numbers = [_parameter(package, own) for own in row.parameters]
    if row.random:
        seed = kinds("seed", kinds.KEYWORD_ONLY, annotation=package.Parameter(int), default=0)
        numbers.append(seed)
    computed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*operands, *numbers, kinds("kwargs", kinds.VAR_KEYWORD)],
        return_annotation=package.Return(torch.Tensor, *space),
    )
    computed.__doc__ = row.summary
    return package.merge_method(computed, identifier=_PREFIX + row.name)


def _parameter(package: Any, own: Parameter) -> inspect.Parameter:
    """One of a method's parameters in a signature of sd-mecha's."""
    words = {value: word for word, value in own.words}
    kind: type = str if own.words or own.choices else own.kind
    default = _DEFAULTS.get(own.name, inspect.Parameter.empty)
    if own.default is not REQUIRED:
        default = 1.0 if own.default is None else words.get(own.default, own.default)
    return inspect.Parameter(
        own.argument, inspect.Parameter.KEYWORD_ONLY, annotation=package.Parameter(kind),
        default=default,
    )  # fmt: skip


def slerp(a: torch.Tensor, b: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The direction by spherical interpolation, the length between the two (Shoemake 1985);
    linear where the angle is 0 or pi, or a length is 0.
    """
    alpha_is_one = getattr(alpha, "numel", lambda: 1)() == 1
    if not (_takes([a, b]) and alpha_is_one):
        made: torch.Tensor = _theirs("slerp")(a, b, alpha)
        return made
    t = float(alpha)
    a, b = a.detach().contiguous(), b.detach().contiguous()
    products = ops.gram([a, b])
    lengths = np.sqrt(np.diagonal(products))
    factors = np.array([1 - t, t])
    if lengths.all():
        angle = math.acos(min(1.0, max(-1.0, products[0, 1] / lengths.prod())))
        sines = np.array([math.sin((1 - t) * angle), math.sin(t * angle)])
        if math.sin(angle):
            factors = sines / math.sin(angle) / lengths * (factors @ lengths)
    made = ops.combine([a, b], factors)
    return made


def n_average(*models: Mapping[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """The mean."""
    key = kwargs["key"]
    tensors = [model[key] for model in models]
    if not (tensors and _takes(tensors)):
        made: torch.Tensor = _theirs("n_average")(*models, **kwargs)
        return made
    made = ops.linear([tensor.detach().contiguous() for tensor in tensors], [1.0] * len(tensors))
    return made


def geometric_median(
    *models: torch.Tensor, eps: float = 1e-6, maxiter: int = 100, ftol: float = 1e-20
) -> torch.Tensor:
    """The point with the least sum of distances (Weiszfeld 1937), all steps in the inner
    products of the models: their numbers are read twice.
    """
    if not _takes(models):
        made: torch.Tensor = _theirs("geometric_median")(
            *models, eps=eps, maxiter=maxiter, ftol=ftol
        )
        return made
    tensors = [model.detach().contiguous() for model in models]
    products = ops.gram(tensors)

    def distances(weights: Any) -> Any:
        """From sum_i w_i x_i, whose weights have the sum 1, to each of the x_i."""
        away = np.eye(len(weights)) - weights
        return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", away, products, away), 0))

    weights = np.full(len(tensors), 1 / len(tensors))
    objective = distances(weights).mean()
    for _ in range(max(0, int(maxiter))):
        inverse = 1 / np.maximum(distances(weights), eps)
        weights = inverse / inverse.sum()
        before, objective = objective, distances(weights).mean()
        if abs(before - objective) <= ftol * objective:
            break
    made = ops.combine(tensors, weights)
    return made


_OURS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (slerp, n_average, geometric_median)
}


def _places() -> Places:
    """sd-mecha's merge methods, and the functions that they shall call."""
    package = _package()
    for name in _OURS:
        if not callable(getattr(getattr(package, name, None), "__wrapped__", None)):
            raise UnsupportedError(f"this sd_mecha has no merge method {name}; use 1.1")
    return {(getattr(package, name), "__wrapped__"): ours for name, ours in _OURS.items()}


_replacement = Replacement(_places)


def install() -> None:
    """Puts fastmerge's kernels under sd-mecha's methods; again is no error. Raises ResourceError
    where sd_mecha is not installed, UnsupportedError where it has not these methods.
    """
    _replacement.install()


def uninstall() -> None:
    """Puts sd-mecha's own functions back; without `install` it does nothing."""
    _replacement.uninstall()


def installed() -> AbstractContextManager[None]:
    """`install` for the time of a ``with``; where it was installed before, it stays so. Returns the
    context manager. Raises ResourceError and UnsupportedError, when it is entered, as `install`
    does.
    """
    return _replacement.installed()


def _theirs(name: str) -> Callable[..., Any]:
    """sd-mecha's own function, whether ours stands in its place or not."""
    method = getattr(_package(), name)
    own: Callable[..., Any] = _replacement.theirs.get((method, "__wrapped__"), method.__wrapped__)
    return own


def _taken(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels take it; in float32 where they have not its type."""
    import torch

    with_kernels = (torch.float32, torch.float16, torch.bfloat16)
    return (tensor if tensor.dtype in with_kernels else tensor.float()).detach().contiguous()


def _takes(tensors: Sequence[Any]) -> bool:
    import torch

    return all(
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and tensor.dtype == tensors[0].dtype
        and tensor.shape == tensors[0].shape
        and tensor.numel() > 0
        and not (torch.is_grad_enabled() and tensor.requires_grad)
        for tensor in tensors
    )
