"""What a merge of adapters alone comes to: which factors make which, at what rank."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.errors import (
    FastmergeError,
    ModelError,
    RecipeError,
    UnsupportedError,
    few_of_a_kind,
    some_of,
)
from fastmerge.methods.adapters import AdapterMethod
from fastmerge.methods.types import Values
from fastmerge.models import hub
from fastmerge.models.adapter import PREFIX, Adapter, Factors
from fastmerge.models.architecture import layer_of
from fastmerge.models.header import show
from fastmerge.models.side_files import check_card
from fastmerge.once import cached_property
from fastmerge.planning.adapter_plan import AdapterPlan
from fastmerge.planning.values import ParameterValues
from fastmerge.recipe.adapters import AdapterRecipe


@dataclass(frozen=True)
class Part:
    """One adapter's factors in a module: the delta is ``weight * scale * B @ A``."""

    adapter: int
    factors: Factors
    weight: float
    density: float


@dataclass(frozen=True)
class Joined:
    """One module of the output. ``rows``, ``cols``: of the delta."""

    module: str
    embedding: bool
    parts: tuple[Part, ...]
    values: Values  # of the whole merge
    rank: int
    dtype: DType

    @property
    def shape(self) -> tuple[int, int]:
        """Of the delta, as PEFT has it: rows of B, columns of A."""
        return _shape(self.parts[0].factors)

    @property
    def tensors(self) -> tuple[tuple[str, DType, tuple[int, ...]], ...]:
        """PEFT's names of A and B, with types and shapes."""
        rows, cols = self.shape
        head = f"{PREFIX}{self.module}.lora_"
        a, b = ("embedding_A", "embedding_B") if self.embedding else ("A.weight", "B.weight")
        return (
            (f"{head}{a}", self.dtype, (self.rank, cols)),
            (f"{head}{b}", self.dtype, (rows, self.rank)),
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterMerge(AdapterPlan):
    """``models``: the adapters."""

    method: AdapterMethod
    joined: tuple[Joined, ...]
    target_names: tuple[str, ...]

    def bytes_in(self, item: Joined) -> int:
        """Of the factors that one module of the output is made of."""
        return sum(
            self.models[part.adapter].tensors[name].nbytes
            for part in item.parts
            for name in (part.factors.a, part.factors.b)
        )

    def describe(self) -> dict[str, Any]:
        """The plan in plain values, for people and for JSON."""
        tensors = [tensor for item in self.joined for tensor in item.tensors]
        ranks = {part.adapter: set[int]() for item in self.joined for part in item.parts}
        for part in (part for item in self.joined for part in item.parts):
            ranks[part.adapter].add(part.factors.rank)
        return {
            "method": self.method.name,
            "base": self.config["base_model_name_or_path"],
            "adapters": [
                {
                    "reference": reference,
                    "path": model.label,
                    "modules": sum(p.adapter == i for item in self.joined for p in item.parts),
                    "ranks": sorted(ranks[i]),
                }
                for i, (reference, model) in enumerate(
                    zip(self.references, self.models, strict=True)
                )
            ],
            "modules": len(self.joined),
            "ranks": sorted({item.rank for item in self.joined}),
            "dtypes": sorted({item.dtype.name for item in self.joined}),
            "bytes_in": sum(map(self.bytes_in, self.joined)),
            "bytes_out": sum(dtype.bytes_for(math.prod(shape)) for _, dtype, shape in tensors),
            "seed": self.seed,
            "seed_derived": self.seed_derived,
            "notes": list(self.notes),
        }


def plan_adapters(recipe: AdapterRecipe, seed: int | None = None) -> AdapterMerge:
    """Decides everything from configs and headers. Raises FastmergeError, one line, for adapters
    that cannot be merged so.
    """
    adapters = []
    for entry in recipe.models:
        try:
            adapters.append(Adapter.open(hub.resolve(entry.model)))
            check_card(adapters[-1].path)
        except FastmergeError as error:
            raise type(error)(f"{entry.at('model')}: {error}") from None
    return _Merging(recipe, adapters).plan(seed)


class _Merging:
    def __init__(self, recipe: AdapterRecipe, adapters: Sequence[Adapter]) -> None:
        self.recipe, self.adapters = recipe, tuple(adapters)
        self.method = recipe.method
        self.names = [entry.model for entry in recipe.models]
        self.notes: list[str] = []
        levels = [recipe.parameters]
        where = f"{recipe.where}: {self.method.name}"
        own = [p for p in self.method.parameters if p.per_model]
        shared = [p for p in self.method.parameters if not p.per_model]
        self.shared = ParameterValues(shared, levels, f"{where} needs '{{name}}'")
        self.each = [
            ParameterValues(
                own,
                [entry.parameters, *levels],
                f"{entry.where}: {self.method.name} needs the parameter '{{name}}' of "
                f"'{entry.model}'; give it under its 'parameters:'",
            )
            for entry in recipe.models
        ]

    def plan(self, seed: int | None) -> AdapterMerge:
        for entry, adapter in zip(self.recipe.models, self.adapters, strict=True):
            _check_kind(adapter, entry.model, entry.at("model"))
            if adapter.remark:
                self.notes.append(adapter.remark)
        base = self._base()
        self._check_targets()
        joined = tuple(self._joined(module) for module in self._modules)
        settings = self._settings(joined)
        given = self.recipe.own_seed if seed is None else seed
        digest = hashlib.blake2b(json.dumps(settings, default=str).encode(), digest_size=4)
        derived = int.from_bytes(digest.digest(), "little")
        return AdapterMerge(
            models=self.adapters,
            references=tuple(self.names),
            config=self._config(base),
            settings=settings,
            seed=(derived if given is None else given) if self.method.random else None,
            seed_derived=self.method.random and given is None,
            recipe_text=self.recipe.text,
            notes=few_of_a_kind(self.notes),
            method=self.method,
            joined=joined,
            target_names=tuple(self._target_names()),
        )

    @cached_property
    def _modules(self) -> list[str]:
        """Every module that an adapter has factors for, in the order of the first that has it."""
        return list(dict.fromkeys(name for adapter in self.adapters for name in adapter.factors))

    # -------- what all must have in common

    def _base(self) -> str | None:
        """The name of the model that they adapt."""
        said = [adapter.base_name for adapter in self.adapters]
        named = [(own, name) for own, name in zip(said, self.names, strict=True) if own]
        last = {_last_part(own) for own, _ in named}
        if self.recipe.base_model is not None:
            if len(last) > 1:
                self.notes.append(
                    "the adapters name other bases, and base_model says that they are one: "
                    + ", ".join(dict.fromkeys(str(own) for own, _ in named))
                )
            return self.recipe.base_model
        if len(last) > 1:
            a, of_a = named[0]
            b, of_b = next(item for item in named if _last_part(item[0]) != _last_part(a))
            raise ModelError(
                f"{self.recipe.at('models')}: '{of_a}' adapts '{a}', '{of_b}' adapts '{b}'; merge "
                "adapters of one base, or give 'base_model:' where these are one"
            )
        return str(named[0][0]) if named else None

    def _check_targets(self) -> None:
        if self.shared.at("", 0.0)["targets"] == "same":
            first = self.adapters[0].factors
            for adapter, name in zip(self.adapters[1:], self.names[1:], strict=True):
                _check_has(adapter.factors, first, name, self.names[0])
                _check_has(first, adapter.factors, self.names[0], name)
        for module in self._modules:
            (first_name, one), *others = self._having(module)
            for name, other in others:
                if _shape(one) != _shape(other) or one.embedding != other.embedding:
                    raise ModelError(
                        f"{show(module)}: '{first_name}' adapts a matrix of {list(_shape(one))}, "
                        f"'{name}' one of {list(_shape(other))}; merge adapters of one base"
                    )
                if self.method.over == "factors" and one.rank != other.rank:
                    raise ModelError(
                        f"{show(module)}: rank {one.rank} in '{first_name}', {other.rank} in "
                        f"'{name}', and {self.method.name} adds factors entry by entry; use "
                        f"merge_method {self._instead()}"
                    )

    def _instead(self) -> str:
        name = f"{self.method.name}_svd"
        return "cat or svd" if self.method.name == "linear" else name

    def _having(self, module: str) -> list[tuple[str, Factors]]:
        pairs = zip(self.names, self.adapters, strict=True)
        return [(name, own.factors[module]) for name, own in pairs if module in own.factors]

    # -------- one module

    def _joined(self, module: str) -> Joined:
        t = self._position(module)
        values = self.shared.at(module, t)
        if values.get("svd_clamp") is not None and not self.method.cuts(values.get("rank")):
            raise RecipeError(
                f"{self.recipe.at('parameters')}: 'svd_clamp' has no effect without a 'rank'; give "
                "one, or leave it out"
            )
        parts, total = [], 0.0
        for number, (adapter, own) in enumerate(zip(self.adapters, self.each, strict=True)):
            mine = own.at(module, t)
            total += mine["weight"]
            if module in adapter.factors:
                density = mine.get("density", 1.0)
                parts.append(Part(number, adapter.factors[module], mine["weight"], density))
        if values["normalize"]:
            if abs(total) < 1e-8:
                raise RecipeError(
                    f"{self.recipe.where}: the weights of {show(module)} add up to {total:g}; "
                    "set 'normalize: false'"
                )
            parts = [Part(p.adapter, p.factors, p.weight / total, p.density) for p in parts]
        first = parts[0].factors
        stored = self.adapters[parts[0].adapter].tensors[first.a].dtype
        return Joined(
            module,
            first.embedding,
            tuple(parts),
            values,
            self._rank(module, [p.factors.rank for p in parts], _shape(first), values.get("rank")),
            self.recipe.output_dtype or stored,
        )

    def _rank(
        self, module: str, ranks: Sequence[int], shape: tuple[int, int], asked: int | None
    ) -> int:
        """Of the output's factors."""
        method = self.method
        if method.over == "factors":
            return ranks[0]
        if not method.cuts(asked):
            return sum(ranks)
        given = asked is not None
        if asked is None:
            asked = self._largest_rank
        elif asked > min(shape):
            raise RecipeError(
                f"{self.recipe.at('parameters')}: rank {asked} is more than {show(module)}, "
                f"{list(shape)}, can have; give at most {min(shape)}"
            )
        # A sum has no more than its parts have together; what is merged by entries has all.
        most = min(*shape, sum(ranks)) if method.over == "sum" else min(shape)
        if given and asked > most:
            self.notes.append(
                f"{show(module)} has rank {most}, all that its adapters have together"
            )
        return min(asked, most)

    @cached_property
    def _largest_rank(self) -> int:
        """Of any module of any adapter: what PEFT gives all of them where none is asked for."""
        return max(own.rank for adapter in self.adapters for own in adapter.factors.values())

    def _position(self, module: str) -> float:
        """Where the module's layer lies in its stack: 0 to 1, as far as adapters know of it."""
        place = layer_of(module)
        if place is None:
            return 0.0
        count = self._layers[place.stack]
        return place.number / (count - 1) if count > 1 else 1.0

    @cached_property
    def _layers(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for place in map(layer_of, self._modules):
            if place is not None:
                found[place.stack] = max(found.get(place.stack, 0), place.number + 1)
        return found

    # -------- what is written

    def _settings(self, joined: Sequence[Joined]) -> dict[str, Any]:
        """The method and every value that counts, each module's where they differ."""

        def of(item: Joined) -> dict[str, Any]:
            shown = {k: v for k, v in item.values.items() if v is not None}
            weights = {self.names[p.adapter]: p.weight for p in item.parts}
            densities = {self.names[p.adapter]: p.density for p in item.parts}
            return {**shown, "weights": list(weights.values())} | (
                {"densities": list(densities.values())} if self.method.prune else {}
            )

        each = {item.module: of(item) for item in joined}
        same = {json.dumps(values, default=str) for values in each.values()}
        head = {"merge_method": self.method.name}
        return {**head, **(next(iter(each.values())) if len(same) == 1 else {"modules": each})}

    def _target_names(self) -> list[str]:
        """What PEFT finds the modules by: the adapters' own lists, where these say no more than
        which modules, else every module's name.
        """
        narrowed = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")
        configs = [adapter.config for adapter in self.adapters]
        lists = [config.get("target_modules") for config in configs]
        if any(config.get(key) for config in configs for key in narrowed) or not all(
            isinstance(own, list) for own in lists
        ):
            return self._modules
        return sorted({str(name) for own in lists for name in own or ()})

    def _config(self, base: str | None) -> Mapping[str, Any]:
        first = self.adapters[0].config
        config = {
            "task_type": first.get("task_type"),
            "base_model_name_or_path": base,
            "lora_dropout": first.get("lora_dropout", 0.0),
            "fan_in_fan_out": any(own.config.get("fan_in_fan_out") for own in self.adapters),
            "bias": "none",
            "modules_to_save": None,
        }
        revisions = {own.config.get("revision") for own in self.adapters}
        return {**config, "revision": revisions.pop()} if len(revisions) == 1 else config


def _last_part(name: str) -> str:
    """A base's name without its owner, or the folders that it lies in."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _shape(factors: Factors) -> tuple[int, int]:
    """Of the delta: rows of B, columns of A."""
    return factors.out_size, factors.in_size


def _check_has(these: Collection[str], those: Collection[str], has: str, lacks: str) -> None:
    """Raises ModelError where the second lacks a module that the first adapts."""
    missing = [show(module) for module in these if module not in those]
    if missing:
        raise ModelError(
            f"'{has}' adapts {some_of(missing)}, which '{lacks}' does not; give "
            "'targets: any' to take each where it is there"
        )


def _check_kind(adapter: Adapter, name: str, where: str) -> None:
    """Raises UnsupportedError for what is no sum of products of two factors."""
    instead = "fold it into its base, and merge the models"
    for module, own in adapter.factors.items():
        if own.matrices is not None:
            raise UnsupportedError(
                f"{where}: '{name}' adapts a parameter ({show(module)}, by target_parameters), "
                f"which PEFT does not merge either; {instead}"
            )
        if own.magnitude is not None:
            raise UnsupportedError(
                f"{where}: '{name}' is a DoRA adapter, whose magnitudes belong to its own base; "
                f"{instead}"
            )
        if len(adapter.tensors[own.a].shape) != 2:
            raise UnsupportedError(
                f"{where}: '{name}' adapts a convolution ({show(module)}); {instead}"
            )
    biases = (own.bias for own in adapter.factors.values() if own.bias is not None)
    rows = (tokens.rows for tokens in adapter.tokens.values())
    for whole in (*adapter.saved.values(), *rows, *biases):
        raise UnsupportedError(
            f"{where}: '{name}' has more than factors ({show(whole)}), which adapters alone do "
            f"not say how to merge; {instead}"
        )
