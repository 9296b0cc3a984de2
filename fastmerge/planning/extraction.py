"""What is extracted of a tuned model as an adapter of its base: which matrices by low rank, which
tensors whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError, argument, nearest
from fastmerge.models.adapter import PREFIX, check_letters
from fastmerge.models.architecture import COMPUTED, find_embedding, find_head
from fastmerge.models.config import CAUSAL, classes_of, is_tied, model_type
from fastmerge.models.header import show
from fastmerge.models.low_precision import find_low_precision
from fastmerge.models.model import Model, TensorInfo, same_bytes, same_numbers
from fastmerge.models.names import prefix_hint, renamed
from fastmerge.models.quantised import find_quantised
from fastmerge.once import cached_property
from fastmerge.planning.adapter_plan import AdapterPlan, short_names
from fastmerge.planning.peft_names import Named, as_loaded, check_experts, is_expert, named

# Whose projections are transformers' Conv1D, which stores (in, out); as of 5.23.
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_EMBEDDING_LEAF = re.compile(r".*embed.*|wte|wpe")
_TASKS = {
    **dict.fromkeys(CAUSAL, "CAUSAL_LM"),
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Choice:
    """What is asked of an extraction; see `fastmerge.extract_lora`."""

    rank: int
    at_most: bool = False  # a matrix with a smaller side gets all that it has
    dtype: DType | None = None  # of the factors; None: the tuned model's
    include: tuple[str, ...] = ()  # regular expressions, searched in modules' names
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()  # modules to save whole, by name or its last part
    embed_lora: bool = False
    skip_undecomposable: bool = False
    distribute_scale: bool = True
    sv_epsilon: float = 0.0
    power_iterations: int = 2

    @property
    def plain(self) -> dict[str, Any]:
        """The values that are not the default, for people and for the job's key."""
        default = Choice(self.rank)
        found: dict[str, Any] = {"max_rank" if self.at_most else "rank": self.rank}
        for name, value in vars(self).items():
            if value != getattr(default, name) and name not in ("rank", "at_most"):
                found[name] = list(value) if isinstance(value, tuple) else value
        if self.dtype is not None:
            found["dtype"] = self.dtype.name
        return found


@dataclass(frozen=True)
class Target:
    """A matrix of which factors are taken. ``shape``: as stored. ``transposed``: the adapter's
    delta is the transpose of what is stored (Conv1D, embeddings).
    """

    module: str
    tuned: TensorInfo
    base: TensorInfo
    kind: str  # "lora" or "lora_embedding", as PEFT calls the factors
    dtype: DType  # of the factors
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """As it is stored."""
        rows, cols = self.tuned.shape
        return rows, cols

    def named(self, rank: int) -> tuple[tuple[str, DType, tuple[int, ...]], ...]:
        """PEFT's names of A and B, with types and shapes."""
        rows, cols = reversed(self.shape) if self.transposed else self.shape
        end = "" if self.kind == "lora_embedding" else ".weight"
        head = f"{PREFIX}{self.module}.{self.kind}"
        return (
            (f"{head}_A{end}", self.dtype, (rank, cols)),
            (f"{head}_B{end}", self.dtype, (rows, rank)),
        )


@dataclass(frozen=True)
class Saved:
    """A tensor of the tuned model that the adapter holds whole, under PEFT's name."""

    name: str
    tuned: TensorInfo


@dataclass(frozen=True, kw_only=True, repr=False)
class Extraction(AdapterPlan):
    """``models``: tuned and base. ``modules``: the names of all of the model's."""

    choice: Choice
    targets: tuple[Target, ...]
    saved: tuple[Saved, ...]
    modules: tuple[str, ...]

    @property
    def named(self) -> Named:
        """What PEFT finds the targets by."""
        kind = model_type(self.models[0].config)
        return named([target.module for target in self.targets], self.modules, kind)


def plan_extraction(
    tuned: Model, base: Model, references: tuple[str, str], choice: Choice, seed: int | None
) -> Extraction:
    """Decides everything; of the weights it reads what is equal in both, which is left out.

    Raises FastmergeError where the models are not two of one architecture and vocabulary.
    """
    return _Extractor(tuned, base, references, choice).plan(seed)


@dataclass
class _Extractor:
    tuned: Model
    base: Model
    references: tuple[str, str]
    choice: Choice
    targets: list[Target] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    whole: dict[str, None] = field(default_factory=dict)  # modules that are saved
    notes: list[str] = field(default_factory=list)
    equal: int = 0
    undecomposable: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)  # embeddings and heads that no pattern names

    def plan(self, seed: int | None) -> Extraction:
        for model, name in ((self.tuned, self.references[0]), (self.base, self.references[1])):
            found = find_quantised(model.config, model.tensors, model.folder)
            if found is not None:
                read = find_low_precision(model.config, model.tensors, model.label)
                remedy = "give the original weights" + (
                    ", or numbers of its codes: a recipe with `merge_method: passthrough` and "
                    "`dtype: bfloat16` writes them"
                ) * (read is not None)
                raise UnsupportedError(
                    f"'{name}' is quantised ({found.kind}), and a difference is taken of weights "
                    f"as they are; {remedy}"
                )
        self._check_names()
        keep = {*self.choice.save}
        for name in self._weights:
            self._module(name.removesuffix(".weight"), name, keep)
        self._tie()
        self._complete_experts()
        self._check_patterns(keep)
        if not self.targets:
            raise ModelError(
                f"'{self.references[0]}' and '{self.references[1]}': no matrix to take factors of"
                + (": all are equal" if self.equal and not self.saved else "")
                + "; choose other models or patterns"
            )
        self._say()
        self._rename()
        return Extraction(
            models=(self.tuned, self.base),
            references=self.references,
            config=self._config(),
            settings=self.choice.plain,
            seed=0 if seed is None else seed,
            seed_derived=False,
            recipe_text="",
            notes=tuple(self.notes),
            choice=self.choice,
            targets=tuple(self.targets),
            saved=tuple(self.saved),
            modules=self._loaded,
        )

    # -------- the two models

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tuned.tensors.items()}

    @cached_property
    def _weights(self) -> list[str]:
        return [n for n in self.tuned.tensors if n.endswith(".weight")]

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        """Every module's name, those that hold others too, and a tied head's."""
        found: dict[str, None] = {}
        for name in self.tuned.tensors:
            parts = name.split(".")[:-1]
            found.update(dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts))))
        if self._tied_head:
            found[self._tied_head] = None
        return tuple(found)

    @cached_property
    def _loaded(self) -> tuple[str, ...]:
        """The modules' names once they are loaded, as far as those are known."""
        found = []
        for name in self._modules:
            try:
                found.append(as_loaded(f"{name}.", self.tuned.config).removesuffix("."))
            except UnsupportedError:
                found.append(name)
        return tuple(found)

    @cached_property
    def _embedding(self) -> str | None:
        return find_embedding(self._shapes)

    @cached_property
    def _head(self) -> str | None:
        return find_head(self._shapes)

    @property
    def _class(self) -> str:
        return next(iter(classes_of(self.tuned.config)), "")

    @cached_property
    def _tied_head(self) -> str | None:
        """The module whose weight is the embeddings', where it is not stored."""
        has = self._class.endswith(CAUSAL)
        tied = self._head is None and self._embedding is not None and is_tied(self.tuned.config)
        return "lm_head" if has and tied else None

    def _base(self, name: str) -> TensorInfo:
        """The base's tensor, which for a head that it ties is its embeddings."""
        tensors = self.base.tensors
        if name not in tensors and name == self._head and is_tied(self.base.config):
            return tensors[find_embedding({n: i.shape for n, i in tensors.items()}) or name]
        return tensors[name]

    def _check_names(self) -> None:
        tuned, base = self.references
        mine, theirs = self.tuned.tensors, self.base.tensors
        for name, info in mine.items():
            check_letters(name, f"'{tuned}'")
            try:
                other = self._base(name)
            except KeyError:
                moved = renamed(list(mine), list(theirs))
                if name.endswith(COMPUTED):
                    continue
                raise ModelError(
                    f"'{base}' has no tensor {show(name)}, which '{tuned}' has; "
                    + (prefix_hint(moved[0], tuned, moved[1], base) if moved else
                       f"give the model that it was tuned from ({nearest(name, theirs, limit=3)})")
                ) from None  # fmt: skip
            if info.shape == other.shape:
                continue
            if name in (self._embedding, self._head):
                raise ModelError(
                    f"{show(name)}: {info.shape[0]} tokens in '{tuned}', {other.shape[0]} in "
                    f"'{base}'; give a base whose embeddings are resized to the tuned model's"
                )
            raise ModelError(
                f"{show(name)}: shape {list(info.shape)} in '{tuned}', {list(other.shape)} in "
                f"'{base}'; give the model that it was tuned from"
            )
        for name in theirs:
            if (
                name not in mine
                and not name.endswith(COMPUTED)
                and not name.endswith("lm_head.weight")
            ):
                raise ModelError(
                    f"'{tuned}' has no tensor {show(name)}, which '{base}' has; give the model "
                    "that it was tuned from"
                )

    def _same(self, name: str) -> bool:
        mine, other = self.tuned.tensors[name], self._base(name)
        if mine.dtype == other.dtype:
            return same_bytes(self.tuned, name, self.base, other.name)
        both = mine.dtype.mergeable and other.dtype.mergeable
        return both and same_numbers(self.tuned, name, self.base, other.name)

    # -------- one module, by mergekit 0.1.5's rules (scripts/extract_lora.py)

    def _module(self, module: str, name: str, keep: set[str]) -> None:
        leaf = module.rpartition(".")[2]
        excluded = any(re.search(pattern, module) for pattern in self.choice.exclude)
        included = not self.choice.include or any(
            re.search(pattern, module) for pattern in self.choice.include
        )
        embedding = name == self._embedding or (
            len(self._shapes[name]) == 2 and _EMBEDDING_LEAF.fullmatch(leaf) is not None
        )
        matrix = len(self._shapes[name]) == 2
        # Factors of weights that two modules share would be added to them twice.
        by_factors = self.choice.embed_lora and not (self._tied_head and name == self._embedding)
        if (embedding or name == self._head) and not by_factors and not excluded:
            keep.add(leaf)
            if not included:
                self.beyond.append(module)
        if module in keep or leaf in keep:
            self._save(module)
        elif included and not excluded:
            if matrix:
                self._factor(module, name, embedding)
            elif not self.choice.skip_undecomposable:
                keep.add(leaf)
                self._save(module)
            elif not self._same(name):
                self.undecomposable.append(module)

    def _complete_experts(self) -> None:
        """Where any expert's matrix has factors, those that are equal have some too: zeros."""
        have = {target.module for target in self.targets}
        experts = [name for name in self._weights if is_expert(name)]
        wanted = [name for name in experts if name.removesuffix(".weight") in have]
        rest = [name for name in experts if name.removesuffix(".weight") not in have]
        check_experts(
            wanted,
            (name for name in rest if not self._same(name)),
            model_type(self.tuned.config),
        )
        if wanted:
            self.targets += (self._target(n.removesuffix(".weight"), n, False) for n in rest)
            self.equal -= len(rest)

    def _save(self, module: str) -> None:
        """All of the module, where any of it differs: PEFT loads it whole."""
        own = [n for n in (f"{module}.weight", f"{module}.bias") if n in self.tuned.tensors]
        if all(map(self._same, own)):
            self.equal += 1
            return
        self.whole[module] = None
        self.saved += (Saved(f"{PREFIX}{n}", self.tuned.tensors[n]) for n in own)

    def _factor(self, module: str, name: str, embedding: bool) -> None:
        if self._same(name):
            self.equal += 1
        else:
            self.targets.append(self._target(module, name, embedding))
        bias = f"{module}.bias"
        if bias in self.tuned.tensors and not self._same(bias):
            place = f"{PREFIX}{module}.base_layer.bias"
            self.saved.append(Saved(place, self.tuned.tensors[bias]))
            if self._same(name):  # PEFT keeps the biases of targets
                self.targets.append(self._target(module, name, embedding))

    def _target(self, module: str, name: str, embedding: bool) -> Target:
        tuned, base = self.tuned.tensors[name], self._base(name)
        for info, reference in ((tuned, self.references[0]), (base, self.references[1])):
            if not info.dtype.kernels:
                raise UnsupportedError(
                    f"'{reference}': {show(name)} is {info.dtype.name}; factors are taken of "
                    "bfloat16, float16 and float32"
                )
        least = min(tuned.shape)
        if self.choice.rank > least and not self.choice.at_most:
            raise ModelError(
                f"{show(name)} is {list(tuned.shape)}: rank {self.choice.rank} is more than it can "
                f"have; give {argument('rank', least)} or less, or "
                f"{argument('max_rank', self.choice.rank)}"
            )
        conv1d = model_type(self.tuned.config) in _CONV1D and not embedding and name != self._head
        return Target(
            module,
            tuned,
            base,
            "lora_embedding" if embedding else "lora",
            self.choice.dtype or tuned.dtype,
            transposed=embedding or conv1d,
        )

    def _tie(self) -> None:
        """Embeddings that are saved whole and are the head too are saved for the head: PEFT gives
        either module a copy of its own.
        """
        head, name = self._tied_head, self._embedding
        if head is None or name is None or name.removesuffix(".weight") not in self.whole:
            return
        self.whole[head] = None
        self.saved.append(Saved(f"{PREFIX}{head}.weight", self.tuned.tensors[name]))
        if self.choice.embed_lora:
            self.notes.append(f"{name.removesuffix('.weight')} is the head too, and saved whole")

    def _rename(self) -> None:
        """Modules by the names that PEFT finds them under."""
        config = self.tuned.config

        def now(name: str) -> str:
            return as_loaded(f"{name}.", config).removesuffix(".")

        self.targets = [replace(each, module=now(each.module)) for each in self.targets]
        self.saved = [
            replace(each, name=f"{PREFIX}{now(each.name.removeprefix(PREFIX))}")
            for each in self.saved
        ]
        self.whole = {now(name): None for name in self.whole}

    # -------- what is said

    def _check_patterns(self, keep: Iterable[str]) -> None:
        leaves = {module.rpartition(".")[2] for module in self._modules}
        for name in keep:
            if name not in leaves and name not in self._modules:
                raise FastmergeError(
                    f"{argument('save_modules')}: {name}: no module is called so; "
                    f"{nearest(name, {*leaves, *self._modules})}"
                )

    def _say(self) -> None:
        if self.equal:
            self.notes.append(f"equal in both models, and left out: {self.equal} modules")
        if self.whole:
            names = short_names(self.whole, self._modules, dotted=False)
            self.notes.append(f"saved whole: {', '.join(names[:8])}{', ...' if names[8:] else ''}")
        unasked = [name for name in self.beyond if name in self.whole]
        if unasked:
            self.notes.append(
                f"no pattern includes {', '.join(unasked)}: embeddings and heads that differ are "
                "saved whole all the same, as in mergekit; a pattern to exclude leaves them out"
            )
        if self.undecomposable:
            self.notes.append(
                f"differ and are left out, as they have no factors: {len(self.undecomposable)} "
                f"modules ({self.undecomposable[0]}, ...)"
            )
        loose = [
            name
            for name in self.tuned.tensors
            if not name.endswith((".weight", ".bias", COMPUTED)) and not self._same(name)
        ]
        stack = next((name for name in loose if len(self._shapes[name]) > 2), None)
        if stack is not None and not self.choice.skip_undecomposable:
            raise UnsupportedError(
                f"{show(stack)} differs and is {list(self._shapes[stack])}: factors are taken of "
                f"single matrices; give {argument('skip_undecomposable', True)} to leave stacks out"
            )
        if loose:
            self.notes.append(
                f"differ and are left out, as no factors are taken of them: {len(loose)} "
                f"parameters ({loose[0]}, ...)"
            )

    def _config(self) -> Mapping[str, Any]:
        task = next((task for end, task in _TASKS.items() if self._class.endswith(end)), None)
        has_bias = any(saved.name.endswith(".base_layer.bias") for saved in self.saved)
        saved: Sequence[str] = short_names(self.whole, self._loaded, dotted=False)
        return {
            "task_type": task,
            "base_model_name_or_path": self.references[1],
            "lora_dropout": 0.0,
            "fan_in_fan_out": any(t.transposed and t.kind == "lora" for t in self.targets),
            "bias": "lora_only" if has_bias else "none",
            "modules_to_save": saved or None,
        }
