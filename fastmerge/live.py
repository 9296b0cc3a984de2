"""Merges into the parameters of a live torch model, in place, on the device where they are.

A model on a GPU is merged there from sources that stay on the device, or in pinned memory, between
calls. Where they stay on the device, so does what was prepared for them: a candidate of a walk or a
sweep, which differs from the one before in coefficients or values, costs the kernels' time. Of an
adapted model that is its base and the factors, of one stored as codes those and their scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.arguments import a_function, one_of
from fastmerge.compute.batch import Batch, Job, form_of
from fastmerge.compute.cpu import cpu, thread_count
from fastmerge.compute.devices import GPU_MEMORY_BYTES
from fastmerge.compute.lane import Lane
from fastmerge.compute.on_device import made_count
from fastmerge.compute.tensor import Outcome
from fastmerge.engine import in_memory
from fastmerge.engine.executor import Local
from fastmerge.engine.inputs import Inputs, needs_host
from fastmerge.errors import FastmergeError, ModelError, ResourceError, UnsupportedError, brief
from fastmerge.models.memory import (
    as_torch,
    check_holds,
    check_writable,
    is_torch,
    view_of,
    written,
)
from fastmerge.models.model import Model
from fastmerge.models.state_dict import StateDict, check_apart, held_by, is_made_anew
from fastmerge.output.sink import Arrays
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.tree.nodes import Leaf, Node, Stored, leaves, walk

if TYPE_CHECKING:
    import torch

OnTensor = Callable[[TensorPlan, "np.ndarray[Any, Any]"], None]  # as `materialise_plan` has it
KEEP = ("auto", "device", "pinned")
# Of the device, for sources that pass through it; where less is free, something is wrong.
_LEAST_BYTES = 64 << 20
_SLAB_BYTES = 512 << 20  # of pinned memory


class _Prepared(NamedTuple):
    """Merges of some of a plan's tensors. ``outs`` are the parameters, or tensors of the plan's
    type where that is another one.
    """

    items: Sequence[TensorPlan]
    outs: Sequence[torch.Tensor]
    batch: Batch


class _Limit(NamedTuple):
    """Device memory of one group of tensors: what is made of codes and adapters, and with
    ``passing`` the sources, which do not stay there.
    """

    nbytes: int
    passing: bool

    def of(self, item: TensorPlan) -> int:
        return 4 * made_count(item.root) + (item.bytes_in if self.passing else 0)


class _Held:
    """What is kept for one model: source tensors, and the merges prepared last."""

    def __init__(self) -> None:
        self.tensors: dict[Any, torch.Tensor] = {}
        self.lanes: dict[torch.device, Lane] = {}
        self.prepared_for: Any = None  # models and outputs
        self._slab: torch.Tensor | None = None
        self._slab_used = 0
        self.prepared: list[_Prepared] = []

    @staticmethod
    def key(model: Model, name: str, keep: str, device: torch.device) -> tuple[Any, ...]:
        """What a source tensor is kept under."""
        return model.label, model.stamp, name, keep, str(device)

    def let_go_of_device(self) -> None:
        """Forgets what lies in device memory, and keeps what is pinned."""
        self.prepared_for, self.prepared = None, []
        self.tensors = {key: x for key, x in self.tensors.items() if key[3] == "pinned"}

    def pinned(self, nbytes: int, *, pin: bool) -> torch.Tensor:
        """Host memory for one source. torch rounds each pinned block up to a power of two, which
        for a 7 B model's 90 MB matrices is 128 MiB: so most share slabs of one.
        """
        import torch

        if nbytes > _SLAB_BYTES // 4:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin)
        if self._slab is None or self._slab_used + nbytes > _SLAB_BYTES:
            self._slab = torch.empty(_SLAB_BYTES, dtype=torch.uint8, pin_memory=pin)
            self._slab_used = 0
        begin = self._slab_used
        self._slab_used = begin + -(-nbytes // 256) * 256
        return self._slab[begin : begin + nbytes]


_HELD: WeakKeyDictionary[Any, _Held] = WeakKeyDictionary()


def merge_into(
    model: Any,
    plan: Plan,
    *,
    keep: str = "auto",
    threads: int | None = None,
    gpu_memory: int = GPU_MEMORY_BYTES,
    observe: OnTensor | None = None,
) -> dict[str, Outcome]:
    """Merges ``plan`` into ``model``'s parameters: what a folder written from it would hold.
    Parameters on the CPU are filled by the CPU kernels, and so are a GPU's where ``observe`` is to
    see every tensor, and those whose rows come from several places.

    ``model``: a torch module. ``plan``: of `fastmerge.plan`. ``keep``: where a GPU model's sources
    stay between calls, "device" or "pinned"; "auto" is the device where they fit, and warns where
    they do not; `forget` lets go of them. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU. ``gpu_memory``: bytes of the device that pinned sources pass
    through, as do the numbers that adapted weights and codes stand for. ``observe``: a function of
    the tensor's plan and its array, called for each.

    Returns what each tensor came to, by name. Raises, before any parameter changes, ModelError
    where plan and model do not fit, UnsupportedError for what is not done in place, FastmergeError
    for another argument; ResourceError where the GPU has no room, perhaps half-way, which it says.
    """
    import torch

    one_of(keep, KEEP, "keep")
    a_function(observe, "observe")
    _a_module(model)
    plan = _a_plan(plan).as_numbers
    targets = _targets(model, plan)
    with torch.no_grad():
        if observe is not None or not _uses_gpu(targets):
            return _merged_on_cpu(plan, targets, threads, observe)
        # Embeddings of merged tokenizers, say: of a candidate where its template's are.
        rows = {item.name for item in (plan.template or plan).tensors if needs_host(item)}
        on_cpu = {name: targets.pop(name) for name in list(targets) if name in rows}
        held = _HELD.setdefault(model, _Held())
        place = _place(held, plan, targets, gpu_memory) if keep == "auto" else keep
        while True:
            with suppress(torch.cuda.OutOfMemoryError):
                outcomes = _merged_on_gpu(held, plan, targets, place, gpu_memory)
                # Last: a GPU refuses before anything changes.
                return outcomes | (_merged_on_cpu(plan, on_cpu, threads, None) if on_cpu else {})
            # Not in a handler: there the exception's frames still hold the tensors.
            held.let_go_of_device()
            torch.cuda.empty_cache()
            if keep == "device" or (place == "pinned" and gpu_memory < 2 * _LEAST_BYTES):
                raise ResourceError(
                    "the GPU has no room to merge the model in its memory, and its weights may be "
                    "half old, half new; end other programs on it, use keep='pinned', or load the "
                    "model on the CPU"
                )
            gpu_memory = gpu_memory // 2 if place == "pinned" else gpu_memory
            place = "pinned"
            _warn(f"ran out of memory; sources now pass through {gpu_memory >> 20} MiB of it")


def tensors(
    plan: Plan, *, threads: int | None = None, observe: OnTensor | None = None
) -> Iterator[tuple[TensorPlan, torch.Tensor]]:
    """Every output tensor of ``plan`` as a torch tensor on the CPU, of the type that it is written
    in, in plan order; ``observe`` sees each first. Raises FastmergeError as a merge does.
    """
    a_function(observe, "observe")
    for item, array in in_memory.materialise_plan(_a_plan(plan), threads=threads):
        if observe is not None:
            observe(item, array)
        yield item, as_torch(array, item.dtype, item.shape)


class Targets(Arrays):
    """A caller's own tensors, by the plan's names. The kernels write into those on the CPU where
    type and layout allow it, and else beside them.
    """

    def __init__(self, targets: Mapping[str, Any]) -> None:
        super().__init__(targets)
        self._targets = targets

    def slot(self, item: TensorPlan) -> _C.Sink:
        target = self._targets[item.name]
        if self.is_direct(target, item):
            return _C.MemorySink(view_of(target, item.name, writable=True))
        return super().slot(item)

    def settle(self, item: TensorPlan) -> None:
        """Ends one tensor whose numbers are there."""
        target = self._targets[item.name]
        if not self.is_direct(target, item):
            self.fill(target, self.take(item), item)
        elif is_torch(target):
            written(target)

    def is_direct(self, target: Any, item: TensorPlan) -> bool:
        """Whether the kernels write into ``target``."""
        by_kernels = item.dtype.kernels and not item.in_float64
        return by_kernels and target.device.type == "cpu" and is_stored(target, item)

    def fill(self, target: Any, made: NDArray[Any], item: TensorPlan) -> None:
        """Copies the tensor as `Arrays` has it into ``target``."""
        target.copy_(as_torch(made, item.dtype, item.shape))


class _Parameters(Targets):
    """A model's tensors; somebody may be to see each."""

    def __init__(self, targets: Mapping[str, torch.Tensor], observe: OnTensor | None) -> None:
        super().__init__(targets)
        self._observe = observe

    def is_direct(self, target: torch.Tensor, item: TensorPlan) -> bool:
        return self._observe is None and super().is_direct(target, item)

    def fill(self, target: torch.Tensor, made: NDArray[Any], item: TensorPlan) -> None:
        if self._observe is not None:
            self._observe(item, made)
        super().fill(target, made, item)


def _merged_on_cpu(
    plan: Plan, targets: Mapping[str, torch.Tensor], threads: int | None, observe: OnTensor | None
) -> dict[str, Outcome]:
    sink = _Parameters(targets, observe)
    outcomes: dict[str, Outcome] = {}
    with closing(Local(plan, threads=threads).run(sink)) as finished:
        for item, outcome in finished:
            sink.settle(item)
            outcomes[item.name] = outcome
    plan.check_unchanged()
    return outcomes


def is_stored(target: torch.Tensor, item: TensorPlan) -> bool:
    """Whether the parameter's memory is the tensor as it would be written."""
    import torch

    is_plain = type(target) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and target.dtype == getattr(torch, item.dtype.name) and target.is_contiguous()


def _merged_on_gpu(
    held: _Held, plan: Plan, targets: Mapping[str, torch.Tensor], place: str, gpu_memory: int
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for items, outs, batch in _prepared(held, plan, targets, place, gpu_memory):
        for item, out, outcome in zip(items, outs, batch.run(), strict=True):
            outcomes[item.name] = outcome
            target = targets[item.name]
            if out.data_ptr() == target.data_ptr():  # the parameter itself, under whichever object
                written(target)
            else:
                target.copy_(out)
    return outcomes


def _place(held: _Held, plan: Plan, targets: Mapping[str, torch.Tensor], gpu_memory: int) -> str:
    """ "device" where all sources have room beside the model, else "pinned"."""
    need: dict[torch.device, int] = {}
    made: dict[torch.device, int] = {}
    for item in (plan.template or plan).tensors:
        if item.name not in targets:
            continue
        device = targets[item.name].device
        made[device] = made.get(device, 0) + 4 * made_count(item.root)
        for source in item.sources:
            if held.key(plan.models[source.model], source.name, "device", device) in held.tensors:
                continue
            need[device] = need.get(device, 0) + source.nbytes
    for device, nbytes in need.items():
        room = _room(device)
        if room is not None and nbytes + min(made[device], gpu_memory) > room:
            _warn(
                f"has {room / 1e9:.1f} GB free on {device} and the sources take {nbytes / 1e9:.1f} "
                "GB; they stay in pinned memory"
            )
            return "pinned"
    return "device"


def _room(device: torch.device) -> int | None:
    """Bytes of the device that sources may fill: a tenth of what is free is left for the merge."""
    import torch

    if device.type != "cuda":  # the interpreter's
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + cached) * 9 // 10


def _warn(what: str) -> None:
    warnings.warn(f"merge_into: the GPU {what}", stacklevel=3)


def forget(model: Any) -> None:
    """Lets go of the sources that `merge_into` kept for ``model``.

    ``model``: a torch module; one for which nothing is kept is no error. Raises FastmergeError for
    anything else.
    """
    _HELD.pop(_a_module(model), None)


def _a_module(model: Any) -> Any:
    import torch

    if not isinstance(model, torch.nn.Module):
        raise FastmergeError(f"model: must be a torch module, not {type(model).__name__}")
    return model


def _a_plan(plan: Any) -> Plan:
    if not isinstance(plan, Plan):
        raise FastmergeError(f"plan: must be what fastmerge.plan returns, not {brief(plan)}")
    return plan


def _uses_gpu(targets: Mapping[str, torch.Tensor]) -> bool:
    return any(target.device.type == "cuda" for target in targets.values())


def _targets(model: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """The model's tensor for each of the plan's; every parameter must be one of them or tied to
    one.
    """
    state, again = held_by(model, "model"), held_by(model, "model")
    targets: dict[str, torch.Tensor] = {}
    for item in plan.tensors:
        target = state.get(item.name)
        if not item.dtype.mergeable:  # integers stay
            continue
        if target is None:
            raise ModelError(f"the model has no parameter '{item.name}'")
        check_holds(target, item.name)
        if tuple(target.shape) != item.shape:
            raise ModelError(
                f"{item.name}: the model has {list(target.shape)}, the merge {list(item.shape)}"
            )
        check_writable(target, f"{item.name}: the model's tensor")
        if is_made_anew(target, again.get(item.name)):
            raise ModelError(
                f"{item.name}: the model's state_dict() makes it anew for whoever asks, so that "
                "nothing would be kept; remove the hook that does"
            )
        targets[item.name] = target
    kinds = {target.device.type: name for name, target in targets.items()}
    if len(kinds) > 1 or "meta" in kinds:
        places = ", ".join(f"{name} on {kind}" for kind, name in kinds.items())
        raise UnsupportedError(
            f"the model is not whole on one kind of device ({places}); load it without offloading"
        )
    # Tied parameters are one memory: of two different results the later would win.
    made: dict[int, TensorPlan] = {}  # by address
    for item in plan.tensors:
        target = targets.get(item.name)
        if target is None:
            continue
        first = made.setdefault(target.data_ptr(), item) if target.numel() else item
        if first.root is not item.root:
            raise ModelError(
                f"the model ties '{item.name}' to '{first.name}', and the merge makes two of them; "
                "load the model with tie_word_embeddings=False"
            )
    filled = {target.data_ptr() for target in targets.values()}
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() not in filled:
            raise ModelError(f"the merge has no tensor for the model's parameter '{name}'")
    if any(isinstance(source, StateDict) for source in plan.models):
        firsts = {item.name for item in made.values()}
        check_apart({n: t for n, t in targets.items() if n in firsts}, reads(plan))
    return targets


def reads(plan: Plan) -> Iterator[tuple[Model, str, str]]:
    """Of each tensor that is read its model, its name there, and the name that it is read for."""
    for item in plan.tensors:
        for source in item.sources:
            yield plan.models[source.model], source.name, item.name


def _prepared(
    held: _Held, plan: Plan, targets: Mapping[str, torch.Tensor], keep: str, gpu_memory: int
) -> Iterator[_Prepared]:
    """The merges of one plan; kept for the next call where all sources stay on the device, which
    may be another plan's, of the same models and outputs, whose trees have the same form.
    """
    items = [item for item in plan.tensors if item.name in targets]
    roots = {item.name: item.root for item in items}
    key = (
        [(model.label, model.stamp) for model in plan.models],
        [(item.name, item.dtype.code, targets[item.name].data_ptr()) for item in items],
    )
    if keep == "device" and held.prepared_for == key:
        known = held.prepared
        if all(batch.adopt([roots[item.name] for item in its]) for its, _, batch in known):
            yield from known
            return
    held.prepared_for, held.prepared = None, []
    made = []
    widest = _widest(plan, roots) if keep == "device" else plan
    # Half: while one group is on its way, the one before it is still there.
    limit = _Limit(gpu_memory // 2, True) if keep == "pinned" else _Limit(gpu_memory, False)
    inputs = Inputs(plan.models)
    groups = list(_groups(widest, targets, limit))
    scratch = _scratch(groups, targets)
    for group in groups:
        device = targets[group[0].name].device
        on_device: dict[Stored, torch.Tensor] = {}
        for leaf in (node for item in group for node in walk(item.root) if isinstance(node, Leaf)):
            inputs.check(leaf)
        for source in leaves([item.root for item in group]):
            stored = _source(held, plan.models[source.model], source.name, keep, device)
            on_device[source] = stored.to(device, non_blocking=True)
        outs = [out_for(targets[item.name], item, device) for item in group]
        jobs = [Job(item.name, item.root, out) for item, out in zip(group, outs, strict=True)]
        prepared = _Prepared(group, outs, Batch(jobs, on_device.__getitem__, scratch[device]))
        if keep == "device":
            made.append(prepared)
        if widest is not plan:
            prepared.batch.adopt([roots[item.name] for item in group])
        yield prepared
    if keep == "device":
        held.prepared_for, held.prepared = key, made


def _widest(plan: Plan, roots: Mapping[str, Node]) -> Plan:
    """What to prepare: the plan's template, if its merges' forms hold those of ``roots``."""
    if plan.template is None:
        return plan
    wide = {item.name: item.root for item in plan.template.tensors}
    fits = all(form_of(n, wide[n]).holds(form_of(n, root)) for n, root in roots.items())
    return plan.template if fits else plan


def out_for(target: torch.Tensor | None, item: TensorPlan, device: Any) -> torch.Tensor:
    """The target itself, or a new tensor of the plan's type, from which it is then filled."""
    import torch

    if target is not None and is_stored(target, item):
        return target
    return torch.empty(item.shape, dtype=getattr(torch, item.dtype.name), device=device)


def _scratch(
    groups: Sequence[Sequence[TensorPlan]], targets: Mapping[str, torch.Tensor]
) -> dict[torch.device, torch.Tensor]:
    """For each device memory that its groups share, for what codes and adapters come to."""
    import torch

    most: dict[torch.device, int] = {}
    for group in groups:
        device = targets[group[0].name].device
        count = sum(made_count(item.root) for item in group)
        most[device] = max(most.get(device, 0), count)
    return {d: torch.empty(n, dtype=torch.float32, device=d) for d, n in most.items()}


def _groups(
    plan: Plan, targets: Mapping[str, torch.Tensor], limit: _Limit
) -> Iterator[Sequence[TensorPlan]]:
    """The plan's tensors by device, in groups within the limit, or of one tensor."""
    group: list[TensorPlan] = []
    size = 0
    items = [item for item in plan.tensors if item.name in targets]
    for item in sorted(items, key=lambda item: str(targets[item.name].device)):
        nbytes = limit.of(item)
        other = bool(group) and targets[group[0].name].device != targets[item.name].device
        if group and (other or size + nbytes > limit.nbytes):
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    if group:
        yield group


def _source(held: _Held, model: Model, name: str, keep: str, device: torch.device) -> torch.Tensor:
    """A source tensor from where it is kept, read from its file the first time."""
    import torch

    key = held.key(model, name, keep, device)
    if key not in held.tensors:
        view, entry = model.view(name), model.tensors[name]  # RAW bytes of codes
        pool = cpu(thread_count()).pool
        if keep == "device":
            if device not in held.lanes:
                held.lanes[device] = Lane(str(device), pool)
            lane = held.lanes[device]
            with lane.current():
                tensor = lane.upload(view)
            lane.wait()
        else:
            raw = held.pinned(view.nbytes, pin=device.type == "cuda")
            into = _C.View(raw.data_ptr(), view.nbytes, "RAW", raw)
            _C.copy(pool, _C.View(view.address, view.nbytes, "RAW", view), _C.MemorySink(into))
            tensor = raw if view.dtype == "RAW" else raw.view(getattr(torch, entry.dtype.name))
        model.drop(name)
        held.tensors[key] = tensor
    return held.tensors[key]
