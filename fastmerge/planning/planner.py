"""From a recipe to a plan: one expression tree for each output tensor, made from headers alone.

Whatever can be refused is refused here, before a weight is read: missing and extra tensors, shapes,
vocabularies, layer ranges, types, and how many models a method takes. An operand that names an
earlier document becomes that document's own tree, so a chain of documents is one tree, computed
once and rounded once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmerge.arguments import a_flag
from fastmerge.collector import PLANNING, rarely_collected
from fastmerge.dtypes import DType
from fastmerge.errors import (
    FastmergeError,
    ModelError,
    RecipeError,
    brief,
    few_of_a_kind,
    is_whole,
    some_of,
)
from fastmerge.methods import METHODS, Method
from fastmerge.models import hub
from fastmerge.models.code_elsewhere import told_of_code
from fastmerge.models.header import show
from fastmerge.models.model import Model
from fastmerge.models.side_files import SideFiles, is_tokenizer
from fastmerge.models.vocabulary import Vocabulary, template_of
from fastmerge.planning.agreement import check_agreement
from fastmerge.planning.arity import check_arity, is_the_base
from fastmerge.planning.build import Builder
from fastmerge.planning.config import output_config, set_layers, set_tokens
from fastmerge.planning.consistency import check_result, check_stack
from fastmerge.planning.heads import settle_heads
from fastmerge.planning.inputs import (
    Input,
    Part,
    TensorPlan,
    View,
    check_quantised,
    of_language,
    views_of,
)
from fastmerge.planning.layers import (
    check_layers,
    check_range,
    check_whole_range,
    settle_layers,
)
from fastmerge.planning.modules import apart, by_module, find_parts, layered
from fastmerge.planning.opened import Opened
from fastmerge.planning.plan import Plan
from fastmerge.planning.precision import (
    as_stored,
    said_narrowed,
    settle_precision,
    with_moved_names,
)
from fastmerge.planning.spanning import check_whole
from fastmerge.planning.tokenizer import Aligned, Vocabularies, align, check_order
from fastmerge.planning.truncate import truncate
from fastmerge.planning.values import ParameterValues, check_placed
from fastmerge.recipe.document import (
    AnyDocument,
    Document,
    ModelEntry,
    Module,
    Recipe,
    Slice,
    SliceSource,
    beyond_models,
    ignored,
    settings_for,
    without_effect,
)
from fastmerge.recipe.meaning import meaning
from fastmerge.recipe.mixture import Mixture
from fastmerge.recipe.settings import Setting
from fastmerge.recipe.templates import TEMPLATES, check_jinja
from fastmerge.recipe.tokenizer import TokenizerSection
from fastmerge.tree.nodes import Node
from fastmerge.tree.unread import without_unread


def make_plan(
    recipe: Any,
    *,
    base_folder: Path | None = None,
    seed: int | None = None,
    resolve: Callable[[str], Path] = hub.resolve,
    models: Mapping[str, Model] | None = None,
    sparing: bool = False,
    truncate_embeddings: bool = False,
) -> Plan:
    """Plans a recipe (a `Recipe` or whatever `Recipe.load` takes) from its models' headers.

    base_folder: where relative paths of models start, if there is such a folder there (else, as in
    mergekit, from the working directory). seed: overrides the recipe's. resolve: finds a model's
    folder from its reference. models: what references stand for, where that is no folder. sparing:
    what has no effect (a model of weight 0) is left out of the trees, and so not read.
    truncate_embeddings: as in `fastmerge.api.plan`. Raises FastmergeError, one line, for whatever
    cannot be merged.
    """
    recipe = Recipe.load(recipe)
    if seed is not None:
        seed = whole_seed(seed)
    if models is not None and not isinstance(models, Mapping):
        raise FastmergeError(f"models: must map references to models, not be {brief(models)}")
    opened = Opened(models or {}, base_folder, resolve)
    seed = recipe.output.own_seed if seed is None else seed
    planner = Planner(opened, recipe.text, seed, meaning(recipe.documents))
    planner.truncates = a_flag(truncate_embeddings, "truncate_embeddings")
    with rarely_collected(PLANNING):
        for document in recipe.documents:
            planner.run(document, is_output=document is recipe.output)
        plan = planner.plan(planner.views[recipe.output.name], sparing=sparing)
        for view in planner.views.values():
            check_whole((item.root for item in view.tensors.values()), plan.spanning)
    return plan


def whole_seed(seed: Any) -> int:
    """``seed`` as an integer in [0, 2^64), else FastmergeError."""
    if not is_whole(seed) or not 0 <= seed < 1 << 64:
        raise FastmergeError(f"seed must be a whole number in [0, 2^64), not {brief(seed)}")
    return int(seed)


# ---------------------------------------------------------------- the planner


def _seed_of(meant: str) -> int:
    """The seed of a recipe that gives none: 32 bits of what it means, so that a merge that was
    killed goes on, one that is repeated ends the same, and a comment changes nothing.
    """
    digest = hashlib.blake2b(meant.encode(errors="surrogatepass"), digest_size=4)
    return int.from_bytes(digest.digest(), "little")


class Planner:
    """The state of planning one output."""

    def __init__(self, opened: Opened, text: str, seed: int | None, meant: str = "") -> None:
        """``text``: what is planned, as written. ``seed`` None: it follows from what is ``meant``,
        or from the text where nothing is said of that.
        """
        self.opened = opened
        self.text = text
        self.notes: dict[str, None] = {}  # in order, each once
        self.views: dict[str | None, View] = {}  # results by document name
        self.vocabularies = Vocabularies()
        self.truncates = False  # embeddings, where no tokenizer is asked for
        self.template: str | None = None  # the output's
        self.generation: Mapping[str, Any] = {}  # token ids of its generation_config.json
        self.seed_derived, self.seed_used = seed is None, False
        self.seed = _seed_of(meant or text) if seed is None else seed

    def note(self, text: str) -> None:
        self.notes.setdefault(text)

    # -------- models

    def view(self, reference: str, where: str) -> View:
        """The earlier document or the model called ``reference``."""
        if reference in self.views:
            return self.views[reference]
        view = self.opened.view(reference, where)
        for text in self.opened.notes:
            self.note(text)
        return view

    # -------- one document

    def run(self, document: AnyDocument, *, is_output: bool) -> None:
        """Plans one document; its result becomes ``views[document.name]``."""
        if isinstance(document, Mixture):
            from fastmerge.planning.moe import mix

            seed = self._stage_seed(document, is_output)
            self.views[document.name] = mix(self, document, seed, is_output=is_output)
            return
        for line in (*ignored(document), *without_effect(document), *beyond_models(document)):
            self.note(line)
        if not is_output and document.output_dtype is not None:
            self.note(
                "dtypes of named documents say no more than whether their arithmetic is float64: "
                "results between documents are not rounded"
            )
        base = self._base(document.base_model, document.at("base_model"))
        if document.modules is not None:
            parts = self._modules(document, document.modules, base)
        elif document.models:
            parts = [self._whole(document, document.models, base)]
        else:
            parts = [self._slice(document, part, base) for part in document.slices or ()]
        self.views[document.name] = self.merged(
            parts,
            base or parts[0].inputs[0].view,
            dtype=document.output_dtype,
            arithmetic=document.arithmetic,
            seed=self._stage_seed(document, is_output),
            name=document.name or "output",
            document=document,
            is_output=is_output,
        )

    def merged(
        self,
        parts: Sequence[Part],
        lead: View,
        *,
        dtype: DType | None = None,
        arithmetic: DType | None = None,
        seed: int | None = None,
        name: str = "output",
        document: Document | None = None,
        tokenizer: TokenizerSection | None = None,
        is_output: bool = True,
    ) -> View:
        """The merge of ``parts``: runs of layers, or the one of whole models, or either of them for
        each module (planning/modules.py). ``lead`` gives config and side files. ``dtype``,
        ``arithmetic``: as of `Builder`.
        """
        stored = lead
        parts, lead = settle_precision(parts, lead, dtype, self.note)
        for part in parts:
            for item in part.inputs:
                scaled = any(values.gives("scale") for values in part.each)
                said = check_quantised(item.view, part.method, item.where, scaled=scaled)
                if said is not None:
                    self.note(said)
                check_layers(item.view, item.where)
        if not lead.config:
            self.note(
                f"'{lead.label}' has no config.json, so the output has none; transformers will not "
                "load it without"
            )
        wanted = tokenizer if document is None else document.vocabulary
        check_agreement(parts, lead, self.note, tokens=wanted is None)
        parts = settle_layers(parts, self.note)
        parts, lead = settle_heads(parts, lead, self.opened.same, self.note)
        truncates = self.truncates and wanted is None
        if truncates:
            parts, lead = truncate(parts, lead, self.note)
        aligned = Aligned(parts, lead)
        if wanted is None and is_output:
            check_order(parts, lead, self.vocabularies, self.note)
        if wanted is not None:
            has_base = document is None or document.base_model is not None
            aligned = align(
                parts, lead, has_base, wanted, self.vocabularies, self._tokenizer, self.view,
                self.note,
            )  # fmt: skip
            parts, lead = aligned.parts, aligned.lead
        modules = apart(parts, lead)
        for module in modules:
            check_stack(module.runs, module.lead)
        build = Builder(dtype, seed, self.opened.models, arithmetic=arithmetic)
        tensors = by_module(build, modules, lead)
        said_narrowed(build.narrowed, self.note)
        if document is not None:
            self._unused_filters(document, parts)
            self._unreached_rules(document)
        config = output_config(lead.config, dtype, tensors)
        if is_output:
            self._beside(lead)
        for module in modules:
            set_layers(config, module, self.note)
        set_tokens(config, aligned.rows, aligned.ids)
        result = View(name, config, tensors, lead.donor, aligned.vocabulary or lead.vocabulary)
        if is_output:
            self.generation = aligned.generation
            if document is not None:
                self.template = self._template(document, parts, lead)
        check_result(result, of_language(parts), lead, self.note, truncated=truncates)
        if is_output and document is not None and document.as_base:
            where = document.at("out_dtype")
            result = as_stored(result, stored, self.opened.views, where, self.note)
        return with_moved_names(result, stored) if is_output else result

    def plan(self, result: View, *, sparing: bool = False) -> Plan:
        """The plan whose output is ``result``; ``sparing`` as in `make_plan`."""
        known: dict[Node, Node] = {}
        side: Mapping[str, bytes | Path] = result.donor.side_files()
        if result.vocabulary is not None:
            side = {name: file for name, file in side.items() if not is_tokenizer(name)}
            side |= result.vocabulary.files
        for line in told_of_code(result.config, side):
            self.note(line)
        if double := sum(item.in_float64 for item in result.tensors.values()):
            self.note(
                f"{double} of {len(result.tensors)} tensors are merged in float64, for which there "
                "are no kernels: it takes up to tens of times as long as `dtype: float32`"
            )
        return Plan(
            models=tuple(self.opened.models),
            references=tuple(self.opened.references),
            tensors=tuple(
                _sparing(item, known) if sparing else item for item in result.tensors.values()
            ),
            config=result.config,
            donor_model=result.donor,
            seed=self.seed if self.seed_used else None,
            seed_derived=self.seed_used and self.seed_derived,
            recipe_text=self.text,
            notes=few_of_a_kind(self.notes),
            vocabulary=result.vocabulary,
            chat_template=self.template,
            token_ids=self.generation,
        )

    def _tokenizer(self, reference: str, where: str) -> View | Vocabulary:
        """A document's or model's view, or the vocabulary of what is no model of this merge."""
        if reference in self.views:
            return self.views[reference]
        return self.opened.tokenizer(reference, where)

    def _template(self, document: Document, parts: Sequence[Part], lead: View) -> str | None:
        """The chat template that ``chat_template:`` asks for; None where the donor's stays."""
        name, where = document.chat_template, document.at("chat_template")
        if name is None:
            return None
        if not any(is_tokenizer(file) for file in lead.donor.side_files()):
            raise ModelError(
                f"{where}: '{lead.label}' has no tokenizer for a chat template; remove the line"
            )
        if name in TEMPLATES:
            return TEMPLATES[name]
        if name != "auto":
            unchecked = check_jinja(name, where)
            if unchecked is not None:
                self.note(unchecked)
            return name
        views = (lead, *views_of(parts).values())
        found = [template_of(view.donor.side_files(), view.label) for view in views]
        given = [template for template in found[1:] if template is not None]
        if not given:
            self.note("chat_template auto: no model has one")
            return None
        # The most common; of several the first in the recipe's order.
        return Counter(given).most_common(1)[0][0]

    def _beside(self, lead: View) -> None:
        """Says what is copied from beside the lead's weights, and what of it can run."""
        side = lead.donor.side_files()
        for line in side.notes if isinstance(side, SideFiles) else ():
            self.note(line)
        code = [show(name) for name in side if name.endswith(".py")]
        if code:
            self.note(f"code of '{lead.label}' is copied, not run: {some_of(code)}")

    def _base(self, reference: str | None, where: str) -> View | None:
        return None if reference is None else self.view(reference, where)

    def whole(self, document: Document) -> tuple[Part, int | None]:
        """What merges the whole models of a recipe's one document, and the seed it draws by."""
        base = self._base(document.base_model, document.at("base_model"))
        part = self._whole(document, document.models or (), base)
        return part, self._stage_seed(document, is_output=True)

    def _stage_seed(self, document: AnyDocument, is_output: bool) -> int | None:
        draws = document.draws if isinstance(document, Mixture) else document.method.random
        if not draws:
            return None
        if not is_output:
            if document.own_seed is not None:
                return document.own_seed
            # The same seed in two documents would drop the same entries in both.
            text = f"{self.seed}\0{document.name}".encode(errors="surrogatepass")
            self.seed_used = True
            return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        self.seed_used = True
        return self.seed

    def _modules(
        self, document: Document, modules: Mapping[str, Module], base: View | None
    ) -> list[Part]:
        """Each module's merge, whole or run by run; last a copy of the lead's that none makes."""
        where = document.at("modules")
        lead = base or self.view(*document.references()[0])
        found, rest = find_parts(list(modules), lead, where)
        parts = []
        for name, module in zip(found, modules.values(), strict=True):
            if module.models:
                own = [self._whole(document, module.models, base, module)]
            else:
                own = [
                    self._slice(document, part, base, module, name) for part in module.slices or ()
                ]
            parts += [replace(part, makes=(name,)) for part in own]
        if rest:
            self.note(f"no module makes the {', '.join(rest)} part: copied from '{lead.label}'")
            copy = [Input(lead, 0, where, {})]
            part = self.part(METHODS["passthrough"], copy, None, [], where=where, of=where)
            parts.append(replace(part, makes=tuple(rest)))
        return parts

    def _whole(
        self,
        document: Document,
        entries: Sequence[ModelEntry],
        base: View | None,
        module: Module | None = None,
    ) -> Part:
        method = document.method
        inputs = []
        for entry in entries:
            view = self.view(entry.model, entry.at("model"))
            check_whole_range(view, entry.layer_range, entry.at("layer_range"))
            inputs.append(Input(view, 0, entry.at("model"), settings_for(method, entry)))
        if base is not None and all(item.view is not base for item in inputs):
            if method.base == "none":
                raise RecipeError(
                    f"{document.at('base_model')}: {method.name} takes no base_model; remove it "
                    "(the model's own config and tokenizer are used)"
                )
            if method.base == "first" and len(inputs) == method.max_operands:
                raise RecipeError(
                    f"{document.at('base_model')}: {method.name} takes exactly {len(inputs)} "
                    f"models, not {len(inputs) + 1}: base_model '{base.label}' is none of those "
                    f"listed; name {_either(inputs)}"
                )
            inputs.append(Input(base, 0, document.at("base_model"), {}))
        levels = [settings_for(method, document)]
        if module is not None:
            levels.insert(0, settings_for(method, module))
        where = document.at("models") if module is None else module.at("models")
        return self.part(method, inputs, base, levels, where=where, of=document.where)

    def _slice(
        self,
        document: Document,
        part: Slice,
        base: View | None,
        module: Module | None = None,
        makes: str | None = None,
    ) -> Part:
        method = document.method
        if part.base_model is not None:
            base = self.view(part.base_model, part.at("base_model"))
        inputs = [self._source(method, source, makes) for source in part.sources]
        absent = base is not None and all(item.view is not base for item in inputs)
        if base is not None and absent and method.base in ("required", "optional", "first"):
            full = method.base == "first" and len(inputs) == method.max_operands
            remedy = f"name {_either(inputs)}" if full else "add it as a source"
            raise RecipeError(
                f"{part.at('sources')}: base_model '{base.label}' is not among this slice's "
                f"sources; {method.name} needs its layers: {remedy}"
            )
        above = [document] if module is None else [module, document]
        levels = [settings_for(method, section) for section in (part, *above)]
        first, last = part.sources[0].layer_range
        return self.part(
            method,
            inputs,
            None if absent else base,
            levels,
            last - first,
            where=part.at("sources"),
            of=document.where,
        )

    def _source(self, method: Method, source: SliceSource, makes: str | None) -> Input:
        where = source.at("model")
        view = self.view(source.model, where)
        start, end = source.layer_range
        own = view if makes is None else layered(view, makes, where)
        check_range(own, end, source)
        return Input(view, start, where, settings_for(method, source))

    def part(
        self,
        method: Method,
        inputs: Sequence[Input],
        base: View | None,
        levels: list[dict[str, Setting]],
        layers: int | None = None,
        *,
        where: str,
        of: str,
    ) -> Part:
        """One run of ``layers`` output layers, or None: the whole model. ``levels``: the settings
        above the models', nearest first. ``where`` the models are listed, ``of`` what: for errors.
        """
        position = next((i for i, item in enumerate(inputs) if item.view is base), None)
        if method.base in ("required", "first") and position is None:
            raise RecipeError(f"{of}: {method.name} needs a 'base_model:'; name one of the models")
        seen: dict[tuple[int, int], str] = {}
        for item in inputs:
            if (id(item.view), item.start) in seen:
                raise RecipeError(
                    f"{item.where}: model '{item.view.label}' is listed twice; keep one"
                )
            seen[id(item.view), item.start] = item.where
        apart = position if method.base in ("required", "optional") else None
        operands = [i for i in range(len(inputs)) if i != apart]
        if method.base == "first":
            operands.sort(key=lambda i: i != position)
        if apart is not None and is_the_base(method, len(operands)):
            self.note(
                f"{where}: no model besides the base '{inputs[apart].view.label}', which the "
                f"result of {method.name} then is"
            )
            copied = [replace(inputs[apart], settings={})]
            return self.part(METHODS["passthrough"], copied, None, [], layers, where=where, of=of)
        check_arity(method, len(operands), where)
        shared = [p for p in method.parameters if not p.per_model]
        check_placed(method, shared, levels, [item.settings for item in inputs])
        own = [p for p in method.parameters if p.per_model]
        if apart is not None and inputs[apart].settings:
            names = ", ".join(inputs[apart].settings)
            self.note(f"the base model's own parameters have no effect with {method.name}: {names}")
        return Part(
            method=method,
            inputs=tuple(inputs),
            base=apart,
            operands=tuple(operands),
            shared=ParameterValues(
                shared,
                levels,
                f"{of}: {method.name} needs the parameter '{{name}}'; give it under 'parameters:'",
            ),
            each=tuple(
                ParameterValues(own, [inputs[i].settings, *levels], _needs(method, inputs[i], base))
                for i in operands
            ),
            layers=layers,
            where=where,
        )

    # -------- decisions with a note

    def _unused_filters(self, document: Document, parts: Sequence[Part]) -> None:
        rules = {
            rule.filter: rule.where
            for section in document.sections()
            for name, setting in section.parameters.items()
            if document.method.parameter(name) is not None
            for rule in setting.rules
            if rule.filter is not None
        }
        for text, where in rules.items():
            if not any(text in n for part in parts for i in part.inputs for n in i.view.tensors):
                self.note(f"{where}: filter '{text}' matches no tensor")

    def _unreached_rules(self, document: Document) -> None:
        settings = [s for section in document.sections() for s in section.parameters.values()]
        for rule in (rule for setting in settings for rule in setting.unreached):
            self.note(
                f"{rule.where}: is never reached: the first entry that fits counts, and one before "
                "it fits all that this fits"
            )


# ---------------------------------------------------------------- refusals


def _either(inputs: Sequence[Input]) -> str:
    return " or ".join(f"'{item.view.label}'" for item in inputs)


def _sparing(item: TensorPlan, known: dict[Node, Node]) -> TensorPlan:
    """The tensor by a tree that leaves out what has no effect."""
    root = without_unread(item.root, known)
    return item if root is item.root else replace(item, root=root)


def _needs(method: Method, item: Input, base: View | None) -> str:
    """What to say when a per-model parameter is missing."""
    text = f"{item.where}: {method.name} needs '{{name}}' for model '{item.view.label}'"
    if method.base == "operand" and item.view is base:
        return (
            f"{text} (base_model is averaged too); list it in 'models:' with one, or remove it as "
            "base_model"
        )
    return f"{text}; give it in the model's 'parameters:' or for all at the top"
