"""Settings of config.json that go by layer, rewritten for the layers as stacked.

No list of keys can know the next architecture, so the rules are of forms: a list or a string with
an entry for each layer is put together anew; a list of layers' numbers gets the new numbers; a
count of first layers is counted again; what says every how many layers still holds where each layer
moved by a multiple of it. What remains is told by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastmerge.errors import ModelError
from fastmerge.models.config import (
    EXTRA_COUNTS,
    LAYER_COUNTS,
    extra_layers,
    model_type,
    text_config,
)
from fastmerge.models.families import MIXED_LAYERS
from fastmerge.planning.inputs import Note, View

_LAYERS = {"layer", "layers", "block", "blocks", "idx", "idxs", "indexes", "indices", "pattern"}
# Lists under such words are of tokens, of bounds and of shapes, however long they are.
_NOT_LAYERS = {"token", "id", "ids", "architectures", "limit", "range", "betas", "map", "factor"}
_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
# In keys that say of which kind a layer is.
_SAY_KINDS = ("types", "pattern", "period", "interval", "group")
# Words in keys whose number says every how many layers something is.
_PERIODS = {"period", "interval", "every", "freq", "frequency", "step", "pattern", "stride"}
_OF_LAYERS = {
    *_LAYERS, "attention", "attn", "sparse", "moe", "expert", "rope", "window", "global", "full",
    "dense", "mlp",
}  # fmt: skip
_NO_PERIODS = {"time", "mask", "image", "spatial", "temporal", "size", "scale", "base", "theta"}
# Words in keys about layers whose number says which, counted from the first or from the last.
_WHICH = {
    "start", "begin", "first", "index", "idx", "dense", "sparse", "skip", "hash", "full", "global",
    "window", "offset", "moe", "linear", "cross",
}  # fmt: skip
_OF_TOKENS = {"size", "topk", "local", "cache"}  # in keys whose blocks are of tokens
_FROM_THE_END = {"shared", "share", "last", "end"}
_ENUMERATE = {"enum", "idx", "idxs", "indices", "list"}
# Counted by `config.set_layers`.
_OF_HALVES = ("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers")
# Counts of first layers that differ from those behind them.
_FIRST = {
    "first_k_dense_replace", "num_dense_layers", "n_dense_layers", "first_num_dense_layers",
    "max_window_layers", "num_hash_layers", "n_hash_layers",
}  # fmt: skip


# What classes make from a layer's number.
_MADE = {
    "diffllama": "lambda_init", "minimax": "the decay of linear attention",
    "beam": "the scale of residuals",
}  # fmt: skip
_BY_COUNT = {"minimax"}  # and from how many there are


class Layer(NamedTuple):
    """Where one output layer comes from."""

    view: View
    number: int
    where: str  # in the recipe


def restack(config: dict[str, Any], lead: View, layers: Sequence[Layer], note: Note) -> None:
    """Rewrites, in the output's ``config`` (the lead's, of the language model), what goes by layer;
    notes what was rewritten and what could not be. ModelError where a model lacks an entry.
    """
    writer = _Restack(lead.layer_total, layers, sum(extra_layers(lead.config).values()))
    writer.section(config, ())
    writer.sparse_steps(config)
    part = text_config(lead.config)
    silent = not any(part.get(key) for key in _KINDS) and not writer.by_number
    told = (*writer.rewritten, *writer.held)
    silent = silent and not any(word in key for key in told for word in _SAY_KINDS)
    if model_type(part) in MIXED_LAYERS and silent and writer.moved:
        writer.by_number.append("the default of layer_types")
    writer.residual_scale(config)
    if writer.rewritten:
        note(f"config.json: {', '.join(writer.rewritten)}: rewritten for the layers as stacked")
    if writer.held:
        note(f"config.json: {', '.join(writer.held)}: still true of the layers as stacked")
    for key in writer.by_number:
        note(f"config.json: {key} goes by layer number, and layers were renumbered; check it")
    kind = model_type(part)
    if kind in _MADE and (writer.moved or (kind in _BY_COUNT and writer.resized)):
        count = " and their count" if kind in _BY_COUNT else ""
        note(
            f"{kind} makes {_MADE[kind]} from a layer's number{count}, which no setting can say: "
            "it is another now"
        )
    if not writer.numeric:
        _own_tensors(lead, layers, writer.signatures(), note)


def _own_tensors(lead: View, layers: Sequence[Layer], alike: Sequence[Any], note: Note) -> None:
    """Notes a first or a last layer with other tensors than those behind or before it, of which no
    setting tells (rwkv's first norm), where another layer takes its place, or it another's.
    """
    assert lead.stack is not None
    names = [lead.layers[lead.stack.layers].get(i, {}).keys() for i in range(len(alike))]
    groups: dict[str, list[frozenset[str]]] = {}
    for own, settings in zip(names, alike, strict=True):
        groups.setdefault(repr(settings), []).append(frozenset(own))
    if all(len(set(group)) == 1 for group in groups.values()):
        return
    found = [
        frozenset(layer.view.layers.get(lead.stack.layers, {}).get(layer.number, ()))
        for layer in layers
    ]
    inner = {frozenset(own) for own in (names[1:-1] or names)}
    places = [({frozenset(names[0])}, found[:1]), ({frozenset(names[-1])}, found[-1:])]
    for known, given in (*places, (inner, found[1:-1])):
        for held in given:
            if held in known:
                continue
            rest = min(held ^ next(iter(known)))
            note(
                f"tensor '{rest}' is in some layers alone, and no setting of config.json says in "
                "which: it goes by layer number, and layers were renumbered; check it"
            )
            return


class _Restack:
    def __init__(self, total: int, layers: Sequence[Layer], extra: int) -> None:
        self.total = total  # layers of the lead
        self.lengths = {total, total + extra}  # those for multi-token prediction may have entries
        self.layers = layers
        self.rewritten: list[str] = []
        self.by_number: list[str] = []
        self.held: list[str] = []
        self.numeric = False  # whether a number says which layers are of which kind
        self._settings: list[Sequence[Any]] = []  # of the lead's layers, in order
        self.moved = any(layer.number != index for index, layer in enumerate(layers))
        self.resized = len(layers) != total

    def section(self, config: dict[str, Any], path: tuple[str, ...]) -> None:
        one_based = any(
            self.total in value for value in config.values() if _numbers(value, self.total + 1)
        )
        for key, value in list(config.items()):
            here = (*path, key)
            words = _words(key)
            if isinstance(value, dict):
                if words & _LAYERS and value and all(re.fullmatch(r"\d+", k) for k in value):
                    self._settings.append([value.get(str(i)) for i in range(self.total)])
                    self._set(config, here, self._keyed(here))
                elif not words & {"vision", "audio", "quantization", "rope", "label2id"}:
                    self.section(value, here)
            elif isinstance(value, list):
                self._list(config, here, value, words, int(one_based))
            elif isinstance(value, str) and _listed(value, words) is not None:
                self._list_as_text(config, here, value, words, int(one_based))
            elif isinstance(value, str):
                self._text(config, here, value, words)
            elif isinstance(value, bool):
                if value and self.moved and words >= {"layer", "idx"}:
                    self.by_number.append(key)  # gpt2's scale_attn_by_inverse_layer_idx
            elif isinstance(value, int):
                self._number(config, here, value, words)

    def signatures(self) -> list[tuple[Any, ...]]:
        """What the lead's config says of each of its layers."""
        return [tuple(own[i] for own in self._settings) for i in range(self.total)]

    def residual_scale(self, config: dict[str, Any]) -> None:
        """MiniCPM's ``scale_depth``, which its classes divide by the root of the count."""
        given = config.get("scale_depth")
        if self.resized and isinstance(given, int | float) and not isinstance(given, bool):
            scaled = given * math.sqrt(len(self.layers) / self.total)
            self._set(config, ("scale_depth",), scaled)

    def _list(
        self,
        config: dict[str, Any],
        path: tuple[str, ...],
        value: list[Any],
        words: set[str],
        first: int,
    ) -> None:
        speaks = bool(words & _LAYERS)
        expanded = _expanded(value) or ()
        if len(expanded) == self.total:
            self._settings.append(expanded)
            self._set(config, path, [[[self._entry(x, path, list) for x in self.layers], 1]])
            return
        if not value or words & {"mtp", "nextn"} or (words & _NOT_LAYERS and not speaks):
            return
        listed = speaks and _numbers(value, self.total + first) and min(value) >= first
        whole = list(range(first, self.total + first))
        if listed and (len(value) != self.total or value == whole):
            self._settings.append([number + first in value for number in range(self.total)])
            chosen = [
                index + first
                for index, layer in enumerate(self.layers)
                if layer.number + first in (self._given(layer, path, list) or ())
            ]
            self._set(config, path, chosen)
        elif (len(value) in self.lengths and self.total >= 3) or (
            speaks and len(value) >= self.total
        ):
            self._settings.append(value)
            self._set(config, path, [self._entry(layer, path, list) for layer in self.layers])
        elif speaks and path[-1] in _KINDS:
            for layer in self.layers:  # too short for some layer: refused, unless none is chosen
                self._entry(layer, path, list)
        elif speaks and all(isinstance(kind, str) and "." not in kind for kind in value):
            self._periodic(path[-1], len(value))  # repeated to the last layer
        elif speaks and self.moved:
            self.by_number.append(path[-1])

    def _list_as_text(
        self, config: dict[str, Any], path: tuple[str, ...], value: str, words: set[str], first: int
    ) -> None:
        """Step3's ``moe_layers_enum: "4,5,6"``: a list in another form, which it keeps."""
        given = config[path[-1]] = _listed(value, words)
        assert given is not None
        self._list(config, path, given, words, first)
        made = config[path[-1]]
        sign = next((found for found in re.findall(r"[,;]\s*", value)), ",")
        opening, closing = re.match(r"\W*", value), re.search(r"\W*$", value)
        assert opening is not None and closing is not None
        text = f"{opening[0]}{sign.join(map(str, made))}{closing[0]}"
        config[path[-1]] = value if made == given else text

    def _text(
        self, config: dict[str, Any], path: tuple[str, ...], value: str, words: set[str]
    ) -> None:
        is_word = value.islower() and len(set(value)) > 2
        if not words & {"pattern", "layers", "types"} or is_word:
            return
        if len(value) in self.lengths:
            self._settings.append(value)
            entries = [self._entry(layer, path, str) for layer in self.layers]
            self._set(config, path, "".join(entries))
        else:
            self._periodic(path[-1], len(value))

    def _number(
        self, config: dict[str, Any], path: tuple[str, ...], value: int, words: set[str]
    ) -> None:
        key = path[-1]
        if key in (*LAYER_COUNTS, *EXTRA_COUNTS, *_OF_HALVES) or value < 0:
            return
        if key == "max_window_layers" and not config.get("use_sliding_window", False):
            return
        if key in _FIRST:
            self.numeric = self.numeric or 0 < value < self.total
            flags = [
                layer.number < int(self._given(layer, path, int) or 0) for layer in self.layers
            ]
            count = sum(flags)
            if all(flags[:count]):
                # Beyond the end it says that all are of the first kind, as it did.
                self._set(config, path, max(value, count) if value >= self.total else count)
            else:
                self.by_number.append(key)
            return
        stem = words & _OF_LAYERS and not words & _NO_PERIODS
        if (words & _PERIODS and stem) or words >= {"layer", "group"}:
            self._periodic(key, value)
        elif "offset" in words and stem:
            self._periodic(key, _period(config, key))
        elif value and (
            words & {"layer", "layers"} or (words & {"block", "blocks"} and not words & _OF_TOKENS)
        ):
            ends = words & _FROM_THE_END and (self.moved or self.resized)
            counts = value == self.total and self.resized
            self.numeric = self.numeric or bool(words & _WHICH)
            if ends or counts or (words & _WHICH and self.moved):
                self.by_number.append(key)

    def _periodic(self, key: str, period: int) -> None:
        """What goes by the remainder of ``period`` holds where layers moved by multiples of it."""
        self.numeric = self.numeric or period > 1
        if period <= 1 or not self.moved:
            return
        steps = (layer.number - index for index, layer in enumerate(self.layers))
        (self.by_number if any(step % period for step in steps) else self.held).append(key)

    def sparse_steps(self, config: dict[str, Any]) -> None:
        """Qwen's ``decoder_sparse_step``, where it no longer holds: every layer has experts but for
        ``mlp_only_layers``, which say the same by number.
        """
        key, dense = "decoder_sparse_step", "mlp_only_layers"
        if key not in self.by_number or not model_type(config).startswith("qwen"):
            return
        self.by_number.remove(key)
        kept = [index for index, layer in enumerate(self.layers) if _is_dense(layer, key, dense)]
        config |= {key: 1, dense: kept}
        self.rewritten += [name for name in (key, dense) if name not in self.rewritten]

    def _keyed(self, path: tuple[str, ...]) -> dict[str, Any]:
        found = {}
        for index, layer in enumerate(self.layers):
            given = self._given(layer, path, dict) or {}
            if str(layer.number) in given:
                found[str(index)] = given[str(layer.number)]
        return found

    def _set(self, config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
        if config[path[-1]] != value:
            config[path[-1]] = value
            self.rewritten.append(path[-1])

    def _given(self, layer: Layer, path: tuple[str, ...], kind: type) -> Any:
        """What the config of the layer's own model has there; None where it has nothing."""
        found: Any = text_config(layer.view.config)
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if kind is list and isinstance(found, str):
            found = _listed(found, _words(path[-1]))
        return found if isinstance(found, kind) else None

    def _entry(self, layer: Layer, path: tuple[str, ...], kind: type) -> Any:
        given = self._given(layer, path, kind)
        given = _expanded(given) or given
        if given is None or len(given) <= layer.number:
            end = 1 + max(a.number for a in self.layers if a.view is layer.view)
            raise ModelError(
                f"{layer.where}: config.json of '{layer.view.label}' has no '{path[-1]}' for "
                f"layers up to {end}, as stacking layers needs"
            )
        return given[layer.number]


def _is_dense(layer: Layer, step: str, dense: str) -> bool:
    """Whether a layer has no experts, as transformers' qwen2_moe and its like read a config."""
    own = text_config(layer.view.config)
    every, listed = own.get(step), own.get(dense)
    off_step = isinstance(every, int) and every > 0 and (layer.number + 1) % every > 0
    return off_step or (isinstance(listed, list) and layer.number in listed)


def _words(key: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", key.lower()))


def _listed(value: str, words: set[str]) -> list[Any] | None:
    """The entries of a list that is written as text, "4,5,6" or "[full; sliding]": whole numbers or
    words; None for any other text. ``words`` of its key: a single number may be a list, too.
    """
    entries = [entry.strip() for entry in re.split(r"[,;]", value.strip().strip("[]()"))]
    if not words & (_ENUMERATE if len(entries) < 2 else _LAYERS | _OF_LAYERS | _ENUMERATE):
        return None
    if not all(re.fullmatch(r"[\w+-]+", entry) for entry in entries):
        return None
    whole = all(re.fullmatch(r"\d{1,9}", entry) for entry in entries)
    return [int(entry) for entry in entries] if whole else entries


def _expanded(value: Any) -> list[Any] | None:
    """What gpt_neo writes as kinds and how often they follow one another, ``[[["global", "local"],
    12]]``, with an entry for each layer; None for anything else.
    """
    if not isinstance(value, list) or not value:
        return None
    entries: list[Any] = []
    for run in value:
        if not isinstance(run, list) or len(run) != 2:
            return None
        kinds, times = run
        if not isinstance(kinds, list) or type(times) is not int or not 0 < times < 10_000:
            return None
        entries += kinds * times
    return entries


def _numbers(value: Any, end: int) -> bool:
    """Whether ``value`` is a list of different whole numbers in [0, end)."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and 0 <= item < end for item in value)
        and len(set(value)) == len(value)
    )


def _period(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key.replace("offset", "period"))
    return value if isinstance(value, int) else 0
