"""Mixtures of experts: a base model whose MLPs give way to those of several models and a router.

The layouts are those that transformers and vLLM read and the Hub's checkpoints have: an expert's
matrices are tensors of their own. Which there are, which models they take and what is chosen where
a recipe does not say is mergekit-moe 0.1.5's (moe/*.py, scripts/moe.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fastmerge.dtypes import BY_NAME, DType
from fastmerge.errors import ModelError, RecipeError, UnsupportedError, nearest
from fastmerge.methods import METHODS, Method
from fastmerge.methods.noise import NOISE
from fastmerge.models.architecture import LAYER_NUMBER
from fastmerge.models.config import model_type, whole
from fastmerge.planning.agreement import check_agreement
from fastmerge.planning.build import Builder
from fastmerge.planning.gates import Gates, zeros
from fastmerge.planning.inputs import Input, Part, TensorPlan, View, check_quantised
from fastmerge.planning.opened import Opened
from fastmerge.planning.precision import as_numbers
from fastmerge.recipe.mixture import Expert, Mixture
from fastmerge.recipe.settings import NO_SETTINGS, Rule, Setting
from fastmerge.tree.nodes import Merge

_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_DOWN = "mlp.down_proj"
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
_QKV_BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")
_BIASES = (*_QKV_BIASES, "self_attn.o_proj.bias")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_AROUND = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

# What the classes of the dense models say where config.json is silent and those of the mixtures say
# something else: transformers 5.23; a test compares them.
_ROPE = {"rope_theta": 10000.0}
_SILENT: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **_ROPE},
    "mistral": {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8,
        "sliding_window": 4096, **_ROPE,
    },
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32,
        **_ROPE},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32,
        "head_dim": 128, **_ROPE},
}  # fmt: skip
_DEEPSEEK = "deepseek-ai/deepseek-moe-16b-base--"


@dataclass(frozen=True)
class Layout:
    """How one kind of mixture names its tensors and what its config says."""

    name: str  # as mergekit calls it
    kind: str  # the output's model_type
    architecture: str
    sources: tuple[str, ...]  # model types of the models
    places: tuple[str, ...]  # of the layers' tensors besides the MLPs
    shared: tuple[int, int]  # fewest and most shared experts
    config: Callable[[Mapping[str, Any], int], dict[str, Any]]  # of the dense one, shared experts
    block: str = "mlp"
    parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    shared_name: str = ""
    shared_gate: str = ""  # where the shared expert has a gate of its own
    zero_biases: tuple[str, ...] = ()  # that are zeros where the base has none
    dropped: tuple[str, ...] = field(default=("attention_bias", "mlp_bias", "pretraining_tp"))

    def refusal(self, mixture: Mixture, kinds: Mapping[str, str]) -> str:
        """Why it cannot be, or ''. ``kinds``: model types by reference, the base first."""
        for reference, kind in kinds.items():
            if kind not in self.sources:
                return f"takes {' or '.join(self.sources)}, and '{reference}' is '{kind}'"
        if len(set(kinds.values())) > 1:
            (one, a), (other, b) = next(
                (x, y) for x in kinds.items() for y in kinds.items() if x[1] != y[1]
            )
            return f"takes models of one type, and '{one}' is {a}, '{other}' is {b}"
        shared = mixture.shared_experts or ()
        low, high = self.shared
        if not low <= len(shared) <= high:
            asked = "no" if not high else "exactly one" if low else "at most one"
            remedy = "" if shared else "; list a `source_model` under `shared_experts:`"
            return f"takes {asked} shared expert, not {len(shared)}{remedy}"
        prompts = any(any(one.prompts) for one in shared)
        if shared and self.shared_gate and not prompts and not mixture.draws_gates:
            return (
                f"needs 'positive_prompts:' for the shared expert (gate_mode {mixture.gate_mode})"
            )
        if shared and not self.shared_gate and prompts:
            return "does not gate its shared expert; remove its prompts"
        return ""

    def expert(self, number: int, rest: str) -> str:
        """The name of a dense layer's MLP tensor as that of an expert."""
        part = self.parts[_MLP.index(rest)]
        return f"{self.block}.experts.{number}.{part}.weight"

    @property
    def router(self) -> str:
        return f"{self.block}.gate.weight"


def _mixtral(_config: Mapping[str, Any], _shared: int) -> dict[str, Any]:
    return {"sliding_window": None}


def _qwen2(config: Mapping[str, Any], _shared: int) -> dict[str, Any]:
    inner = whole(config, "intermediate_size")
    return {
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "qkv_bias": True,
        "sliding_window": None, "use_sliding_window": False,
        "moe_intermediate_size": inner, "shared_expert_intermediate_size": inner,
    }  # fmt: skip


def _qwen3(config: Mapping[str, Any], _shared: int) -> dict[str, Any]:
    return {
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "sliding_window": None, "use_sliding_window": False,
        "moe_intermediate_size": whole(config, "intermediate_size"),
    }  # fmt: skip


def _deepseek(config: Mapping[str, Any], shared: int) -> dict[str, Any]:
    classes = {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    return {
        "n_shared_experts": shared or None, "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "scoring_func": "softmax", "norm_topk_prob": True,
        "moe_intermediate_size": whole(config, "intermediate_size"),
        "auto_map": {name: _DEEPSEEK + place for name, place in classes.items()},
    }  # fmt: skip


LAYOUTS = (  # in the order in which they are tried
    Layout(
        "Mixtral", "mixtral", "MixtralForCausalLM", ("llama", "mistral"), (*_NORMS, *_ATTENTION),
        (0, 0), _mixtral, "block_sparse_moe", ("w1", "w3", "w2"),
    ),
    Layout(
        "DeepSeek MoE", "deepseek", "DeepseekForCausalLM", ("llama", "mistral"),
        (*_NORMS, *_ATTENTION, *_BIASES), (0, 1), _deepseek, shared_name="shared_experts",
        dropped=(),
    ),
    Layout(
        "Qwen MoE", "qwen2_moe", "Qwen2MoeForCausalLM", ("llama", "mistral", "qwen2"),
        (*_NORMS, *_ATTENTION, *_QKV_BIASES), (1, 1), _qwen2, shared_name="shared_expert",
        shared_gate="shared_expert_gate", zero_biases=_QKV_BIASES,
    ),
    Layout(
        "Qwen3 MoE", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",),
        (*_NORMS, *_ATTENTION, *_BIASES, *_HEAD_NORMS), (0, 0), _qwen3,
        dropped=("mlp_bias", "pretraining_tp"),
    ),
)  # fmt: skip
_COUNTS = {"mixtral": "num_local_experts", "deepseek": "n_routed_experts"}  # others: num_experts


# ---------------------------------------------------------------- which layout


def find_layout(mixture: Mixture, views: Mapping[str, View]) -> Layout:
    """The layout that the recipe asks for, or the first that takes its models (``views``, the base
    first); RecipeError or UnsupportedError with why there is none.
    """
    kinds = {reference: model_type(view.config) for reference, view in views.items()}
    for reference, place in mixture.references():
        if not kinds[reference]:
            raise ModelError(
                f"{place}: '{reference}' has no config.json with a model_type, by which a layout "
                "is chosen"
            )
    asked, where = mixture.architecture, mixture.where
    candidates: Sequence[Layout] = LAYOUTS
    if asked is not None:
        word, where = asked.strip().lower(), mixture.at("architecture")
        candidates = [e for e in LAYOUTS if e.name.lower().startswith(word) or e.kind == word]
        if not candidates:
            known = [layout.name.partition(" ")[0].lower() for layout in LAYOUTS]
            raise RecipeError(f"{where}: unknown architecture '{asked}'; {nearest(asked, known)}")
    refusals = {}
    for layout in candidates:
        refusals[layout] = layout.refusal(mixture, kinds)
        if not refusals[layout]:
            return layout
    base = next(iter(kinds.values()))
    fitting = [layout for layout in candidates if base in layout.sources] or list(candidates)
    if not any(base in layout.sources for layout in candidates):
        table = "; ".join(f"{e.name}: {', '.join(e.sources)}" for e in candidates)
        raise UnsupportedError(
            f"{mixture.at('base_model')}: there is no layout for a mixture of '{base}' models "
            f"({table}){'' if mixture.architecture is None else '; try it without `architecture:`'}"
        )
    reasons = "; ".join(f"{layout.name} {refusals[layout]}" for layout in fitting)
    raise UnsupportedError(f"{where}: no layout fits: {reasons}")


# ---------------------------------------------------------------- the mixture


class Planning(Protocol):
    """What a mixture asks of the planner."""

    opened: Opened

    def view(self, reference: str, where: str) -> View: ...

    def note(self, text: str) -> None: ...

    def part(
        self,
        method: Method,
        inputs: Sequence[Input],
        base: View | None,
        levels: list[dict[str, Setting]],
        *,
        where: str,
        of: str,
    ) -> Part: ...

    def merged(
        self, parts: Sequence[Part], lead: View, *, dtype: DType | None, is_output: bool
    ) -> View: ...


def mix(planner: Planning, mixture: Mixture, seed: int | None, *, is_output: bool) -> View:
    """The mixture that the recipe describes; FastmergeError where there is none."""
    for line in mixture.ignored_lines():
        planner.note(line)
    views = {
        ref: as_numbers(planner.view(ref, place), planner.note)
        for ref, place in mixture.references()
    }
    base, where = views[mixture.base_model], mixture.at("base_model")
    copy = METHODS["passthrough"]

    def alone(view: View, where: str, settings: Mapping[str, Setting] = NO_SETTINGS) -> Part:
        return planner.part(
            copy, [Input(view, 0, where, settings)], None, [], where=where, of=where
        )

    for ref, place in mixture.references():
        check_quantised(views[ref], copy, place, scaled=True)
    layout = find_layout(mixture, views)
    check_base(layout, base, where)
    others = [alone(views[e.source_model], e.at("source_model")) for e in mixture.entries()]
    check_agreement([alone(base, where), *others], base, planner.note, tokens=False)
    for line in notes(layout, mixture, base, list(views.values())):
        planner.note(line)
    dtype = own_dtype(mixture, base)
    dense = planner.merged([alone(base, where)], base, dtype=dtype, is_output=is_output)
    build = Builder(dtype, None, planner.opened.models)

    def made(expert: Expert) -> Mapping[str, TensorPlan]:
        view = mlps(expert, views[expert.source_model], base, seed)
        return build.whole(alone(view, expert.at("source_model"), scale_of(expert)))

    shared = mixture.shared_experts or ()
    gated = (*mixture.experts, *(shared if layout.shared_gate else ()))
    gates = Gates(mixture, base, planner.opened.models, [each.prompts for each in gated], seed)
    return mixed(
        layout, mixture, dense, [made(e) for e in mixture.experts], [made(e) for e in shared],
        gates, mixture.name or "output",
    )  # fmt: skip


def own_dtype(mixture: Mixture, base: View) -> DType | None:
    """The type written: the recipe's, else what the base's config says; None: each its own."""
    if mixture.output_dtype is not None:
        return mixture.output_dtype
    for key in ("dtype", "torch_dtype"):
        name = base.config.get(key)
        found = BY_NAME.get(name.removeprefix("torch.")) if isinstance(name, str) else None
        if found is not None and found.mergeable:
            return found
    return None


def mlps(expert: Expert, view: View, base: View, seed: int | None) -> View:
    """The MLPs of an expert, with its noise, under their own names; ModelError where they are not
    those of a model like the base.
    """
    where = expert.at("source_model")
    stack, count = base.stack, base.layer_total
    assert stack is not None  # `check_base`
    if view.stack != stack or view.layer_total != count:
        raise ModelError(
            f"{where}: '{view.label}' has {view.layer_total} layers, and the base model "
            f"'{base.label}' {count}; experts are models of one shape"
        )
    found = {}
    for number in range(count):
        layer, own = view.layers[stack.layers].get(number, {}), base.layers[stack.layers][number]
        for rest in layer:
            if rest.startswith("mlp.") and rest not in _MLP:
                raise ModelError(
                    f"{where}: '{view.label}' has tensor '{stack.layers}.{number}.{rest}', for "
                    "which an expert has no place"
                )
        for rest in _MLP:
            name = f"{stack.layers}.{number}.{rest}"
            if rest not in layer:
                raise ModelError(
                    f"{where}: '{view.label}' lacks tensor '{name}', which an expert needs"
                )
            tensor = layer[rest]
            if tensor.shape != own[rest].shape:
                raise ModelError(
                    f"{where}: tensor '{name}' is {list(tensor.shape)} in '{view.label}' but "
                    f"{list(own[rest].shape)} in the base model '{base.label}'; experts are models "
                    "of one shape"
                )
            found[name] = tensor if not expert.noise_scale else _noisy(tensor, expert, seed)
    return View(view.label, view.config, found, view.donor)


def _noisy(tensor: TensorPlan, expert: Expert, seed: int | None) -> TensorPlan:
    values = {"noise_scale": expert.noise_scale}
    # No name: it is drawn for the tensor's name in the output, which has the expert's number.
    return replace(tensor, root=Merge(NOISE, (tensor.root,), None, {}, (values,), seed))


def scale_of(expert: Expert) -> dict[str, Setting]:
    """``residual_scale`` as passthrough's setting: a factor on what the MLP adds to the states."""
    if expert.residual_scale is None:
        return {}
    where = expert.at("residual_scale")
    return {"scale": Setting((Rule(_DOWN, (expert.residual_scale,), where),))}


def check_base(layout: Layout, base: View, where: str) -> None:
    """Raises ModelError where the base has a tensor that the layout has no place for, or lacks one
    of its MLPs.
    """
    stack = base.stack
    if stack is None or stack.layers != "model.layers":
        raise ModelError(
            f"{where}: '{base.label}' does not name its layers model.layers.N, as "
            f"{' and '.join(layout.sources)} models do"
        )
    places = (*layout.places, *_MLP)
    for number in range(base.layer_total):
        layer = base.layers[stack.layers].get(number, {})
        lost = next((rest for rest in (*_MLP, *_NORMS) if rest not in layer), None)
        if lost is not None:
            raise ModelError(
                f"{where}: '{base.label}' lacks tensor '{stack.layers}.{number}.{lost}'"
            )
    for name in base.tensors:
        found = re.fullmatch(rf"model\.layers\.{LAYER_NUMBER}\.(.+)", name)
        inside = found is not None and int(found[1]) < base.layer_total and found[2] in places
        if not inside and name not in _AROUND:
            raise ModelError(
                f"{where}: '{base.label}' has tensor '{name}', for which the {layout.name} layout "
                "has no place"
            )


def mixed(
    layout: Layout,
    mixture: Mixture,
    base: View,
    experts: Sequence[Mapping[str, TensorPlan]],
    shared: Sequence[Mapping[str, TensorPlan]],
    gates: Gates,
    name: str,
) -> View:
    """The mixture: ``base`` as it is merged alone, with ``experts`` and ``shared`` by the names of
    the dense tensors.
    """
    hidden = base.tensors["model.layers.0." + _NORMS[0]].shape[0]
    tensors: dict[str, TensorPlan] = {}
    for own in base.tensors.values():
        found = re.fullmatch(rf"(model\.layers\.{LAYER_NUMBER}\.)(.+)", own.name)
        if found is None or found[3] not in _MLP:
            tensors[own.name] = own
            continue
        prefix, number, rest = found[1], int(found[2]), found[3]
        if rest == _MLP[0]:
            made = {prefix + layout.router: (0, len(experts))}
            if layout.shared_gate:
                made[f"{prefix}{layout.block}.{layout.shared_gate}.weight"] = (len(experts), 1)
            for router, (first, count) in made.items():
                rows = gates.rows(router, number, first, count, hidden)
                tensors[router] = TensorPlan(router, rows.shape, own.dtype, rows)
        for index, expert in enumerate(experts):
            place = prefix + layout.expert(index, rest)
            tensors[place] = replace(expert[own.name], name=place)
        for expert in shared:
            place = own.name.replace("mlp.", f"{layout.block}.{layout.shared_name}.")
            tensors[place] = replace(expert[own.name], name=place)
    _fill_biases(layout, tensors)
    config = mixed_config(layout, mixture, base.config)
    return View(name, config, tensors, base.donor, base.vocabulary)


def _fill_biases(layout: Layout, tensors: dict[str, TensorPlan]) -> None:
    """Zeros for the biases that every layer of the layout has."""
    for name in [name for name in tensors if name.endswith("self_attn.q_proj.weight")]:
        for rest in layout.zero_biases:
            bias = name.replace("self_attn.q_proj.weight", rest)
            matrix = tensors[bias.removesuffix("bias") + "weight"]
            if bias not in tensors:
                shape = matrix.shape[:1]
                tensors[bias] = TensorPlan(bias, shape, matrix.dtype, zeros(shape, "bias of zeros"))


def mixed_config(layout: Layout, mixture: Mixture, dense: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture's config.json from the base's: what the dense class assumes is written out."""
    config: dict[str, Any] = json.loads(json.dumps(dense))
    silent = dict(_SILENT[model_type(config)])
    if model_type(config) == "llama":
        silent["num_key_value_heads"] = whole(config, "num_attention_heads")
    if isinstance(config.get("rope_parameters"), Mapping):
        silent.pop("rope_theta")
    for key in (*layout.dropped, "auto_map", "layer_types", "max_window_layers"):
        config.pop(key, None)
    for key, value in silent.items():
        if config.get(key) is None:
            config[key] = value
    shared = len(mixture.shared_experts or ())
    return {
        **config,
        **layout.config(config, shared),
        "model_type": layout.kind,
        "architectures": [layout.architecture],
        _COUNTS.get(layout.kind, "num_experts"): len(mixture.experts),
        "num_experts_per_tok": mixture.experts_per_token,
    }


# ---------------------------------------------------------------- what is noted


def notes(layout: Layout, mixture: Mixture, base: View, views: Sequence[View]) -> list[str]:
    """What a recipe does not say and a reader of the result would ask."""
    found = [f"layout: {layout.name} ({layout.architecture})"]
    if layout.kind == "deepseek":
        found.append(
            "transformers has no class for this layout: it loads with the code of "
            "deepseek-ai/deepseek-moe-16b-base (trust_remote_code=True), or in vLLM"
        )
    window = _window(base.config)
    if window and layout.kind != "deepseek":
        found.append(
            f"config.json: sliding_window {window} of '{base.label}' is not kept: a mixture "
            "attends to all that comes before, as mergekit's does"
        )
    rows = {view.label: whole(view.config, "vocab_size") for view in (base, *views)}
    for label, count in rows.items():
        if count and rows[base.label] and count != rows[base.label]:
            found.append(
                f"'{label}' has {count} tokens and the base model {rows[base.label]}: the mixture "
                "has the base's, and knows no others"
            )
    if mixture.draws_gates:
        found.append(f"gate_mode {mixture.gate_mode}: the routers know nothing: train them")
    elif mixture.is_unprompted:
        found.append("no prompts: routers of zeros, by which every expert counts alike")
    elif len({expert.prompts for expert in mixture.experts}) == 1:
        found.append(
            "all experts have the same prompts: their router rows are equal, and which of them a "
            "token is sent to is arbitrary until the routers are trained"
        )
    if len({expert.source_model for expert in mixture.experts}) == 1:
        found.append(
            "all experts are one model: the mixture computes what that does, until it is trained"
        )
    if mixture.gate_mode.startswith("hidden") and not mixture.is_unprompted:
        found.append(
            f"gate_mode {mixture.gate_mode}: the base model '{base.label}' is loaded whole and run "
            "on the prompts, on the CPU, beyond the memory limit"
        )
    return found


def _window(config: Mapping[str, Any]) -> int:
    """Over how many tokens the dense model attends; 0: all."""
    kind = model_type(config)
    if kind == "mistral" and "sliding_window" not in config:
        return int(_SILENT[kind]["sliding_window"])
    used = kind == "mistral" or bool(config.get("use_sliding_window"))
    return whole(config, "sliding_window") if used else 0
