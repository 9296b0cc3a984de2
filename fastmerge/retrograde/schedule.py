"""The schedule file of a retrograde run: what it may say, checked before any weight is read.

Accuracies are in percent everywhere in this package, as people quote them (72.1).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastmerge import dtypes
from fastmerge.arguments import a_flag
from fastmerge.errors import RecipeError, argument, brief, nearest
from fastmerge.evaluation.settings import Evaluate, for_function
from fastmerge.methods import METHODS, Consensus, Method, known
from fastmerge.methods.table import T
from fastmerge.recipe.kinds import keys_of_others
from fastmerge.recipe.located import LocatedDict
from fastmerge.recipe.section import Section, expand, field, listed, one_of, real, string, whole
from fastmerge.recipe.settings import NO_SETTINGS, Setting, settings
from fastmerge.recipe.source import read
from fastmerge.recipe.tokenizer import TokenizerSection
from fastmerge.search.families import BASELINES

POLICIES = ("weakest", "strongest", "next", "random", "nearest", "farthest")
ANCESTORS = ("baseline", "best", "previous")
_T = replace(T, default=None, doc="fraction of the way to the other model")
STATE = "state"  # the base of a step's deltas: the state it starts from
_IMPLIED = ("weight", "t")  # parameters of the table that a step derives from its own t


class Entry(Section):
    """One model of the walk; written as a mapping or as the bare path or hub name."""

    model: str = field(string)
    name: str = field(string, "")
    accuracy: float | None = field(real(0, 100), None)  # percent, as the user gave it

    @property
    def label(self) -> str:
        """The name reports use: given, or the last part of the path."""
        return self.name or Path(self.model).name or self.model


class Step(Section):
    """One merge of the current state with a partner (degrade) or an ancestor (retrace).

    ``t`` is the fraction of the way from the state to the other model: 0 keeps the state, 1 takes
    the other. Delta methods take their deltas from ``base``: the state itself (a moving base), or a
    model of the run; by default base_model where the schedule names one, else the state. Every
    other key is a parameter of the method, written as in a recipe.
    """

    partner: str | None = field(string, None)
    toward: str | None = field(string, None)
    method: str = field(string)
    base: str | None = field(string, None)
    parameters: Mapping[str, Setting] = field(settings, NO_SETTINGS)  # t among them

    @classmethod
    def written_out(cls, data: LocatedDict) -> LocatedDict:
        """Moves t and the method's parameters under one key; writes out ``toward: {step: 3}``."""
        own = set(cls.fields) - {"parameters"}
        gathered = LocatedDict({k: v for k, v in data.items() if k in own})
        inner = data.get("parameters")
        inner = inner if isinstance(inner, LocatedDict) else LocatedDict()
        extra = LocatedDict(
            {k: v for k, v in data.items() if k not in gathered and k != "parameters"}
        )
        extra.where, extra.at = data.where, {**data.at, **getattr(inner, "at", {})}
        extra.update(inner)
        gathered.where, gathered.at = data.where, extra.at
        method = known(data["method"]) if isinstance(data.get("method"), str) else None
        if method is not None:
            names = [p.name for p in method.parameters]
            for name in extra:
                if name not in names and name != "t":
                    hint = nearest(name, [*(k for k in names if k not in _IMPLIED), *own, "t"])
                    raise RecipeError(
                        f"{extra.at[name]}: unknown key '{name}' for a {method.name} step; {hint}"
                    )
        gathered["parameters"] = extra
        target = gathered.get("toward")
        if isinstance(target, Mapping) and set(target) == {"step"}:
            gathered["toward"] = f"step: {target['step']}"
        return gathered

    def check(self) -> None:
        method = known(self.method)
        if method is None:
            self.refuse(
                "method", f"unknown method '{self.method}'; {nearest(self.method, METHODS)}"
            )
        if method.max_operands == 1 and method.base != "required":
            self.refuse("method", f"'{self.method}' takes one model and cannot be a step")
        if uses_t(method) and self.t is None:
            self.refuse("t", f"{method.name} needs 't', the fraction of the way to the other model")
        if not uses_t(method) and self.t is not None:
            self.refuse("t", f"{method.name} computes its own ratio: remove 't'")
        if self.base is not None and method.base not in ("required", "optional"):
            self.refuse("base", f"{method.name} takes no base: remove it")
        for key, setting in self.parameters.items():
            if key in _IMPLIED and key != "t":
                self.refuse(key, f"'{key}' of a step follows from 't': remove it")
            if key == "trim" and any("model" in rule.values for rule in setting.rules):
                self.refuse(key, "a step trims tensor by tensor: remove 'trim: model'")
            own = method.parameter(key)
            # A step's t is the fraction of the way, whatever else the row says of it.
            setting.checked(_T if own is None or own.fraction else own)

    @property
    def t(self) -> Setting | None:
        """The fraction of the way to the other model: None for methods that find their own."""
        return self.parameters.get("t")

    @property
    def kind(self) -> Literal["degrade", "retrace"]:
        """A step toward a pool model, or back toward an ancestor."""
        return "degrade" if self.partner is not None else "retrace"

    @property
    def target_step(self) -> int | None:
        """The step number of ``toward: "step: n"``, else None."""
        if self.toward is None or not self.toward.startswith("step:"):
            return None
        return int(self.toward.removeprefix("step:"))


class Degrade(Step):
    """A step toward a pool model, chosen by policy or by name."""

    def check(self) -> None:
        super().check()
        if self.partner is None or self.toward is not None:
            self.refuse(
                "toward", f"a degrade step takes 'partner': {', '.join(POLICIES)} or a name"
            )


class Retrace(Step):
    """A step back toward an earlier state."""

    def check(self) -> None:
        super().check()
        if self.toward is None or self.partner is not None:
            known = f"{', '.join(ANCESTORS)} or 'step: n'"
            self.refuse("partner", f"a retrace step takes 'toward': {known}")
        if self.toward.startswith("step:"):
            digits = self.toward.removeprefix("step:").strip()
            if not digits.isdecimal():
                self.refuse(
                    "toward", f"'step: n' needs a step's number (0: the baseline), not '{digits}'"
                )
        elif self.toward not in ANCESTORS:
            hint = nearest(self.toward, [*ANCESTORS, "step: n"])
            self.refuse("toward", f"unknown ancestor '{self.toward}'; {hint}")


class Pair(Section):
    """One entry of explicit steps: exactly one of the two."""

    degrade: Degrade | None = field(Degrade, None)
    retrace: Retrace | None = field(Retrace, None)

    def check(self) -> None:
        if (self.degrade is None) == (self.retrace is None):
            raise RecipeError(f"{self.where}: each step is either 'degrade:' or 'retrace:'")

    @property
    def step(self) -> Step:
        """Whichever is given."""
        step = self.degrade or self.retrace
        assert step is not None
        return step


class Moves(Section):
    """Cycles of one degrade and one retrace, or explicit steps."""

    cycles: int | None = field(whole(1, 100_000), None)
    degrade: Degrade | None = field(Degrade, None)
    retrace: Retrace | None = field(Retrace, None)
    steps: tuple[Pair, ...] | None = field(listed(Pair), None)

    def check(self) -> None:
        if self.steps is not None:
            if (self.cycles, self.degrade, self.retrace) != (None, None, None):
                raise RecipeError(f"{self.where}: give either 'steps' or 'cycles', not both")
            if not self.steps:
                raise RecipeError(f"{self.at('steps')}: 'steps' is empty: give at least one")
        elif self.cycles is None or self.degrade is None or self.retrace is None:
            raise RecipeError(
                f"{self.where}: give 'cycles' with 'degrade' and 'retrace', or explicit 'steps'"
            )


class Accept(Section):
    """Which candidates become the state; ``judge: cycle`` passes a degrade, judges a retrace."""

    rule: str = field(one_of("always", "improve", "anneal"), "always")
    judge: str = field(one_of("cycle", "step"), "cycle")
    temperature: float = field(real(above=0), 1.0)  # percent points
    cooling: float = field(real(high=1, above=0), 0.9)  # factor at each judgement


class Stop(Section):
    """Early stop: after ``patience`` judgements without a new best score."""

    patience: int = field(whole(1))


class Compare(Section):
    """One-shot merges with as many evaluations each as the walk spent."""

    methods: tuple[str, ...] = field(listed(string))
    # Evaluations per method; default: as many as the walk spent.
    budget: int | None = field(whole(1), None)
    seeds: int = field(whole(1), 3)  # masks drawn for the chosen random merge

    def check(self) -> None:
        for name in self.methods:
            if name not in BASELINES:
                raise RecipeError(
                    f"{self.at('methods')}: unknown comparison '{name}'; {nearest(name, BASELINES)}"
                )
        if len(set(self.methods)) < len(self.methods):
            raise RecipeError(f"{self.at('methods')}: a comparison is listed twice")


class Schedule(Section):
    """A retrograde run. Models have numbers: 0 the baseline, 1.. the pool, then base_model."""

    refused: ClassVar[Mapping[str, str]] = keys_of_others("schedule")
    baseline: Entry = field(Entry)
    pool: tuple[Entry, ...] = field(listed(Entry), ())
    base_model: str | None = field(string, None)
    schedule: Moves = field(Moves)
    accept: Accept = field(Accept, Accept({}))
    stop: Stop | None = field(Stop, None)
    keep: str = field(one_of("last", "best"), "last")  # the state that becomes the final model
    evaluate: Evaluate | None = field(Evaluate, None)
    compare: Compare | None = field(Compare, None)
    dtype: str | None = field(string, None)  # of the arithmetic, which is float32 whatever it says
    out_dtype: str | None = field(string, None)
    # base: every model's rows in the order of the baseline's tokens.
    tokenizer_source: str | None = field(one_of("base"), None)
    seed: int | None = field(whole(0, below=2**63), None)
    text: str = ""  # the schedule as written, for the record
    folder: Path = Path()  # what relative paths in the file are relative to

    @property
    def tokenizer(self) -> TokenizerSection | None:
        """What is asked of the models' tokenizers."""
        if self.tokenizer_source is None:
            return None
        return TokenizerSection.of_source(self.tokenizer_source, self.at("tokenizer_source"))

    @property
    def foreign(self) -> list[str]:
        """Names and versions of the methods of its steps that are not fastmerge's own."""
        used = (METHODS[step.method] for step in self.steps)
        return sorted({method.identity for method in used if method.version})

    @classmethod
    def written_out(cls, data: LocatedDict) -> LocatedDict:
        keys = {"baseline": "model", "pool": "model", "accept": "rule", "compare": "methods"}
        return expand(data, keys)

    def belongs(self, name: str) -> str:
        return "put it under 'evaluate:'" if name in Evaluate.fields else ""

    def check(self) -> None:
        labels = [self.baseline.label, *(entry.label for entry in self.pool)]
        for entry in self.pool:
            if entry.model == self.baseline.model:
                self.refuse(
                    "pool", f"'{entry.model}' is the baseline itself: remove it from the pool"
                )
            if labels.count(entry.label) > 1:
                self.refuse("pool", f"two models are called '{entry.label}': give them a 'name'")
        for key, entry in (("baseline", self.baseline), *(("pool", entry) for entry in self.pool)):
            label = entry.label
            if not label.strip() or set(label) & set("|`<>\n\r"):
                self.refuse(
                    key,
                    f"{brief(label)} would break tables: give the model a 'name' that is not "
                    "empty, without | ` < > and line breaks",
                )
            # The baseline may be called what it is.
            words = {*POLICIES, *ANCESTORS, STATE, "base_model"} - {key}
            if label in words:
                self.refuse(key, f"'{label}' is a reserved word: give the model a 'name'")
        for number, step in enumerate(self.steps, start=1):
            self._check_step(number, step)
        for key, name in (("dtype", self.dtype), ("out_dtype", self.out_dtype)):
            if name is not None:
                dtypes.parse(name, self.at(key))
        if self.dtype is not None and dtypes.parse(self.dtype) == dtypes.F64:
            self.refuse("dtype", "schedules are walked in float32; write 'dtype: float32'")
        if self.evaluate is None:
            self.check_unmeasured()

    def _check_step(self, number: int, step: Step) -> None:
        if step.partner is not None:
            names = [entry.label for entry in self.pool]
            if not names:
                step.refuse(
                    "partner", "the pool is empty: give at least one model to degrade toward"
                )
            if step.partner in (self.baseline.label, self.baseline.model, "baseline"):
                step.refuse("partner", f"'{step.partner}' is the baseline: retrace goes back to it")
            if step.partner not in POLICIES and self.pool_index(step.partner) is None:
                hint = nearest(step.partner, [*POLICIES, *names])
                step.refuse("partner", f"unknown partner '{step.partner}'; {hint}")
        target = step.target_step
        if target is not None and target >= number:
            step.refuse("toward", f"step {number} cannot go back to step {target}: not taken yet")
        base = self.base_of(step)
        if base not in (None, STATE) and self.model_index(str(base)) is None:
            known = [STATE, "baseline", *self.labels]
            step.refuse("base", f"unknown base '{base}'; {nearest(str(base), known)}")
        method = METHODS[step.method]
        alone = method.max_operands == 1 and method.base == "required"
        if alone and base != STATE:
            step.refuse(
                "base", f"{step.method} takes one model besides the base: give base 'state'"
            )
        if base == STATE and not alone and not isinstance(method, Consensus):
            step.refuse(
                "base",
                f"{step.method} needs a base other than the state: give 'base_model' or 'base'",
            )
        if base == STATE and "lambda" in step.parameters:
            step.refuse("lambda", "with base 'state', t is the factor: remove 'lambda'")

    def check_unmeasured(self, remedy: str = "add an 'evaluate' section") -> None:
        """Raises FastmergeError where the walk needs scores that nothing measures."""
        for key, need, wanted in (
            ("accept", f"accept: {self.accept.rule}", self.accept.rule != "always"),
            ("keep", "keep: best", self.keep == "best"),
            ("stop", "stop", self.stop is not None),
            ("compare", "compare", self.compare is not None),
            ("schedule", "toward: best", any(step.toward == "best" for step in self.steps)),
        ):
            if wanted:
                self.refuse(key, f"'{need}' needs scores: {remedy}")
        ranked = any(step.partner in ("weakest", "strongest") for step in self.steps)
        if ranked and any(entry.accuracy is None for entry in self.pool):
            self.refuse(
                "pool",
                "partner 'weakest' or 'strongest' needs every pool model's 'accuracy', "
                f"or {remedy.removeprefix('add ')}",
            )

    @property
    def steps(self) -> list[Step]:
        """Every step in order, cycles written out."""
        moves = self.schedule
        if moves.steps is not None:
            return [pair.step for pair in moves.steps]
        assert moves.cycles is not None and moves.degrade is not None and moves.retrace is not None
        return [moves.degrade, moves.retrace] * moves.cycles

    def budget(self, walked: int) -> int:
        """How many evaluations each family compared gets; ``walked``: how many the walk makes."""
        settings = self.compare
        return settings.budget if settings and settings.budget else max(1, walked)

    def base_of(self, step: Step) -> str | None:
        """What the step's deltas are taken to: 'state', a model's name, or None for no deltas."""
        if step.base is not None or METHODS[step.method].base != "required":
            return step.base
        return "base_model" if self.base_model is not None else STATE

    @property
    def references(self) -> list[str]:
        """The models as the user wrote them, in the order of their numbers."""
        own = [self.baseline.model, *(entry.model for entry in self.pool)]
        return own if self.base_model in (None, *own) else [*own, str(self.base_model)]

    @property
    def labels(self) -> list[str]:
        """The models' names in reports, in the order of their numbers."""
        own = [self.baseline.label, *(entry.label for entry in self.pool)]
        return own if len(self.references) == len(own) else [*own, "base_model"]

    @property
    def output_dtype(self) -> dtypes.DType | None:
        """The final model's type; None: the models' own."""
        name = self.out_dtype
        return None if name is None else dtypes.parse(name, self.at("out_dtype"))

    def without_evaluation(self) -> Schedule:
        """The same walk, measuring nothing; raises FastmergeError where it needs scores."""
        bare = self.replace(evaluate=None, compare=None)
        bare.check_unmeasured(
            f"leave out {argument('evaluate', False)}"
            if self.evaluate is not None
            else "add an 'evaluate' section"
        )
        return bare

    def pool_index(self, name: str) -> int | None:
        """The number of the pool model called ``name`` (label or path)."""
        found = (i for i, e in enumerate(self.pool, start=1) if name in (e.label, e.model))
        return next(found, None)

    def model_index(self, name: str) -> int | None:
        """The number of any model of the run: 'baseline', 'base_model', a label or a path."""
        if name in ("baseline", self.baseline.label, self.baseline.model):
            return 0
        if self.base_model is not None and name in ("base_model", self.base_model):
            return self.references.index(self.base_model)
        return self.pool_index(name)


def load(source: Any, *, is_scored: bool = False) -> Schedule:
    """A schedule, checked: its own words, not yet its models.

    ``source``: a path, YAML text, a mapping, or a `Schedule`, which is returned as it is.
    ``is_scored``: by a function of the caller's, which needs no `evaluate` section.

    Returns a `Schedule`. Raises RecipeError, with the line of the fault, FastmergeError for what is
    no source.
    """
    documents, written, _ = read(source, "schedule")
    if len(documents) > 1:
        raise RecipeError(f"{documents[1].where}: a schedule file holds one document")
    is_file = isinstance(source, os.PathLike) or (isinstance(source, str) and "\n" not in source)
    folder = Path(source).parent if is_file else Path()
    document = for_function(documents[0]) if a_flag(is_scored, "is_scored") else documents[0]
    return Schedule(document).replace(text=written, folder=folder)


def uses_t(method: Method) -> bool:
    """Whether a step of this method moves a stated fraction (Karcher and Model Stock do not)."""
    return method.parameter("t") is not None or method.parameter("weight") is not None
