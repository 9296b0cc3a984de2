"""mergekit's recipe language: what it says, checked as far as it can be without looking at a model.

A recipe is one document, or several that name each other (mergekit-multi). Every fault raises
FastmergeError with one line: the place ('recipe.yml:12'), what is wrong, and the remedy. Keys of
mergekit's language that fastmerge does not support are refused by name. Keys and parameters that
mergekit ignores are one note (`ignored`), unless they misspell a known one; nothing is silently
ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, ClassVar

from fastmerge.dtypes import DType
from fastmerge.dtypes import parse as parse_dtype
from fastmerge.errors import RecipeError, in_a_line, near_miss, nearest
from fastmerge.methods import METHODS, REQUIRED, Method, find
from fastmerge.recipe.kinds import keys_of_others
from fastmerge.recipe.located import LocatedDict
from fastmerge.recipe.mixture import Mixture
from fastmerge.recipe.reference import reference
from fastmerge.recipe.section import FaultError, Section, field, listed, string, whole
from fastmerge.recipe.settings import NO_SETTINGS, Setting, extrapolations, settings
from fastmerge.recipe.source import read
from fastmerge.recipe.stated import Stating
from fastmerge.recipe.templates import TEMPLATES
from fastmerge.recipe.tokenizer import TokenizerSection, chat_template, check_template

# Parameters that only some methods (or older versions) read. People leave them in.
_FOREIGN_PARAMETERS = ("alpha", "embed_slerp", "epsilon", "gamma", "r", "select_topk")


# ---------------------------------------------------------------- sections


class _Parametrised(Section):
    """A section with ``parameters:``."""

    tolerant: ClassVar[bool] = True

    def misspells(self, name: str) -> bool:
        if name in _MEANT:
            return True
        # A parameter that some method cannot do without is hardly meant to be ignored.
        known = _parameters()
        if name in known:
            return any(
                (own := method.parameter(name)) is not None and own.default is REQUIRED
                for method in METHODS.values()
            )
        return near_miss(name, (*self.fields, *known)) is not None

    def hint(self, name: str) -> str:
        return self.belongs(name) or nearest(name, (*self.fields, *_parameters()))

    def belongs(self, name: str) -> str:
        if name in _MEANT:
            return f"did you mean '{_MEANT[name]}'?"
        if name in _parameters():
            return "it belongs under 'parameters:'"
        return _BELONGS.get(name, "")


# Too far from what they mean to be told by their letters.
_MEANT = dict.fromkeys(("params", "param", "args"), "parameters")
_BELONGS = {
    "revision": "write the model as 'name@revision'",
    "base": "write 'base_model:'",
    "method": "write 'merge_method:'",
    "torch_dtype": "write 'dtype:'",
    "input_model_parameters": "mergekit dropped it: use each model's 'parameters:'",
}


def _parameters() -> set[str]:
    """Of any method, with those that are registered by now."""
    return {own.name for method in METHODS.values() for own in method.parameters}


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

    @classmethod
    def written_out(cls, data: LocatedDict) -> LocatedDict:
        misspelt = any(near_miss(name, ("layer_range",)) for name in data if name not in cls.fields)
        given = data.get("layer_range")
        if given is not None and not isinstance(given, list):
            raise RecipeError(
                f"{data.at['layer_range']}: 'layer_range' must be a list, [start, end), as [0, 32]"
            )
        if given is None and not misspelt:
            raise RecipeError(
                f"{data.where}: 'layer_range' is missing; give the layers, [start, end), or list "
                "whole models under 'models:'"
            )
        return data

    def check(self) -> None:
        start, end = self.layer_range
        if start == end >= 0:
            raise RecipeError(
                f"{self.at('layer_range')}: layer_range [{start}, {end}] holds no layer: the end "
                f"is not part of it; layer {start} alone is [{start}, {end + 1}]"
            )
        if not 0 <= start < end:
            raise RecipeError(
                f"{self.at('layer_range')}: layer_range [{start}, {end}] must be [start, end) "
                "with 0 <= start < end"
            )


class Slice(_Parametrised):
    """One entry of ``slices:``: a run of output layers."""

    sources: tuple[SliceSource, ...] = field(listed(SliceSource))
    base_model: str | None = field(reference, None)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)

    @classmethod
    def written_out(cls, data: LocatedDict) -> LocatedDict:
        if "model" in data and data.get("sources") is None:
            raise RecipeError(
                f"{data.at['model']}: a slice lists its models under 'sources:', each with its "
                "'layer_range:'"
            )
        return data

    def check(self) -> None:
        if not self.sources:
            raise RecipeError(f"{self.at('sources')}: a slice needs at least one source")
        lengths = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(lengths)) > 1:
            raise RecipeError(
                f"{self.at('sources')}: every source of a slice must give the same number of "
                f"layers, not {', '.join(map(str, lengths))}"
            )


class Module(_Parametrised):
    """One entry of ``modules:``: what makes one of a model's parts."""

    models: tuple[ModelEntry, ...] | None = field(listed(ModelEntry), None)
    slices: tuple[Slice, ...] | None = field(listed(Slice), None)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)

    def check(self) -> None:
        if bool(self.models) == bool(self.slices):
            raise RecipeError(
                f"{self.where}: give either 'models:' or 'slices:', with at least one entry"
            )


def _modules(value: Any) -> Mapping[str, Module]:
    if not isinstance(value, Mapping) or not value:
        raise FaultError("must be a mapping with a section for each module, such as 'default:'")
    return {name: Module(section) for name, section in value.items()}


AS_BASE = "as_base"  # under out_dtype
_WHOLE = "default"  # what mergekit calls the one module of a model that has no others

_MOE = "it is a mixture's; list its models under 'experts:'"


def typed(dtype: str) -> dict[str, str]:
    """What a recipe says of its output's type, ``AS_BASE`` among them."""
    return {"out_dtype" if dtype == AS_BASE else "dtype": dtype}


class Document(_Parametrised, Stating):
    """One document: a method, its inputs and what it writes."""

    refused: ClassVar[Mapping[str, str]] = {
        **keys_of_others("recipe", "mixture"),
        **dict.fromkeys(("gate_mode", "experts_per_token", "shared_experts"), _MOE),
    }
    merge_method: str = field(string)
    name: str | None = field(string, None)
    models: tuple[ModelEntry, ...] | None = field(listed(ModelEntry), None)
    slices: tuple[Slice, ...] | None = field(listed(Slice), None)
    modules: Mapping[str, Module] | None = field(_modules, None)
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
        """The type written: ``out_dtype``, else ``dtype`` (of the arithmetic see `arithmetic`)."""
        return None if self.as_base else self.stated_dtype

    @property
    def as_base(self) -> bool:
        """Whether every tensor is written as the lead stores its own: type, codes, scales."""
        return self.out_dtype == AS_BASE

    @property
    def lists(self) -> list[Document | Module]:
        """The sections that can list models or slices."""
        return [self, *(self.modules or {}).values()]

    def sections(self) -> Iterator[Document | Module | ModelEntry | Slice | SliceSource]:
        """Every section that can hold parameters."""
        for section in self.lists:
            yield section
            yield from section.models or ()
            for part in section.slices or ():
                yield part
                yield from part.sources

    def references(self) -> list[tuple[str, str]]:
        """Every model named, with its place, in recipe order; the base where it is first named."""
        found: dict[str, str] = {}
        for section in self.lists:
            for entry in section.models or ():
                found.setdefault(entry.model, entry.at("model"))
            for part in section.slices or ():
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
        method = self.method
        if self.modules is not None:
            self._hoist(self.modules)
        if "base" in self._at and self.base_model is None and method.base in ("required", "first"):
            raise RecipeError(f"{self.at('base')}: unknown key 'base'; {_BELONGS['base']}")
        if self.models and self.slices:
            raise RecipeError(f"{self.at('slices')}: give 'models:' or 'slices:', not both")
        if self.modules is None and not self.models and not self.slices:
            raise RecipeError(
                f"{self.where}: give either 'models:' or 'slices:', with at least one entry"
            )
        for section in self.sections():
            settings_for(method, section)
        for key, name in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if name is not None and not (key == "out_dtype" and self.as_base):
                parse_dtype(name, f"{self.at(key)}: {key}")
        self.check_seed()
        seed = self.own_seed
        if seed is not None and not 0 <= seed < 1 << 64:
            key = "seed" if self.seed is not None else "random_seed"
            raise RecipeError(f"{self.at(key)}: '{key}' must be in [0, 2^64), not {seed}")
        self._check_tokenizer()

    def _hoist(self, modules: Mapping[str, Module]) -> None:
        """Writes ``modules: default:`` as what it means: models or slices, and parameters; other
        modules stay.
        """
        if self.models or self.slices:
            raise RecipeError(
                f"{self.at('modules')}: give one of 'models:', 'slices:' and 'modules:'"
            )
        if _WHOLE not in modules:
            return
        if len(modules) > 1:
            raise RecipeError(
                f"{self.at('modules')}: '{_WHOLE}' is the whole model; remove the other modules"
            )
        module = modules[_WHOLE]
        self.modules = None
        self.models, self.slices = module.models, module.slices
        # The module's rules come first, and the document's where none of them matches.
        self.parameters = {**self.parameters} | {
            name: Setting(setting.rules + outer.rules, setting.ignored + outer.ignored)
            for name, setting in module.parameters.items()
            for outer in [self.parameters.get(name, Setting(()))]
        }
        self.ignored = (*self.ignored, *module.ignored)

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise RecipeError(
                f"{self.at('tokenizer')}: give 'tokenizer' or 'tokenizer_source', not both"
            )
        asked = self.vocabulary
        if asked is not None and not os.path.exists(asked.source):
            meant = near_miss(asked.source, ("union", "base"))
            if meant not in (None, asked.source):
                raise RecipeError(
                    f"{asked.at('source')}: unknown tokenizer '{asked.source}'; did you mean "
                    f"'{meant}'?"
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
    method: Method, section: Document | Module | ModelEntry | Slice | SliceSource
) -> dict[str, Setting]:
    """The section's settings of ``method``'s parameters, checked.

    A name that the method does not know is left out (mergekit ignores it too; `without_effect` and
    `ignored` list it for a note); one that misspells a parameter is an error.
    """
    found = {}
    for name, setting in section.parameters.items():
        parameter = method.parameter(name)
        if parameter is not None:
            found[name] = setting.checked(parameter)
        elif not _is_known(name):
            known = [item.name for item in method.parameters]
            meant = near_miss(name, (*known, *_parameters()))
            hint = f"did you mean '{meant}'?" if meant else ""
            if name == "drop_rate" and "density" in known:
                hint = "did you mean 'density'? It is what stays: 1 - drop_rate"
            if hint:
                raise RecipeError(
                    f"{setting.rules[0].where}: unknown parameter '{name}' for {method.name}; "
                    f"{hint}"
                )
    return found


def _is_known(parameter: str) -> bool:
    """Of any method, here or in mergekit."""
    return parameter in _parameters() or parameter in _FOREIGN_PARAMETERS


def ignored(document: Document) -> list[str]:
    """The one line about keys and parameters that mean nothing, where there are any."""
    found: dict[str, None] = {}
    asked = document.tokenizer
    for part in (asked, *asked.tokens.values()) if asked is not None else ():
        found.update(dict.fromkeys(part.ignored))
    for section in document.sections():
        found.update(dict.fromkeys(section.ignored))
        for name, setting in section.parameters.items():
            found.update(dict.fromkeys(setting.ignored))
            if document.method.parameter(name) is None and not _is_known(name):
                remedy = "; it belongs at the top" if name in Document.fields else ""
                found.setdefault(f"'{name}' ({setting.rules[0].where}{remedy})")
    if not found:
        return []
    return [f"without effect, here as in mergekit: {', '.join(found)}"]


def without_effect(document: Document) -> list[str]:
    """One line for each parameter that the recipe gives and the method does not read there."""
    method = document.method
    found: dict[str, None] = {}
    for section in document.sections():
        single = isinstance(section, (ModelEntry, SliceSource))
        for name, setting in section.parameters.items():
            parameter = method.parameter(name)
            if parameter is None and name != "int8_mask" and _is_known(name):
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

AnyDocument = Document | Mixture


@dataclass(frozen=True)
class Recipe:
    """Documents in the order to run them (each after those it names), the last one being the
    output.
    """

    documents: tuple[AnyDocument, ...]
    text: str  # as given, to be recorded beside the output

    def __repr__(self) -> str:
        return in_a_line(self, "documents", "text")

    @property
    def output(self) -> AnyDocument:
        return self.documents[-1]

    @classmethod
    def load(cls, source: Any) -> Recipe:
        """The recipe in a file, in YAML text (a str with a line break), a dict, or a list of dicts.

        Raises FastmergeError: one line with the place, the fault and the remedy.
        """
        return source if isinstance(source, Recipe) else cls.of(*read(source, "recipe"))

    @classmethod
    def of(cls, mappings: Sequence[LocatedDict], written: str, origin: str) -> Recipe:
        """The recipe of what `read` gives."""
        documents = [_document(item) for item in mappings]
        return cls(tuple(_in_order(documents, origin)), written)

    @classmethod
    def load_each(cls, source: Any) -> list[Recipe]:
        """A recipe for each document that no other names, with those it needs; as `load`."""
        mappings, written, origin = read(source, "recipe")
        documents = [_document(item) for item in mappings]
        by_name = {document.name: document for document in documents}
        uses = {d.name: [ref for ref, _ in d.references() if ref in by_name] for d in documents}
        used = {name for names in uses.values() for name in names}
        found = []
        for document in documents:
            needed, todo = {document.name}, [document.name]
            while document.name not in used and todo:
                todo += [name for name in uses[todo.pop()] if name not in needed]
                needed.update(todo)
            if document.name not in used:
                own = [item for item in documents if item is document or item.name in needed]
                found.append(cls(tuple(_in_order(own, origin)), written))
        # Without one they name each other in a circle, which `load` says.
        return found or [cls(tuple(_in_order(documents, origin)), written)]


def _document(item: LocatedDict) -> AnyDocument:
    left_out = "experts" in item and "merge_method" not in item
    return Mixture(item) if left_out or item.get("experts") is not None else Document(item)


def _in_order(documents: list[AnyDocument], origin: str) -> list[AnyDocument]:
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
