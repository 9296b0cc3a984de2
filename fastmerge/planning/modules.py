"""``modules:``: the parts of a multimodal or encoder-decoder model, each merged or stacked as it is
asked. Parts that no module names are copied from the lead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from fastmerge.errors import ModelError, RecipeError, UnsupportedError
from fastmerge.models.architecture import Stack, layer_of
from fastmerge.models.config import part_layers, section
from fastmerge.models.module_names import PARTS, part_of, row_of
from fastmerge.once import cached_property
from fastmerge.planning.build import Builder
from fastmerge.planning.inputs import Part, TensorPlan, View, views_of, with_views
from fastmerge.planning.layers import check_layers


@dataclass(frozen=True, eq=False)
class ModuleView(View):
    """Some parts of a model alone; of one part, with its own layers and what config.json says of
    it.
    """

    row: Stack | None = None
    says: int | None = None  # how many layers

    @cached_property
    def stack(self) -> Stack | None:
        return self.row

    @cached_property
    def counted(self) -> int | None:
        return self.says


class ModulePlan(NamedTuple):
    """What one module of a recipe makes: ``runs`` of layers, or one merge of ``whole`` models, over
    views of its part alone; the lead's. ``part``: "" where all is one module.
    """

    part: str
    runs: Sequence[Part]
    lead: View

    @property
    def whole(self) -> bool:
        return self.runs[0].layers is None


def find_parts(names: Sequence[str], lead: View, where: str) -> tuple[list[str], list[str]]:
    """The part that each module of a recipe means, and the lead's parts that none does; RecipeError
    for a name that means none of the lead's, or a part that two mean.
    """
    there = list(dict.fromkeys(map(part_of, lead.tensors)))
    found: list[str] = []
    for name in names:
        part = next((part for part, (called, _) in PARTS.items() if name in called), None)
        if part not in there:
            # What mergekit infers of a class it has no definition for; its rest is 'default'.
            within = {part_of(tensor) for tensor in lead.tensors if tensor.startswith(f"{name}.")}
            hint = f"; the layers so named are of {' and '.join(sorted(within))}" if within else ""
            raise RecipeError(
                f"{where}: '{lead.label}' has no module '{name}'; it has {', '.join(there)}{hint}"
            )
        if part in found:
            raise RecipeError(f"{where}: '{name}' means the {part} part a second time; keep one")
        found.append(part)
    return found, [part for part in there if part not in found]


def layered(view: View, part: str, where: str) -> View:
    """The one ``part`` of ``view`` whose layers are to be stacked; FastmergeError where they are
    several stacks, or some are missing.
    """
    own = _only(view, (part,))
    if own.stack is None:
        stacks = ", ".join(f"{name}.0." for name in own.layers)
        found = f"several stacks of layers ({stacks})" if stacks else "no layers"
        raise UnsupportedError(
            f"{where}: the {part} part of '{view.label}' has {found}, so 'slices:' cannot choose "
            "among them; list whole models under its 'models:'"
        )
    check_layers(own, where)
    return own


def apart(parts: Sequence[Part], lead: View) -> list[ModulePlan]:
    """The modules that ``parts`` make, each with views of its part alone."""
    found = []
    for makes, own in groupby(parts, key=lambda part: part.makes):
        runs = list(own)
        if makes:
            views = views_of(runs)
            runs = with_views(runs, {key: _only(view, makes) for key, view in views.items()})
        found.append(ModulePlan(", ".join(makes), runs, _only(lead, makes) if makes else lead))
    return found


def by_module(build: Builder, modules: Sequence[ModulePlan], lead: View) -> dict[str, TensorPlan]:
    """The tensors of all modules, where there are several in the order of the lead's."""
    made = [
        build.whole(module.runs[0]) if module.whole else build.stacked(module.runs)
        for module in modules
    ]
    if len(modules) == 1 and not modules[0].part:
        return made[0]
    result: dict[str, TensorPlan] = {}
    for module, own in zip(modules, made, strict=True):
        there = module.lead.tensors
        for name in (*there, *own):
            stacked = not module.whole and layer_of(name) is not None
            if not stacked and (name not in own or name not in there):
                raise ModelError(
                    f"{module.runs[0].where}: tensor '{name}' is not in every model of its module "
                    f"and in '{lead.label}': they are not of one architecture"
                )
    of = {name: number for number, module in enumerate(modules) for name in module.lead.tensors}
    stacks = {number for number, module in enumerate(modules) if not module.whole}
    for name in lead.tensors:
        number = of[name]
        if modules[number].whole:
            result[name] = made[number][name]
        elif number in stacks:  # a stack's names are together, where the first of them was
            result |= made[number]
            stacks.remove(number)
    return result


def _only(view: View, parts: Sequence[str]) -> View:
    """The view with the tensors of ``parts`` alone."""
    own = {name: tensor for name, tensor in view.tensors.items() if part_of(name) in parts}
    alone = ModuleView(view.label, view.config, own, view.donor, view.vocabulary)
    stack = view.stack
    text = len(parts) > 1 or parts[0] == "text"
    if stack is not None and stack.layers in alone.layers and text:
        return replace(alone, row=stack, says=view.counted)
    if len(parts) > 1 or text or len(alone.layers) != 1:
        return alone
    (layers,) = alone.layers
    known = stack if stack is not None and stack.layers == layers else None
    said = part_layers(view.config, parts[0])
    config = {} if said.path is None else dict(section(view.config, said.path))
    outside = [name for name in own if not name.startswith(f"{layers}.")]
    return replace(alone, config=config, row=known or row_of(layers, outside), says=said.number)
