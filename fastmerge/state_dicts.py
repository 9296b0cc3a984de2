"""Merges of state dictionaries and modules in memory, by their tensors' names."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import live
from fastmerge.arguments import a_flag, a_list, a_mapping, a_text, plain
from fastmerge.compute.batch import Batch, Job
from fastmerge.compute.recording import refuse_traces
from fastmerge.dtypes import F64
from fastmerge.engine.executor import Local
from fastmerge.engine.inputs import needs_host
from fastmerge.errors import (
    FastmergeError,
    ModelError,
    UnsupportedError,
    brief,
    enough_memory,
    in_words,
)
from fastmerge.methods import Parameter, find
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.memory import (
    Extent,
    as_torch,
    check_holds,
    check_torch,
    check_writable,
    dtype_of,
    is_torch,
    place_of,
    written,
)
from fastmerge.models.model import Model
from fastmerge.models.state_dict import (
    StateDict,
    as_model,
    check_apart,
    held_by,
    is_made_anew,
    memory_of,
)
from fastmerge.output.sink import Arrays
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.of_state_dicts import of_state_dicts
from fastmerge.planning.plan import Plan
from fastmerge.tree.nodes import Stored

if TYPE_CHECKING:
    import torch


@enough_memory("merge_state_dicts")
def merge_state_dicts(
    models: Mapping[Any, Any] | Sequence[Any],
    method: Any,
    *,
    parameters: Mapping[str, Any] | None = None,
    base: Hashable = None,
    strict: bool = True,
    dtype: Any = None,
    out_dtype: Any = None,
    seed: int | None = None,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Every tensor of ``models`` merged with its namesakes, by any method of `fastmerge methods`.
    Tensors that are one memory in every model are merged once and are one in the result; integers
    are copied where all models agree. Beside the result only a few tensors are held.

    ``models``: state dictionaries (torch tensors or NumPy arrays), modules, or folders, by id, or
    in a list, whose ids are 0, 1, ... ``method``: its name, or its row. ``base``: the id of one.
    ``parameters``: values by their names in recipes; what each model has its own of (``weight``,
    ``density``) is one value, a list in the models' order, without a base that the method keeps
    apart, or values by id; a value may be a recipe's gradient (by id) or its list of filters.
    ``strict``: models whose names differ are refused; False merges what all have. ``dtype``,
    ``out_dtype``: of the result (torch's or their names), default the inputs'; the arithmetic is
    float32, or float64 where ``dtype`` or an input's type is that. ``seed``: a whole number in [0,
    2^64) for methods that draw; by default it follows from the call. ``out``: a dictionary of
    tensors to write into, or a module whose parameters are filled; it may be one of the models.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU.

    Returns ``out``, or where that is None a new dictionary, in the first model's order, of torch
    tensors (NumPy arrays where the first model has those), which carry no gradient. Raises, where
    possible before anything is written, RecipeError for the method or a value, ModelError for
    tensors that do not fit, UnsupportedError for what is not merged, FastmergeError for another
    argument.
    """
    refuse_traces("merge_state_dicts", "record calls of fastmerge.ops, tensor by tensor")
    row = find(a_text(getattr(method, "name", method), "method"), "method")
    given = models if isinstance(models, Mapping) else dict(enumerate(_listed(models)))
    if not given:
        raise FastmergeError("models: there are none")
    if base is not None and not _is_id(base, given):
        if isinstance(base, Mapping) or callable(getattr(base, "state_dict", None)):
            raise FastmergeError("base: is a model itself; put it among models=, and give its id")
        raise FastmergeError(f"base: no model is called {brief(base)}")
    names = {key: _name(key, number) for number, key in enumerate(given)}
    opened = {names[key]: as_model(source, names[key]) for key, source in given.items()}
    common = _common(opened, a_flag(strict, "strict"))
    twins = _twins(opened, common)
    if out is not None:
        if not isinstance(out, Mapping) and not callable(getattr(out, "state_dict", None)):
            raise FastmergeError(f"out: must be a dictionary or a module, not {brief(out)}")
        twins = _twins_in(out, twins)
    merged = {name: _only(model, common, twins) for name, model in opened.items()}
    recipe: dict[str, Any] = {
        "merge_method": row.name,
        "models": [{"model": names[key], "parameters": {}} for key in given],
        "parameters": {},
    }
    if base is not None:
        recipe["base_model"] = names[base]
    for name, value in {"dtype": dtype, "out_dtype": out_dtype}.items():
        if value is not None:
            recipe[name] = str(value).removeprefix("torch.")
    apart = row.base in ("required", "optional")
    listed = [key for key in given if key != base or not apart]
    asked = {} if parameters is None else a_mapping(parameters, "parameters")
    for name, value in asked.items():
        own = _own_values(row.parameter(name), str(name), value, list(given), listed)
        if own is None:
            recipe["parameters"][name] = plain(value, str(name))
            continue
        for entry, key in zip(recipe["models"], given, strict=True):
            if key in own:
                entry["parameters"][name] = own[key]
    with in_words(_WORDS):
        plan = of_state_dicts(recipe, merged, seed)
    result = _run(plan, list(opened.values()), out, threads)
    if out is None:
        return {name: result[twins.get(name, name)] for name in common}
    return out


# What a message says of the recipe that is made of the arguments, and what of these.
_WORDS = {
    r"^recipe\.parameters\.[^:]*: ": "parameters: ",
    r"^recipe(\.[^:]*)?: ": "",
    r"; give it (in the model's 'parameters:' or for all at the top|under 'parameters:')": (
        "; give it in parameters="
    ),
    r"needs a 'base_model:'": "needs base=",
    r"give both models one of the two$": (
        "give all models one of the two, or leave it out: dictionaries without it, and "
        "strict=False where some have it"
    ),
    r"is (float8\w*), which fastmerge does not merge; convert it .* first$": (
        r"is \1, which is not merged without its scale, if it has one; pass x.to(torch.bfloat16), "
        "times the scale"
    ),
}


# ---------------------------------------------------------------- what is asked


def _listed(models: Any) -> list[Any]:
    try:
        return a_list(models, "models")
    except FastmergeError:
        raise FastmergeError(
            f"models: must be a mapping or a list of models, not {brief(models)}"
        ) from None


def _is_id(value: Any, given: Mapping[Any, Any]) -> bool:
    try:
        return value in given
    except (TypeError, ValueError):  # it has no hash; of a writable memoryview: ValueError
        return False


def _name(key: Hashable, number: int) -> str:
    """What messages and the recipe call a model: a recipe's references have signs of their own."""
    text = str(key)
    return f"models[{number}]" if not text.strip() or set(text) & set("+@\n") else text


def _common(models: Mapping[str, Model], strict: bool) -> list[str]:
    """The names to merge, in the first model's order."""
    (label, first), *others = models.items()
    for other, model in others if strict else ():
        lacks = next((name for name in first.tensors if name not in model.tensors), None)
        extra = next((name for name in model.tensors if name not in first.tensors), None)
        if lacks is not None or extra is not None:
            has, not_has = (label, other) if lacks is not None else (other, label)
            raise ModelError(
                f"models: '{has}' has tensor '{lacks if lacks is not None else extra}' and "
                f"'{not_has}' has not; strict=False merges what all have"
            )
    common = [n for n in first.tensors if all(n in model.tensors for _, model in others)]
    if not common:
        raise ModelError("models: no tensor is in all of them; compare their names")
    return common


def _twins(models: Mapping[str, Model], names: Iterable[str]) -> dict[str, str]:
    """Names whose tensor is, in every model, the memory of an earlier name: that one."""
    firsts: dict[Any, str] = {}
    found = {}
    for name in names:
        key = tuple(
            (memory_of(model, name), model.tensors[name].shape) for model in models.values()
        )
        first = name if None in [place for place, _ in key] else firsts.setdefault(key, name)
        if first != name:
            found[name] = first
    return found


def _twins_in(out: Any, twins: Mapping[str, str]) -> dict[str, str]:
    """Of ``twins`` those that are one memory in ``out``, too: the others are merged, each for its
    own place.
    """
    held = out if isinstance(out, Mapping) else held_by(out, "out")

    def place(name: str) -> Extent | None:
        target = held.get(name)
        if isinstance(target, np.ndarray):
            return place_of(target)
        if not is_torch(target):
            return None
        check_torch(target, f"out: {name}")
        return place_of(target)

    return {name: first for name, first in twins.items() if place(name) == place(first) is not None}


def _only(model: Model, common: Sequence[str], twins: Mapping[str, str]) -> Model:
    """The model without what is not merged."""
    wanted = [name for name in common if name not in twins]
    if wanted == list(model.tensors):
        return model
    if not isinstance(model, (StateDict, Checkpoint)):
        raise UnsupportedError(
            f"{model.label}: has tensors that are not merged; give a model of those in common"
        )
    part = copy(model)
    part.tensors = {name: model.tensors[name] for name in wanted}
    return part


def _own_values(
    parameter: Parameter | None,
    name: str,
    value: Any,
    ids: Sequence[Hashable],
    listed: Sequence[Hashable],
) -> dict[Hashable, Any] | None:
    """What each model is given by its id, or, of a list, by its place among those ``listed``; None
    where it is one value, or a recipe's filters, for all.
    """
    value = plain(value, name)
    if parameter is None or not parameter.per_model:
        return None
    if isinstance(value, Mapping) and not set(value) <= {"filter", "value"}:
        unknown = next((key for key in value if key not in ids), None)
        if unknown is not None:
            raise FastmergeError(f"{name}: no model is called {brief(unknown)}")
        return {key: plain(own, name) for key, own in value.items()}
    if isinstance(value, (list, tuple)) and not any(isinstance(v, Mapping) for v in value):
        if len(value) != len(listed):
            besides = " beside the base" if len(listed) < len(ids) else ""
            raise FastmergeError(f"{name}: {len(value)} values for {len(listed)} models{besides}")
        return {key: plain(own, name) for key, own in zip(listed, value, strict=True)}
    return None


# ---------------------------------------------------------------- where it goes


class _Into(live.Targets):
    """NumPy's arrays as well as torch's."""

    def is_direct(self, target: Any, item: TensorPlan) -> bool:
        if is_torch(target):
            return super().is_direct(target, item)
        if not item.dtype.kernels or item.in_float64:
            return False
        return bool(target.flags.c_contiguous) and dtype_of(target, item.name) == item.dtype

    def fill(self, target: Any, made: NDArray[Any], item: TensorPlan) -> None:
        if is_torch(target):
            super().fill(target, made, item)
            return
        tensor = as_torch(made, item.dtype, item.shape)
        if not item.dtype.mergeable:
            target[...] = tensor.numpy()
        elif target.dtype == np.uint16:  # bfloat16's bits
            import torch

            target[...] = tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        else:
            target[...] = (tensor if item.dtype == F64 else tensor.float()).numpy()


def _run(plan: Plan, models: Sequence[Model], out: Any, threads: int | None) -> Mapping[str, Any]:
    """The plan's tensors, by name, in ``out`` or new."""
    plan = plan.as_numbers
    if out is not None and not isinstance(out, Mapping):
        live.merge_into(out, plan, threads=threads)
        live.forget(out)  # a state dictionary has no stamp by which to know it again
        return {}
    devices = {
        str(getattr(tensor, "device", "cpu"))
        for model in models
        if isinstance(model, StateDict)
        for tensor in model.held.values()
    }
    if len(devices) > 1:
        raise UnsupportedError(
            f"models: their tensors lie on several devices ({', '.join(sorted(devices))}); move "
            "them to one"
        )
    targets = None if out is None else _targets(plan, out)
    if devices and devices != {"cpu"}:
        return merged_on_gpu(plan, targets, devices.pop())
    sink = Arrays() if targets is None else _Into(targets)
    made: dict[str, Any] = {}
    as_numpy = isinstance(models[0], StateDict) and all(
        isinstance(tensor, np.ndarray) for tensor in models[0].held.values()
    )
    with closing(Local(plan, threads=threads).run(sink)) as finished:
        for item, _ in finished:
            if isinstance(sink, _Into):
                sink.settle(item)
            elif as_numpy:
                made[item.name] = _as_given(sink.take(item), item, models[0])
            else:
                made[item.name] = as_torch(sink.take(item), item.dtype, item.shape)
    return made


def _as_given(array: NDArray[Any], item: TensorPlan, first: Model) -> NDArray[Any]:
    """The array in the type that the first model has it in: ml_dtypes' bfloat16, integers."""
    assert isinstance(first, StateDict)
    own = first.held[item.name].dtype
    same = first.tensors[item.name].dtype == item.dtype
    return array.view(own).reshape(item.shape) if same else array


def merged_on_gpu(
    plan: Plan, targets: Mapping[str, torch.Tensor] | None, device: str
) -> dict[str, torch.Tensor]:
    """The tensors of a plan of state dictionaries that lie on ``device``, made on its current
    stream, in ``targets`` or new. Raises UnsupportedError where a model lies elsewhere.
    """
    import torch

    def fetch(stored: Stored) -> torch.Tensor:
        model = plan.models[stored.model]
        if not isinstance(model, StateDict):
            raise UnsupportedError(f"{model.label}: lies on no GPU; load it there as the others")
        tensor: torch.Tensor = model.held[stored.name]
        return tensor

    made, jobs = {}, []
    for item in plan.tensors:
        target = None if targets is None else targets[item.name]
        if needs_host(item):
            raise UnsupportedError(
                f"models: '{item.name}' on {device} is float64, for which there are no GPU "
                "kernels; move the models to the CPU, or convert them to float32"
            )
        if not item.dtype.mergeable:
            made[item.name] = fetch(item.sources[0]).clone()
            continue
        made[item.name] = out = live.out_for(target, item, device)
        jobs.append(Job(item.name, item.root, out))
    with torch.no_grad():
        Batch(jobs, fetch).run()
        for name, target in (targets or {}).items():
            if target is not made[name]:
                target.copy_(made[name])
            written(target)
    return made


def _targets(plan: Plan, out: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of ``out`` to write into; FastmergeError where one is missing, of another shape,
    or is memory that another tensor is still to be read from.
    """
    targets = {}
    for item in plan.tensors:
        target = out.get(item.name)
        if target is None or not (is_torch(target) or isinstance(target, np.ndarray)):
            raise FastmergeError(f"out: has no tensor '{item.name}'")
        if is_torch(target):
            check_torch(target, f"out: {item.name}")
        if item.dtype.mergeable:
            check_holds(target, f"out: {item.name}")
        if tuple(target.shape) != item.shape:
            raise FastmergeError(
                f"out: '{item.name}' has shape {list(target.shape)}, the merge {list(item.shape)}"
            )
        check_writable(target, f"out: '{item.name}'")
        if is_made_anew(target, out.get(item.name)):
            raise FastmergeError(
                f"out: makes '{item.name}' anew for whoever asks, so that nothing would be kept; "
                "give a dictionary of the tensors themselves"
            )
        targets[item.name] = target
    check_apart(targets, live.reads(plan))
    return targets
