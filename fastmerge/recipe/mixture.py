"""mergekit-moe's recipe language: dense models whose MLPs become the experts of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fastmerge.dtypes import DType
from fastmerge.dtypes import parse as parse_dtype
from fastmerge.errors import RecipeError, nearest
from fastmerge.recipe.reference import reference
from fastmerge.recipe.section import FaultError, Section, field, listed, real, string, whole

# What a router's rows are made of; `hidden` is `hidden_last`.
GATE_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
DRAWN = ("random", "uniform_random")

_LARGEST_F32 = 3.4e38  # what tensors are computed in
_MERGE = "a mixture of experts is no merge; name its models under 'experts:'"


def _prompts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise FaultError("must be a list of prompts")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise FaultError("must be text; quote it", index)
    return tuple(value)


def _gate_mode(value: Any) -> str:
    if not isinstance(value, str) or value not in GATE_MODES:
        hint = nearest(str(value), GATE_MODES)
        raise FaultError(f"is unknown: '{value}'; {hint}")
    return value


class Expert(Section):
    """One entry of ``experts:`` or ``shared_experts:``: the model whose MLPs they are."""

    tolerant: ClassVar[bool] = True

    source_model: str = field(reference)
    positive_prompts: tuple[str, ...] | None = field(_prompts, None)
    negative_prompts: tuple[str, ...] | None = field(_prompts, None)
    noise_scale: float | None = field(real(0, _LARGEST_F32), None)
    residual_scale: float | None = field(real(-_LARGEST_F32, _LARGEST_F32), None)

    def hint(self, name: str) -> str:
        return "write 'source_model:'" if name == "model" else super().hint(name)

    def misspells(self, name: str) -> bool:
        return name == "model" or super().misspells(name)

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those for it and those against it."""
        return self.positive_prompts or (), self.negative_prompts or ()


class Mixture(Section):
    """One document that makes a mixture of experts; where others merge."""

    tolerant: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(("models", "slices", "modules"), _MERGE)

    base_model: str = field(reference)
    experts: tuple[Expert, ...] = field(listed(Expert))
    gate_mode: str = field(_gate_mode, "hidden")
    shared_experts: tuple[Expert, ...] | None = field(listed(Expert), None)
    experts_per_token: int = field(whole(1), 2)
    architecture: str | None = field(string, None)
    dtype: str | None = field(string, None)
    name: str | None = field(string, None)
    seed: int | None = field(whole(0, below=1 << 64), None)

    # What a document of a merge may ask for, and this one does not.
    vocabulary: ClassVar[None] = None
    chat_template: ClassVar[None] = None

    def check(self) -> None:
        count = len(self.experts)
        if count < 2:
            raise RecipeError(f"{self.at('experts')}: a mixture needs two experts or more")
        if count < self.experts_per_token:
            raise RecipeError(
                f"{self.at('experts_per_token')}: {self.experts_per_token} experts per token of "
                f"the {count} that there are; give at most {count}"
            )
        if self.dtype is not None:
            parse_dtype(self.dtype, f"{self.at('dtype')}: dtype")
        if self.draws_gates:
            return
        if self.is_unprompted:
            return
        gated = (*self.experts, *(e for e in self.shared_experts or () if e.prompts[1]))
        for expert in gated:
            if not expert.prompts[0]:
                raise RecipeError(
                    f"{expert.at('positive_prompts')}: gate_mode {self.gate_mode} needs "
                    f"'positive_prompts:' for expert '{expert.source_model}'; give some, or write "
                    "`gate_mode: random`"
                )

    @property
    def draws_gates(self) -> bool:
        """Whether the routers are random."""
        return self.gate_mode in DRAWN

    @property
    def draws(self) -> bool:
        """Whether anything is drawn from the seed."""
        return self.draws_gates or any(e.noise_scale for e in self.entries())

    @property
    def is_unprompted(self) -> bool:
        """Whether nothing tells the experts apart, and nothing need: each token asks them all."""
        return len(self.experts) == self.experts_per_token and all(
            expert.positive_prompts == () and not expert.negative_prompts for expert in self.experts
        )

    @property
    def own_seed(self) -> int | None:
        return self.seed

    @property
    def output_dtype(self) -> DType | None:
        """The type written, where the recipe says it."""
        return None if self.dtype is None else parse_dtype(self.dtype, f"{self.at('dtype')}: dtype")

    def entries(self) -> Iterator[Expert]:
        """The experts, and behind them those that are shared."""
        yield from self.experts
        yield from self.shared_experts or ()

    def references(self) -> list[tuple[str, str]]:
        """Every model named, with its place, in recipe order."""
        found = {self.base_model: self.at("base_model")}
        for expert in self.entries():
            found.setdefault(expert.source_model, expert.at("source_model"))
        return list(found.items())

    def hint(self, name: str) -> str:
        if name in Expert.fields:
            return "it belongs to one of the 'experts:'"
        return super().hint(name)

    def ignored_lines(self) -> list[str]:
        """The one line about keys that mean nothing, where there are any, and one about prompts
        that nobody reads.
        """
        found = dict.fromkeys(
            line for section in (self, *self.entries()) for line in section.ignored
        )
        lines = [f"without effect, here as in mergekit: {', '.join(found)}"] if found else []
        if self.draws_gates and any(any(expert.prompts) for expert in self.entries()):
            lines.append(f"prompts have no effect with gate_mode {self.gate_mode}")
        return lines
