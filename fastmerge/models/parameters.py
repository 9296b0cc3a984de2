"""Parameters that an adapter's config names one by one (``target_parameters``): above all the
experts that are stacked in one tensor, which no linear layer holds.

PEFT wraps a module once for each of its parameters, that which is registered last outermost, and
names the factors by the module and the wrappers around it (peft 0.21, tuners/lora/layer.py,
ParamWrapper): "mlp.experts.base_layer.lora_A.weight" is gate_up_proj's, where down_proj has some
too. A of E experts is (E r, in), of which rows e r to e r + r are expert e's, and B is (out, r E),
of which those are every Eth column from e.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastmerge.errors import ModelError, UnsupportedError
from fastmerge.models.patterns import starts

BASE_LAYER = ".base_layer"
# As the modules of transformers 5 register them; a test compares it with the installed ones.
_ORDER = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "w1", "v1", "up_proj", "up_proj_bias",
    "down_proj", "down_proj_bias", "w2", "weight", "bias",
)  # fmt: skip


class Parameters:
    """Which parameters of a module ``target_parameters`` means: names, or their ends."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._names: dict[str, list[str]] = {}  # of parameters, by the module's end
        for target in config.get("target_parameters") or ():
            module, _, name = target.rpartition(".")
            self._names.setdefault(module, []).append(name)

    def tell(self, parameter: str) -> bool:
        """Whether a parameter of this name is meant."""
        module, _, name = parameter.rpartition(".")
        return any(name in own for own in self._given(module))

    def _given(self, module: str) -> list[list[str]]:
        """For this module's name, and for every module."""
        ends = (module[at:] for at in starts(module))
        named = [name for end in ends for name in self._names.get(end, ())]
        return [named, [*named, *self._names.get("", ())]]

    def of(self, modules: Collection[str], ordinary: Collection[str], where: str) -> dict[str, str]:
        """The parameter that each of ``modules`` stands for, as its factors' names have it, which
        is left out where the module itself is meant. ``ordinary``: those that may be.

        Raises FastmergeError, which begins with ``where``, for what is ambiguous or stale.
        """
        if not self._names:
            return {}
        depths: dict[str, list[str]] = {}
        for name in modules:
            depths.setdefault(name.replace(BASE_LAYER, ""), []).append(name)
        found: dict[str, str] = {}
        for module, wrapped in depths.items():
            given = [list(dict.fromkeys(names)) for names in self._given(module)]
            fits = next((names for names in given if len(names) == len(wrapped)), None)
            if fits is None:
                if len(wrapped) == 1 and (not given[0] or module in ordinary):
                    continue  # target_modules mean it, or nothing does: that is checked with those
                raise ModelError(
                    f"{where}: target_parameters names {', '.join(given[1]) or 'nothing'} of "
                    f"'{module}', which has factors of {len(wrapped)}; one of the two files is "
                    "stale, or a name is too much"
                )
            if not given[0] and module in ordinary:
                continue
            strange = next((name for name in fits if name not in _ORDER), None)
            if strange is not None and len(fits) > 1:
                raise UnsupportedError(
                    f"{where}: the order of '{module}.{strange}' among the parameters of its "
                    "module, by which factors are named, is not known; merge it with PEFT "
                    "(merge_and_unload) first"
                )
            inner = sorted(fits, key=lambda name: _ORDER.index(name) if name in _ORDER else 0)
            for name, parameter in zip(sorted(wrapped, key=len, reverse=True), inner, strict=True):
                found[name] = f"{module}.{parameter}"
        return found
