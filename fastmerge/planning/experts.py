"""Experts' matrices as transformers 5 has them in its modules, of the tensors that the files have.

Most files hold a matrix for each expert, which that version stacks as it loads them: gate's rows
above up's in ``gate_up_proj``, and ``down_proj`` (transformers 5.23, conversion_mapping.py, whose
names are followed here). What is trained on the stacks finds the files' tensors by this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from fastmerge.models.architecture import LAYER_NUMBER
from fastmerge.planning.inputs import TensorPlan

# The files' matrices of one expert: the module's parameter, and the part of its rows.
_PARTS = {
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
}  # fmt: skip
EXPERT = re.compile(rf"(.+\.experts)\.{LAYER_NUMBER}\.({'|'.join(_PARTS)})\.weight")
# What else is called otherwise, as it is stored and in the module.
_RENAMED = (
    (".block_sparse_moe.gate.weight", ".mlp.gate.weight"),
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
    (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
    (".mlp.experts.fc1.weight", ".mlp.experts.gate_up_proj"),
    (".mlp.experts.fc2.weight", ".mlp.experts.down_proj"),
)
# Whose modules multiply by (in, out), which PEFT learns from them and shapes do not tell of square
# matrices: classes with ``is_transposed``.
IN_OUT = frozenset(("gpt_oss", "openai_privacy_filter", "aria", "aria_text"))


class Place(NamedTuple):
    """A stored tensor; of a stack: that of one expert, rows ``begin`` to ``end`` of its matrix."""

    name: str
    one: int | None = None
    begin: int = 0
    end: int = 0


class Module(NamedTuple):
    """A parameter's places, and the matrices that are stacked in it."""

    places: tuple[Place, ...]
    matrices: int


def stacked(tensors: Mapping[str, TensorPlan]) -> dict[str, Module]:
    """The parameters that modules have and ``tensors`` have in other forms, by their names."""
    found: dict[str, Module] = {}
    groups: dict[str, dict[tuple[int, int], str]] = {}
    for name, tensor in tensors.items():
        for ending, other in _RENAMED:
            if name.endswith(ending):
                made = f"{name.removesuffix(ending)}{other}"
                found[made] = Module(
                    (Place(name),), 1 if len(tensor.shape) < 3 else tensor.shape[0]
                )
        expert = EXPERT.fullmatch(name)
        if expert is not None and len(tensor.shape) == 2:
            parameter, part = _PARTS[expert[3]]
            group = groups.setdefault(f"{expert[1]}.{parameter}", {})
            group[int(expert[2]), part] = name
    for parameter, group in groups.items():
        parts = sorted({part for _, part in group})
        if parts == [1]:  # experts without a gate
            parameter = f"{parameter.removesuffix('gate_up_proj')}up_proj"
        count = max(number for number, _ in group) + 1
        if len(group) != count * len(parts):
            continue  # not all are there
        places = []
        for number in range(count):
            begin = 0
            for part in parts:
                name = group[number, part]
                end = begin + tensors[name].shape[0]
                places.append(Place(name, number, begin, end))
                begin = end
        module = Module(tuple(places), count)
        found[parameter] = module
        found[parameter.replace(".block_sparse_moe.", ".mlp.")] = module
    return found
