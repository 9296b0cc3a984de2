"""What a method costs: how often the weights are read, and where it can run."""

from __future__ import annotations

from typing import Any

from fastmerge.methods.shapes import Combination, Consensus, Pointwise
from fastmerge.methods.types import REQUIRED, Method


def cost(method: Method) -> str:
    """How often ``method`` reads the weights with the least that can be given, and on what it runs;
    from its row itself.
    """

    def given(density: float, *, per_model: bool) -> dict[str, Any]:
        own = [parameter for parameter in method.parameters if parameter.per_model == per_model]
        values = {p.name: 1.0 if p.default is REQUIRED else p.default for p in own}
        return values | ({"density": density} if "density" in values else {})

    def passes(density: float) -> int:
        own, each = given(density, per_model=False), [given(density, per_model=True)] * 2
        if isinstance(method, Consensus):
            return method.passes(own, each)
        if isinstance(method, Pointwise):
            return method.passes(own)
        return 1 + (isinstance(method, Combination) and method.needs_gram)

    words = {1: "once", 2: "twice", 3: "three times", 4: "four times"}
    whole, trimmed = passes(1.0), passes(0.5)
    text = f"reads the weights {words[whole]}"
    if trimmed != whole:
        text += f", {words[trimmed]} with a density below 1"
    if max(whole, trimmed) > 1:
        text += " (from the disk, then from memory)"
    return f"{text}; {'CPU and GPU' if method.on_gpu else 'CPU'}"
