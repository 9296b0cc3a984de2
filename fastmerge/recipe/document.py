"""mergekit's recipe language: what it says, checked as far as it can be without looking at a model.

A recipe is one document, or several that name each other (mergekit-multi). Every fault raises
FastmergeError with one line: the place ('recipe.yml:12'), what is wrong, and the remedy. Keys of
mergekit's language that fastmerge does not support are refused by name; nothing is silently
ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, ClassVar

from fastmerge.dtypes import DType
from fastmerge.dtypes import parse as parse_dtype
from fastmerge.errors import RecipeError, UnsupportedError, nearest
from fastmerge.methods import METHODS, Method, find
from fastmerge.recipe.reference import reference
from fastmerge.recipe.section import Section, field, listed, string, whole
from fastmerge.recipe.settings import NO_SETTINGS, Setting, extrapolations, settings
from fastmerge.recipe.source import read
from fastmerge.recipe.templates import TEMPLATES
from fastmerge.recipe.tokenizer import TokenizerSection, chat_template, check_template

# mergekit 0.1.5's methods that have no row here, so that they are refused by name and not by
# spelling.
_NOT_YET = (
    "arcee_fusion", "della", "della_linear", "nearswap", "ram", "ramplus_tl", "sce",
)  # fmt: skip
# Parameters that only those methods (or older versions) read. People leave them in.
_FOREIGN_PARAMETERS = ("alpha", "embed_slerp", "epsilon", "gamma", "r", "select_topk")


# ---------------------------------------------------------------- sections


class _Parametrised(Section):
    """A section with ``parameters:``."""

    def hint(self, name: str) -> str:
        return "it belongs under 'parameters:'" if _is_parameter(name) else super().hint(name)


def _is_parameter(name: str) -> bool:
    """Of any method, with those that are registered by now."""
    return any(method.parameter(name) for method in METHODS.values())


class ModelEntry(_Parametrised):
    """One entry of ``models:``."""

    model: str = field(reference)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)
    # Only the whole model; for parts there is `slices`.
    layer_range: tuple[int, ...] | None = field(listed(whole(), 2), None)


class SliceSource(_Parametrised):
    """One entry of a slice's ``sources:``: layers [start, end) of a model."""

    model: str = field(reference)
    layer_range: tuple[int, ...] = field(listed(whole(), 2))
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)

    def check(self) -> None:
        start, end = self.layer_range
        if not 0 <= start < end:
            raise RecipeError(
                f"{self.at('layer_range')}: layer_range [{start}, {end}] must be [start, end) "
                "with 0 <= start < end"
            )


class Slice(_Parametrised):
    """One entry of ``slices:``: a run of output layers."""

    refused: ClassVar[Mapping[str, str]] = {
        "residual_weight": "mergekit reads it and does nothing with it; remove it",
    }
    sources: tuple[SliceSource, ...] = field(listed(SliceSource))
    base_model: str | None = field(reference, None)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)

    def check(self) -> None:
        if not self.sources:
            raise RecipeError(f"{self.at('sources')}: a slice needs at least one source")
        lengths = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(lengths)) > 1:
            raise RecipeError(
                f"{self.at('sources')}: every source of a slice must give the same number of "
                f"layers, not {', '.join(map(str, lengths))}"
            )


_MOE = "mixture-of-experts recipes are not merges of one architecture; use mergekit-moe"
_SCHEDULE = "this is a schedule; run `fastmerge retrograde`"


class Document(_Parametrised):
    """One document: a method, its inputs and what it writes."""

    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("baseline", "pool", "schedule"), _SCHEDULE),
        "modules": "merge a model of several modules with 'models:' (every tensor, by name)",
        "gate_mode": _MOE,
        "experts": _MOE,
        "experts_per_token": _MOE,
        "shared_experts": _MOE,
        "input_model_parameters": "mergekit dropped it; use each model's 'parameters:'",
        "embed_slerp": "mergekit dropped it; remove it",
    }
    merge_method: str = field(string)
    name: str | None = field(string, None)
    models: tuple[ModelEntry, ...] | None = field(listed(ModelEntry), None)
    slices: tuple[Slice, ...] | None = field(listed(Slice), None)
    base_model: str | None = field(reference, None)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)
    dtype: str | None = field(string, None)
    out_dtype: str | None = field(string, None)
    tokenizer_source: str | None = field(reference, None)
    tokenizer: TokenizerSection | None = field(TokenizerSection, None)
    chat_template: str | None = field(chat_template, None)
    seed: int | None = field(whole(), None)
    random_seed: int | None = field(whole(), None)  # what some recipes in the wild call it

    @property
    def method(self) -> Method:
        return find(self.merge_method, self.at("merge_method"))

    @property
    def output_dtype(self) -> DType | None:
        """The type written: ``out_dtype``, else ``dtype`` (arithmetic is fp32 whatever it says)."""
        for key, name in (("out_dtype", self.out_dtype), ("dtype", self.dtype)):
            if name is not None:
                return parse_dtype(name, f"{self.at(key)}: {key}")
        return None

    @property
    def own_seed(self) -> int | None:
        return self.random_seed if self.seed is None else self.seed

    def sections(self) -> Iterator[Document | ModelEntry | Slice | SliceSource]:
        """Every section that can hold parameters."""
        yield self
        yield from self.models or ()
        for part in self.slices or ():
            yield part
            yield from part.sources

    def references(self) -> list[tuple[str, str]]:
        """Every model named, with its place, in recipe order; the base where it is first named."""
        found: dict[str, str] = {}
        for entry in self.models or ():
            found.setdefault(entry.model, entry.at("model"))
        for part in self.slices or ():
            for source in part.sources:
                found.setdefault(source.model, source.at("model"))
            if part.base_model is not None:
                found.setdefault(part.base_model, part.at("base_model"))
        if self.base_model is not None:
            found.setdefault(self.base_model, self.at("base_model"))
        asked = self.vocabulary
        if asked is not None:
            if asked.source not in ("union", "base"):
                found.setdefault(asked.source, asked.at("source"))
            for token in asked.tokens.values():
                if token.source is not None and token.source.model is not None:
                    found.setdefault(token.source.model, token.at("source"))
        return list(found.items())

    def hint(self, name: str) -> str:
        return "put it in 'models:'" if name == "model" else super().hint(name)

    def check(self) -> None:
        if self.merge_method in _NOT_YET and self.merge_method not in METHODS:
            known = ", ".join(METHODS)
            raise UnsupportedError(
                f"{self.at('merge_method')}: mergekit's method '{self.merge_method}' is not "
                f"supported yet; known: {known}"
            )
        method = self.method
        if bool(self.models) == bool(self.slices):
            raise RecipeError(
                f"{self.where}: give either 'models:' or 'slices:', with at least one entry"
            )
        for section in self.sections():
            settings_for(method, section)
        for key, name in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if name is not None:
                parse_dtype(name, f"{self.at(key)}: {key}")
        if self.seed is not None and self.random_seed is not None:
            raise RecipeError(
                f"{self.at('random_seed')}: 'seed' and 'random_seed' say the same; keep one"
            )
        seed = self.own_seed
        if seed is not None and not 0 <= seed < 1 << 64:
            key = "seed" if self.seed is not None else "random_seed"
            raise RecipeError(f"{self.at(key)}: '{key}' must be in [0, 2^64), not {seed}")
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise RecipeError(
                f"{self.at('tokenizer')}: give 'tokenizer' or 'tokenizer_source', not both"
            )
        if self.chat_template is not None:
            check_template(self.chat_template, TEMPLATES, self.at("chat_template"))

    @property
    def vocabulary(self) -> TokenizerSection | None:
        """What is asked of the output's tokenizer; None: the lead's, and nothing is checked."""
        if self.tokenizer is None and self.tokenizer_source is not None:
            return TokenizerSection.of_source(self.tokenizer_source, self.at("tokenizer_source"))
        return self.tokenizer


def settings_for(
    method: Method, section: Document | ModelEntry | Slice | SliceSource
) -> dict[str, Setting]:
    """The section's settings of ``method``'s parameters, checked.

    A name that only another method knows is left out (mergekit ignores it too; `without_effect`
    lists it for a note); a name that no method knows is an error.
    """
    found = {}
    for name, setting in section.parameters.items():
        parameter = method.parameter(name)
        if parameter is not None:
            found[name] = setting.checked(parameter)
        elif not _is_parameter(name) and name not in _FOREIGN_PARAMETERS:
            known = [item.name for item in method.parameters]
            raise RecipeError(
                f"{setting.rules[0].where}: unknown parameter '{name}' for {method.name}; "
                f"{nearest(name, known)}"
            )
    return found


def without_effect(document: Document) -> list[str]:
    """One line for each parameter that the recipe gives and the method does not read there."""
    method = document.method
    found: dict[str, None] = {}
    for section in document.sections():
        single = isinstance(section, (ModelEntry, SliceSource))
        for name, setting in section.parameters.items():
            parameter = method.parameter(name)
            if parameter is None and name != "int8_mask":
                found.setdefault(f"parameter '{name}' has no effect with {method.name}")
            elif parameter is not None and single and not parameter.per_model:
                where = setting.rules[0].where
                found.setdefault(
                    f"{where}: '{name}' has no effect under a single model; give it at the top"
                )
    return list(found)


def beyond_models(document: Document) -> list[str]:
    """One line for each value of a recipe that lies beyond the models it goes between."""
    found: dict[str, None] = {}
    for section in document.sections():
        for name, setting in section.parameters.items():
            parameter = document.method.parameter(name)
            if parameter is not None:
                found.update(dict.fromkeys(extrapolations(setting, parameter)))
    return list(found)


# ---------------------------------------------------------------- the recipe


@dataclass(frozen=True)
class Recipe:
    """Documents in the order to run them (each after those it names), the last one being the
    output.
    """

    documents: tuple[Document, ...]
    text: str  # as given, to be recorded beside the output

    @property
    def output(self) -> Document:
        return self.documents[-1]

    @classmethod
    def load(cls, source: Any) -> Recipe:
        """The recipe in a file, in YAML text (a str with a line break), a dict, or a list of dicts.

        Raises FastmergeError: one line with the place, the fault and the remedy.
        """
        if isinstance(source, Recipe):
            return source
        mappings, written, origin = read(source, "recipe")
        documents = [Document(item) for item in mappings]
        return cls(tuple(_in_order(documents, origin)), written)


def _in_order(documents: list[Document], origin: str) -> list[Document]:
    """Dependencies first, the output last; raises on doubles, circles, loose ends and doubt."""
    names = [document.name for document in documents if document.name is not None]
    unnamed = [document for document in documents if document.name is None]
    if len(unnamed) > 1:
        raise RecipeError(
            f"{unnamed[1].where}: {len(unnamed)} documents have no 'name:'; name all but the output"
        )
    for document in documents:
        if document.name is not None and names.count(document.name) > 1:
            raise RecipeError(f"{document.at('name')}: two documents are called '{document.name}'")
    uses = {
        document.name: [ref for ref, _ in document.references() if ref in names]
        for document in documents
    }
    try:
        order = list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        circle = " -> ".join(str(name) for name in reversed(error.args[1]))
        raise RecipeError(
            f"{origin}: the documents name each other in a circle: {circle}"
        ) from None
    used = {name for refs in uses.values() for name in refs}
    roots = [document for document in documents if document.name not in used]
    output = unnamed[0] if unnamed else roots[-1]
    for document in roots:
        if document is not output:
            remedy = (
                "remove it, or merge it on its own"
                if unnamed
                else (f"and none '{output.name}': which one is the output? Keep one of them")
            )
            raise RecipeError(f"{document.where}: no document uses '{document.name}'; {remedy}")
    by_name = {document.name: document for document in documents}
    return [by_name[name] for name in order]
