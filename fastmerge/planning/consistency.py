"""Whether the result is one model: its slices against each other, its tensors against its config.

Without transformers only what certainly does not load is refused: shapes of a model type that
transformers knows, whose meaning the config fixes. Of other types it is noted. `fastmerge.planning.
loading` (``--check``) asks the class itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import ModelError, some_of
from fastmerge.models.architecture import layer_of
from fastmerge.models.config import classes_of, is_known, model_type, says_tied, text_config, whole
from fastmerge.models.names import WRITERS, common_prefix
from fastmerge.planning.inputs import Input, Note, Part, TensorPlan, View

Shapes = Mapping[str, tuple[int, ...]]


def check_stack(parts: Sequence[Part], lead: View) -> None:
    """Raises ModelError where a slice's layers are none that the lead has: other names or shapes of
    their tensors than in each of its layers.
    """
    stack = lead.stack
    if stack is None:
        return
    known = [_shapes(layer) for layer in lead.layers[stack.layers].values()]
    for part in parts:
        item = part.lead
        if item.view.label == lead.label or item.view.stack != stack:
            continue
        for number in range(item.start, item.start + (part.layers or 0)):
            shapes = _shapes(item.view.layers[stack.layers][number])
            if shapes not in known:
                raise _other_layer(shapes, known, item, lead, f"{stack.layers}.{number}.")


def check_result(
    result: View,
    parts: Sequence[Part],
    lead: View,
    note: Note,
    *,
    truncated: bool = False,
) -> None:
    """Raises ModelError for a tensor without rows, for one outside the layers of another shape than
    the lead's, and for one that the config contradicts. truncated: embeddings were cut on demand,
    and the config's vocab_size stays all the same.
    """
    last = parts[-1].lead
    for name, tensor in result.tensors.items():
        # Without rows; [1, 0, 32] are DINOv3's register tokens where its config wants none.
        if tensor.dtype.mergeable and tensor.shape[:1] == (0,):
            raise ModelError(
                f"{last.where}: tensor '{name}' is empty ({list(tensor.shape)}), as files are that "
                "were saved from a sharded training without gathering; save the model again"
            )
    own = {name: lead.tensors[name].shape for name in lead.tensors if name in result.tensors}
    for name, shape in own.items():
        found = result.tensors[name].shape
        if found == shape or layer_of(name) is not None:  # of the layers: `check_stack`
            continue
        raise _vocabularies(name, shape, lead, name, found, last)
    head, embedding = result.head, result.embedding
    if head is not None and embedding is not None:
        rows, known = result.tensors[head].shape[0], result.tensors[embedding].shape[0]
        if (
            not truncated
            and rows != known
            and rows != whole(text_config(result.config), "vocab_size")
        ):
            if last.view.label == lead.label or parts[-1].layers is None:
                raise ModelError(
                    f"{last.where}: vocabulary mismatch in '{last.view.label}' itself: {known} "
                    f"rows in '{embedding}', {rows} in '{head}'; one was resized without the "
                    "other: save it again after resize_token_embeddings"
                )
            raise _vocabularies(embedding, (known,), lead, head, (rows,), last)
    _check_config(result, lead, last, note, truncated)
    _check_experts(lead, last, note)
    _note_gaps(result, lead, note)


def _note_gaps(result: View, lead: View, note: Note) -> None:
    """Notes what transformers would not find, and tensors that a few layers lack and the others
    have.

    All may be meant (a model without a head; the first layer of modernbert has one norm less), so
    they are no refusal.
    """
    text = text_config(result.config)
    causal = any(name.endswith("ForCausalLM") for name in classes_of(result.config))
    if causal and result.embedding and not result.head and says_tied(result.config) is False:
        note(
            f"'{lead.label}' has no head, and its config does not tie it to the embeddings: "
            "transformers would make one of random numbers"
        )
    adapter = next((n for n in result.tensors if ".lora_A." in n or ".lora_B." in n), None)
    if adapter is not None:
        note(
            f"'{lead.label}' holds factors of an adapter ('{adapter}'), whose product is not what "
            "merging each of them gives; merge it into its model with peft first"
        )
    prefix = common_prefix(result.tensors)
    if prefix in WRITERS and is_known(text):
        note(
            f"all tensors begin with '{prefix}' ({WRITERS[prefix]}): transformers looks for them "
            "without; rename them"
        )
    stack = "" if lead.stack is None else lead.stack.layers
    if causal and stack.endswith("model.layers") and is_known(text):
        _note_ends(result, lead, stack, note)
    if not any("shared" in key for key in text):
        _note_uneven(lead, lead.layers.get(stack, {}), note)


def _note_ends(result: View, lead: View, stack: str, note: Note) -> None:
    """Notes where nothing comes before the layers of ``stack``, or no norm behind them."""
    inside = f"{stack}."  # spares most names the look for a number
    around = {n for n in result.tensors if not n.startswith(inside) and layer_of(n) is None}
    if result.embedding is None:
        note(f"'{lead.label}' has no input embeddings: transformers would make new ones")
    if not around - {result.head, result.embedding}:
        note(f"'{lead.label}' has no norm behind its layers: transformers would make new ones")


def _note_uneven(lead: View, layers: Mapping[int, Mapping[str, TensorPlan]], note: Note) -> None:
    """Notes a layer that lacks tensors which most of its kind have."""
    if len(layers) < 3:
        return
    kinds = text_config(lead.config).get("layer_types")
    kind_of = dict(enumerate(kinds)) if isinstance(kinds, list) else {}
    names = {number: frozenset(layer) for number, layer in layers.items()}
    for number, own in names.items():
        alike = [n for n in names if kind_of.get(n) == kind_of.get(number)]
        fuller = [names[n] for n in alike if own < names[n]]
        if number and 2 * len(fuller) > len(alike):
            lost = sorted(fuller[0] - own)
            note(
                f"layer {number} of '{lead.label}' lacks {some_of(lost)}, which most of its layers "
                "have"
            )


# Model types of transformers whose embeddings have more rows than the config's vocab_size.
_MORE_ROWS = {"mllama_text_model", "mllama", "moshi"}
_SIZED = (
    "input_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "self_attn.k_proj.weight", "self_attn.o_proj.weight",
)  # fmt: skip
_HEADS = {"num_attention_heads", "num_key_value_heads", "head_dim"}


def _check_config(result: View, lead: View, last: Input, note: Note, truncated: bool) -> None:
    config = text_config(result.config)
    counts = any(
        "layer" in key and (whole(config, key) > 0 or isinstance(value, list))
        for key, value in config.items()
    )
    if lead.stack is not None and is_known(config) and not counts:
        note(
            f"config.json of '{lead.label}' does not count its {lead.layer_total} layers: "
            "transformers takes the default of its type; add num_hidden_layers"
        )
    certain = is_known(config) and model_type(config) not in _MORE_ROWS
    told: set[str] = set()
    for name, key, axis, wanted in (*_around(result, config), *_inside(lead, config)):
        shape = (lead if name not in result.tensors else result).tensors[name].shape
        if not wanted or len(shape) <= axis or shape[axis] == wanted or key in told:
            continue
        text = f"config.json says {key} {wanted}, and tensor '{name}' is {list(shape)}"
        if certain and not (truncated and key == "vocab_size"):
            raise ModelError(
                f"{last.where}: {text}: the result would not load; mend the config of "
                f"'{last.view.label}'"
            )
        told.add(key)
        note(f"{text}: check it")


# How many experts a layer has; one of several keys is the one that counts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _check_experts(lead: View, last: Input, note: Note) -> None:
    """Whether the layers hold as many experts as the config counts, where each is stored apart."""
    config = text_config(lead.config)
    wanted = {key: whole(config, key) for key in _EXPERTS if whole(config, key) > 0}
    stack = "" if lead.stack is None else lead.stack.layers
    for number, layer in lead.layers.get(stack, {}).items() if wanted else ():
        held: dict[str, set[str]] = {}
        for rest in layer:
            module, found, tail = rest.partition(".experts.")
            if found and tail.partition(".")[0].isdigit():
                held.setdefault(module, set()).add(tail.partition(".")[0])
        for module, experts in held.items():
            # longcat's experts that do nothing are stored with the others, or not at all.
            if len(experts) - whole(config, "zero_expert_num") in wanted.values():
                continue
            if len(experts) in wanted.values():
                continue
            key, count = next(iter(wanted.items()))
            text = (
                f"config.json says {key} {count}, and '{stack}.{number}.{module}' has "
                f"{len(experts)} experts"
            )
            if is_known(config):
                raise ModelError(
                    f"{last.where}: {text}: the result would not load; mend the config of "
                    f"'{lead.label}'"
                )
            note(f"{text}: check it")
            return


Size = tuple[str, str, int, int]  # tensor, key in the config, axis, size (0: not known)


def _around(result: View, config: Mapping[str, Any]) -> list[Size]:
    """What the config says of the embeddings and the head."""
    found = [
        (name, "vocab_size", 0, whole(config, "vocab_size"))
        for name in (result.embedding, result.head)
        if name is not None and result.tensors[name].dtype.mergeable
    ]
    if result.embedding is not None and not any("embed" in key for key in config):
        found.append((result.embedding, "hidden_size", 1, whole(config, "hidden_size")))
    return found


def _inside(lead: View, config: Mapping[str, Any]) -> list[Size]:
    """What it says of those tensors of the layers that are of one shape in all of them: the lead's,
    which all of a result's layers are like.
    """
    by_shape: dict[str, dict[tuple[int, ...], str]] = {}
    stack = "" if lead.stack is None else lead.stack.layers
    for number, layer in lead.layers.get(stack, {}).items():
        for rest in _SIZED:
            tensor = layer.get(rest)
            if tensor is not None and tensor.dtype.mergeable:  # packed codes have other shapes
                name = f"{stack}.{number}.{rest}"
                by_shape.setdefault(rest, {}).setdefault(tensor.shape, name)
    heads, width = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    inner = whole(config, "intermediate_size")
    wide = whole(config, "head_dim") or (width // heads if heads else 0)
    if any(("heads" in key or "head_dim" in key) and key not in _HEADS for key in config):
        wide = 0  # heads of several kinds
    given = config.get("num_key_value_heads")
    keys = heads if given is None else whole(config, "num_key_value_heads")  # a list: by layer
    expected = dict(
        zip(
            _SIZED,
            (
                ("hidden_size", 0, width),
                ("intermediate_size", 0, inner),
                ("intermediate_size", 0, inner),
                ("num_key_value_heads x head_dim", 0, keys * wide),
                ("num_attention_heads x head_dim", 1, heads * wide),
            ),
            strict=True,
        )
    )
    return [
        (next(iter(shapes.values())), *expected[rest])
        for rest, shapes in by_shape.items()
        if len(shapes) == 1
    ]


# ---------------------------------------------------------------- refusals


def _shapes(layer: Mapping[str, TensorPlan]) -> Shapes:
    return {rest: tensor.shape for rest, tensor in layer.items()}


def _other_layer(
    shapes: Shapes, known: Sequence[Shapes], item: Input, lead: View, prefix: str
) -> ModelError:
    nearest = max(known, key=lambda other: len(shapes.keys() & other.keys()))
    start = f"{item.where}: layers of '{item.view.label}' do not stack with those of '{lead.label}'"
    for rest in (*shapes, *nearest):
        if rest not in nearest:
            return ModelError(f"{start}: only the former have '{prefix}{rest}'")
        if rest not in shapes:
            return ModelError(f"{start}: only the latter have '{rest}' (as {prefix}... would)")
    rest = next(rest for rest in shapes if shapes[rest] != nearest[rest])
    return ModelError(
        f"{start}: '{prefix}{rest}' is {list(shapes[rest])}, there {list(nearest[rest])}"
    )


def _vocabularies(
    name: str, shape: Sequence[int], lead: View, other: str, found: Sequence[int], item: Input
) -> ModelError:
    if shape[1:] == found[1:] and len(found) <= 2:
        return ModelError(
            f"{item.where}: vocabulary mismatch: {shape[0]} rows in '{name}' of '{lead.label}', "
            f"{found[0]} in '{other}' of '{item.view.label}'; a stack has one vocabulary: write "
            "`tokenizer_source: union` or `tokenizer_source: base`"
        )
    return ModelError(
        f"{item.where}: tensor '{name}' is {list(shape)} in model '{lead.label}' but "
        f"{list(found)} in '{item.view.label}'; a stack takes it from the latter"
    )
