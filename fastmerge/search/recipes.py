"""A recipe of whole models as an expression over them, and the plan of all its models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmerge.dtypes import F32, F64
from fastmerge.errors import RecipeError, UnsupportedError
from fastmerge.planning.of_models import of_models
from fastmerge.planning.plan import Plan
from fastmerge.recipe.document import Document, settings_for
from fastmerge.recipe.settings import Rule, Setting, affine, value_of
from fastmerge.search.expressions import Blend, Expr, Given, Model, average


def references_of(document: Document) -> list[str]:
    """The models in the order of their numbers: the base first, which gives config and tokenizer,
    then those listed.
    """
    base = [] if document.base_model is None else [document.base_model]
    return list(dict.fromkeys([*base, *(entry.model for entry in document.models or ())]))


def check_form(document: Document) -> None:
    """Raises UnsupportedError for what is no merge of whole models."""
    for key in ("slices", "modules", "chat_template"):
        if getattr(document, key):
            raise UnsupportedError(
                f"{document.at(key)}: a search merges whole models; list them under 'models:' and "
                f"remove '{key}'"
            )
    if document.arithmetic == F64:
        raise UnsupportedError(
            f"{document.at('dtype')}: a search merges in float32; write 'dtype: float32', and "
            "merge what it finds in float64"
        )
    if document.as_base:
        raise UnsupportedError(f"{document.at('out_dtype')}: a search takes no 'as_base'")
    asked = document.vocabulary
    if asked is not None and (asked.source != "base" or asked.tokens):
        raise UnsupportedError(
            f"{document.at('tokenizer_source')}: a search takes 'base' alone, the tokens of the "
            "first of its models"
        )


def template_of(document: Document, folder: Path, text: str) -> Plan:
    """The plan of a linear merge of all models: can they be merged? Raises FastmergeError."""
    places = dict(document.references())
    names = references_of(document)
    return of_models(
        names,
        places=[places[name] for name in names],
        where=document.where,
        out_dtype=document.output_dtype,
        arithmetic=F32,
        base_folder=folder,
        text=text,
        tokenizer=document.vocabulary,
    )


def expression(document: Document, numbers: Mapping[str, int], seed: int) -> Expr:
    """What the recipe makes of whole models, ``numbers`` by reference; ``seed``: of masks, where
    the recipe names none. Raises FastmergeError where the method does not take these models.
    """
    method = document.method
    entries = {entry.model: settings_for(method, entry) for entry in document.models or ()}
    above = settings_for(method, document)
    base = document.base_model
    if base is not None and base not in entries:
        if method.base == "none":
            where = document.at("base_model")
            raise RecipeError(f"{where}: {method.name} takes no base_model; remove it")
        entries[base] = {}
    if method.base in ("required", "first") and base is None:
        raise RecipeError(f"{document.where}: {method.name} needs a 'base_model:'")
    apart = base if method.base in ("required", "optional") else None
    operands = [name for name in entries if name != apart]
    if method.base == "first":
        operands.sort(key=lambda name: name != base)
    own = {item.name for item in method.parameters if item.per_model}
    each = [
        {
            name: Setting((*_rules(entries[model], name), *_rules(above, name)))
            for name in {**entries[model], **above}
            if name in own
        }
        for model in operands
    ]
    shared = {name: setting for name, setting in above.items() if name not in own}
    states = [Model(numbers[name]) for name in operands]
    if apart is not None and method.name == "task_arithmetic":
        plain = _plain_sum(Model(numbers[apart]), states, each, shared)
        if plain is not None:
            return plain
    drawn = document.own_seed if document.own_seed is not None else seed
    return Blend(
        method,
        tuple(states),
        None if apart is None else Model(numbers[apart]),
        shared,
        tuple(each),
        drawn if method.random else None,
    )


def _rules(settings: Given, name: str) -> tuple[Rule, ...]:
    return settings[name].rules if name in settings else ()


def _plain_sum(
    base: Model, states: list[Model], each: list[dict[str, Setting]], shared: Given
) -> Expr | None:
    """Task arithmetic as the combination that it is, base + l sum_i w_i (x_i - base), model by
    model: parameters differ by tensor. None where weights are divided by their sum.
    """
    factor = value_of(shared.get("lambda"), 1.0)
    if factor is None or value_of(shared.get("normalize"), 0.0) != 0.0:
        return None
    found: Expr = base
    for state, values in zip(states, each, strict=True):
        weight = values.get("weight")
        if weight is None:
            return None
        toward = affine(weight, factor, 0.0)
        found = average([found, state, base], [1.0, toward, affine(toward, -1.0, 0.0)])
    return found
