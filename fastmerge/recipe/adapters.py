"""A recipe whose models are all adapters: what it says, checked without looking at one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fastmerge.dtypes import WITH_KERNELS, DType
from fastmerge.errors import RecipeError, nearest
from fastmerge.methods.adapters import ADAPTER_METHODS, AdapterMethod
from fastmerge.recipe.located import LocatedDict
from fastmerge.recipe.reference import reference
from fastmerge.recipe.section import Section, field, listed, string, whole
from fastmerge.recipe.settings import NO_SETTINGS, Setting, settings
from fastmerge.recipe.stated import Stating


class AdapterEntry(Section):
    """One entry of ``models:``."""

    model: str = field(reference)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)

    def hint(self, name: str) -> str:
        known = {own.name for method in ADAPTER_METHODS.values() for own in method.parameters}
        return "it belongs under 'parameters:'" if name in known else super().hint(name)


class AdapterRecipe(Stating):
    """One document: a method, adapters and what is written. ``base_model`` says that all are of
    that model, whatever they call it.
    """

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template"),
        "these models are adapters, which are merged whole",
    )
    types = WITH_KERNELS
    merge_method: str = field(string)
    name: str | None = field(string, None)
    models: tuple[AdapterEntry, ...] = field(listed(AdapterEntry))
    base_model: str | None = field(reference, None)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)
    dtype: str | None = field(string, None)
    out_dtype: str | None = field(string, None)
    seed: int | None = field(whole(0, below=1 << 64), None)
    random_seed: int | None = field(whole(0, below=1 << 64), None)
    text: str  # as given, to be recorded beside the output

    @classmethod
    def of(cls, data: LocatedDict, text: str) -> AdapterRecipe:
        """Raises FastmergeError with the place of the first fault."""
        made = cls(data)
        made.text = text
        return made

    @property
    def method(self) -> AdapterMethod:
        return ADAPTER_METHODS[self.merge_method]

    @property
    def output_dtype(self) -> DType | None:
        """The type of the factors: ``out_dtype``, else ``dtype``."""
        return self.stated_dtype

    def check(self) -> None:
        if self.merge_method not in ADAPTER_METHODS:
            adapter = self.models[0].model if self.models else "ADAPTER"
            raise RecipeError(
                f"{self.at('merge_method')}: '{self.merge_method}' does not merge adapters alone; "
                f"{nearest(self.merge_method, ADAPTER_METHODS, limit=20)}; for models that have "
                f"them, write 'model: {self.base_model or 'BASE'}+{adapter}'"
            )
        if not self.models:
            raise RecipeError(f"{self.at('models')}: give at least one adapter")
        self.check_seed()
        _ = self.output_dtype
        self.parameters = _checked(self.method, self.parameters)
        for entry in self.models:
            entry.parameters = _checked(self.method, entry.parameters, single=True)


def _checked(
    method: AdapterMethod, given: Mapping[str, Setting], *, single: bool = False
) -> dict[str, Setting]:
    found = {}
    for name, setting in given.items():
        where = setting.rules[0].where
        parameter = method.parameter(name)
        if parameter is None:
            known = [own.name for own in method.parameters]
            others = [m.name for m in ADAPTER_METHODS.values() if m.parameter(name) is not None]
            hint = f"{', '.join(others[:4])} have it" if others else nearest(name, known)
            raise RecipeError(
                f"{where}: no parameter '{name}' of {method.name} of adapters; {hint}"
            )
        if single and not parameter.per_model:
            raise RecipeError(
                f"{where}: '{name}' is of the whole merge; give it in the recipe's 'parameters:'"
            )
        found[name] = setting.checked(parameter)
    return found
