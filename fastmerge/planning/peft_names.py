"""What an extracted adapter's config calls its modules, so that PEFT finds them in the modules that
transformers 5 loads a mixture of experts into.

That version stacks experts (planning/experts.py), and PEFT 0.21 converts factors of each as it
loads them (utils/transformers_weight_conversion.py): those of all experts or of none, of gate and
up together, of one rank, which is the config's ``r``. It takes every other module of such a name
(a shared expert's gate_proj, the router) for one of them, unless its weight is named as a
parameter; routers are no linear layers besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastmerge.errors import UnsupportedError
from fastmerge.models.config import text_config
from fastmerge.models.header import show
from fastmerge.planning.adapter_plan import short_names
from fastmerge.planning.experts import EXPERT

# Whose experts PEFT converts, by model_type, and what it takes for one of their matrices; the rest
# of those that transformers stacks it does not find. A test compares them with the installed one.
_MIXTRAL = """mixtral minimax minimax_m2"""
_QWEN = """afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe
    flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe
    qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker
    solar_open"""
_TAKEN = {
    **dict.fromkeys(_MIXTRAL.split(), ("gate", "w1", "w2", "w3")),
    **dict.fromkeys(_QWEN.split(), ("gate", "gate_proj", "up_proj", "down_proj")),
}
_ROUTERS = ("gate", "router")
_MOST_PARTS = 3  # of a name's end that is looked for instead of the whole


class Named(NamedTuple):
    """``target_modules`` and ``target_parameters``; ``rank_keys``: what the patterns of ranks call
    modules whose name is not enough. ``rank_of``: a module whose rank is the config's ``r``.
    """

    modules: list[str]
    parameters: list[str]
    rank_keys: Mapping[str, tuple[str, ...]]
    rank_of: str | None


def is_expert(weight: str) -> bool:
    """Whether a tensor is one expert's matrix."""
    return EXPERT.fullmatch(weight) is not None


def check_experts(wanted: Iterable[str], left_out: Iterable[str], kind: str) -> None:
    """Raises UnsupportedError where experts' factors cannot be loaded: of a model of the type
    ``kind`` that PEFT does not convert, or where some are ``left_out``.
    """
    first = next(iter(wanted), None)
    if first is None:
        return
    without = "leave all of them out (exclude the expression [.]experts[.])"
    if kind not in _TAKEN:
        raise UnsupportedError(
            f"{show(first)}: transformers stacks the experts of model_type '{kind}' as it loads "
            f"them, and PEFT loads no factors of each; {without}"
        )
    lost = next(iter(left_out), None)
    if lost is not None:
        raise UnsupportedError(
            f"{show(lost)} is left out, and {show(first)} is not: PEFT loads factors of all of the "
            f"experts' matrices or of none; {without}"
        )


def named(targets: Sequence[str], modules: Sequence[str], kind: str) -> Named:
    """How the config names ``targets`` among all ``modules`` of a model of the type ``kind``."""
    experts = [name for name in targets if is_expert(f"{name}.weight")]
    mixture = any(".experts." in name or name.endswith(".experts") for name in modules)
    taken = set(_TAKEN.get(kind, ())) | (set(_ROUTERS) if mixture else set())
    own = set(experts)
    by_weight = [name for name in targets if name not in own and name.rpartition(".")[2] in taken]
    others = [name for name in targets if name not in own and name not in set(by_weight)]
    ends = {".".join(name.split(".")[-3:]) for name in experts}
    return Named(
        sorted({*short_names(others, modules, dotted=True), *ends}),
        sorted(f"{end}.weight" for end in _ends(by_weight, modules)),
        {
            name: tuple({f"{each}.weight": None for each in (name, _as_module(name))})
            for name in by_weight
        },
        experts[0] if experts else None,
    )


def as_loaded(name: str, config: Mapping[str, Any]) -> str:
    """What transformers calls a tensor of the files once it is loaded: another name in multimodal
    models of the old layout. Raises UnsupportedError where that is not known.
    """
    if text_config(config) is config or name.startswith("lm_head."):
        return name
    old = "language_model."
    if name.startswith(old):
        rest = name.removeprefix(old)
        return f"model.{old}{rest.removeprefix('model.')}" if rest.startswith("model.") else rest
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
        return f"model.{old}{name.removeprefix('model.')}"
    if name.startswith("model."):
        return name
    part = name.partition(".")[0]
    raise UnsupportedError(
        f"{show(name)}: transformers loads it under another name, and PEFT would not find it; "
        f"leave '{part}' out (exclude the expression ^{part}[.])"
    )


def _as_module(name: str) -> str:
    return name.replace(".block_sparse_moe.", ".mlp.")


def _ends(wanted: Sequence[str], modules: Sequence[str]) -> set[str]:
    """The shortest ends of names that none but the wanted modules have, else the whole."""
    chosen, found = set(wanted), set()
    for name in wanted:
        parts = name.split(".")
        found.add(name)
        for count in range(1, min(_MOST_PARTS, len(parts)) + 1):
            end = ".".join(parts[-count:])
            if all(m in chosen for m in modules if f".{m}".endswith(f".{end}")):
                found.discard(name)
                found.add(end)
                break
    return found
