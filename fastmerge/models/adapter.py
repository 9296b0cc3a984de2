"""A LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors.

An adapter changes a base's weights W to W + s B A (Hu et al., 2021, arXiv:2106.09685, section
4.1), with s = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023,
arXiv:2312.03732). Everything here follows from config and header: no weight is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastmerge.errors import ModelError, UnsupportedError, brief, is_whole
from fastmerge.limits import MAX_ADAPTED_LETTERS, MAX_RANK
from fastmerge.models.architecture import layer_of
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.folder import INDEX, SINGLE
from fastmerge.models.header import (
    FileTensor,
    Header,
    Stamp,
    read_header,
    read_object,
    readable,
    show,
)
from fastmerge.models.links import Home
from fastmerge.models.model import TensorInfo
from fastmerge.models.parameters import BASE_LAYER, Parameters
from fastmerge.models.patterns import Patterns, Targets, starts

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's own wrappers

# Settings under which the weights are not W + s B A, and what PEFT calls them.
_OTHER_FORMS = (
    "use_qalora", "layer_replication", "arrow_config", "use_bdlora",
    "kasa_config", "monteclora_config", "alora_invocation_tokens", "megatron_config",
)  # fmt: skip
# Initialisations that change the base itself, so that the factors are for another.
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")

# What the names of an adapter's tensors end in, and the part of a module that it is.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
}
# What PEFT's modules call their parts, each by an adapter's name too, in a state that was saved
# without save_pretrained, which leaves that out; and what modules_to_save took the place of.
_NAMED = (
    re.compile(r"(.*\.lora_(?:A|B|magnitude_vector))\.([^.]+)(\.weight|\.bias)"),
    re.compile(
        r"(.*\.(?:lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta))"
        r"\.(?!weight$)([^.]+)()"
    ),
    re.compile(r"(.*)\.modules_to_save\.([^.]+)(\..+)"),
)
_ORIGINAL = ".original_module."
_WHOLE = ".modules_to_save."  # beside the plain name, where PEFT saves resized embeddings too


@dataclass(frozen=True)
class Factors:
    """What is added to one module's weight: ``scale`` times B (out, rank) times A (rank, in).

    module: its name in the model that was trained, without PEFT's prefix. a, b: the tensors' names
    in the adapter's file, of shapes (rank, in, ...) and (out, rank, ...). embedding: of an
    embedding, whose weight is (in, out). magnitude: DoRA's (Liu et al., 2024, arXiv:2402.09353,
    equation 5), ``out`` numbers: the lengths that the rows of W + s B A are given. bias: ``out``
    numbers that are added to the module's bias, times the scale. parameter: the one of the module
    that is changed. matrices: of one named by target_parameters, how many lie one after another,
    each of these sizes, with factors of its own in ``a`` and ``b`` (models/parameters.py).
    """

    module: str
    a: str
    b: str
    rank: int
    out_size: int
    in_size: int  # of a convolution: times the elements of its kernel
    scale: float
    embedding: bool = False
    magnitude: str | None = None
    bias: str | None = None
    parameter: str = "weight"
    matrices: int | None = None

    @property
    def target(self) -> str:
        """The name of the tensor that is changed."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class Tokens:
    """Rows of one module's weight that are replaced: ``indices[i]`` by row i of tensor ``rows``."""

    module: str
    rows: str
    indices: tuple[int, ...]


_Parts = dict[str, FileTensor]  # of one module


class Adapter(Checkpoint):
    """One adapter on disk; safe to share between threads.

    config: adapter_config.json. factors: by module (or parameter, where that is not its weight), in
    file order. saved: tensors that replace the base's (``modules_to_save``, biases, resized
    embeddings): the name in the model that was trained to the name in the file. tokens: rows that
    are replaced, by module. named: the adapter that the tensors are named for, where they are.
    """

    factors: dict[str, Factors]
    saved: dict[str, str]
    tokens: dict[str, Tokens]
    targets: Targets
    parameters: Parameters
    named: str | None

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Reads and checks the adapter in the folder ``path``: config and header, no weights.

        Raises FastmergeError for what is missing, malformed, or no LoRA.
        """
        path = Path(path)
        with readable(path):
            if not os.path.isdir(path):
                raise ModelError(f"{path}: no such folder; an adapter is a folder with {CONFIG}")
            weights = _weights(path)
            config_file = inside(path, CONFIG)
        home = Home(path)
        config = read_object(config_file, home.inside(config_file))
        _check_kind(config, config_file)
        header, stamp = read_header(weights, 0, home.inside(weights))
        return cls(path, config, (weights,), (stamp,), (header,))

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        files: tuple[Path, ...],
        stamp: tuple[Stamp, ...],
        headers: tuple[Header, ...],
    ) -> None:
        super().__init__(path, config, files, stamp, headers)
        where = str(path / CONFIG)
        self.targets, self.parameters = Targets(config, where), Parameters(config)
        modules, self.saved, self.named = _sorted(self.tensors.values(), str(files[0]))
        scales = _Scales(config, where)
        rows_of = _Rows(config, where)
        self.factors, self.tokens = {}, {}
        ordinary = {name for name in modules if self.targets.tell(name)}
        parameters = self.parameters.of(modules, ordinary, where)
        for name, found in modules.items():
            parts = dict(found)
            rows = parts.pop("tokens", None)
            if rows is not None:
                self.tokens[name] = rows_of.tokens(name, rows)
            if name in parameters:
                own = _of_parameter(parameters[name], parts, scales, config, str(files[0]))
                self.factors[own.target.removesuffix(".weight")] = own
            elif parts:
                # PEFT scales the embeddings' factors by the rank that the head would have.
                scale = partial(scales.of, name, checked=not self._is_only_tied(name))
                self.factors[name] = _factors(name, parts, scale, config, str(files[0]))
        for text in ("base_model_name_or_path", "task_type", "revision"):
            if not isinstance(config.get(text), str | None):
                raise ModelError(f"{where}: '{text}' must be text, not {brief(config[text])}")
        if not (self.factors or self.saved or self.tokens):
            raise ModelError(f"{files[0]}: holds no tensor; save the adapter again")
        self._check_targets(where)

    @property
    def base_name(self) -> str | None:
        """What the config calls its base; None where it does not say."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def remark(self) -> str | None:
        """What is to be told of how its tensors are named."""
        if self.named is None:
            return None
        return (
            f"'{self.path}' names its tensors for the adapter '{self.named}', as state_dict does: "
            "they are taken as save_pretrained writes them"
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, rising."""
        return tuple(sorted({each.rank for each in self.factors.values()}))

    def _is_only_tied(self, name: str) -> bool:
        """Whether a module can have factors because it is tied to one that the config names."""
        outside = layer_of(f"{name}.weight") is None
        tying = outside and bool(self.config.get("ensure_weight_tying"))
        return tying and self.targets.tell(name) is False

    def _check_targets(self, where: str) -> None:
        """PEFT leaves out what the config does not name, in silence."""
        for name, own in self.factors.items():
            if own.matrices is not None:
                continue
            if self.targets.tell(name) is False and not self._is_only_tied(name):
                raise ModelError(
                    f"{where}: target_modules, exclude_modules and layers_to_transform leave out "
                    f"'{name}', for which {WEIGHTS} has factors; one of the two files is stale"
                )


def is_adapter(path: Path) -> bool:
    """Whether the folder holds an adapter and no model."""
    with readable(path):
        whole = any((path / name).exists() for name in (SINGLE, INDEX))
        return not whole and any(
            (path / name).exists() for name in (CONFIG, WEIGHTS, "adapter_model.bin")
        )


# --- the files ---


def inside(folder: Path, name: str) -> Path:
    """A file of the adapter in ``folder``. Raises ModelError if it is not there, or a link out."""
    file = folder / name
    if not file.exists():
        if any((folder / whole).exists() for whole in (SINGLE, INDEX)):
            raise ModelError(
                f"{folder}: is a whole model, no adapter of PEFT's; give the folder of a LoRA, "
                f"with {CONFIG} and {WEIGHTS}"
            )
        link = f"; it is a link to nothing ({os.readlink(file)})" if file.is_symlink() else ""
        raise ModelError(
            f"{folder}: no {name}, so no adapter of PEFT's{link}; save it with save_pretrained"
        )
    Home(folder).inside(file)
    return file


def _weights(folder: Path) -> Path:
    pickled = folder / "adapter_model.bin"
    if pickled.exists() and not (folder / WEIGHTS).exists():
        raise UnsupportedError(
            f"{pickled}: a pickle, which can run code when it is read; load the adapter on a "
            "machine that you can lose, and save it again there (save_pretrained writes "
            f"{WEIGHTS})"
        )
    return inside(folder, WEIGHTS)


def _check_kind(config: Mapping[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        if not isinstance(kind, str):
            raise ModelError(f"{where}: has no peft_type; not the config of a PEFT adapter")
        raise UnsupportedError(
            f"{where}: peft_type {brief(kind)} is not folded, only LORA is; merge it with PEFT "
            "(merge_and_unload) first"
        )
    for key in _OTHER_FORMS:
        if config.get(key):
            raise UnsupportedError(
                f"{where}: '{key}' is set, and such an adapter is not folded; merge it with PEFT "
                "(merge_and_unload) first"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        raise UnsupportedError(
            f"{where}: init_lora_weights {brief(start)} changes the base's weights too; convert "
            "it with PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        _check_names(config.get(key), f"{where}: '{key}'")
    given = config.get("target_parameters")
    if not (given is None or _all(given, lambda x: isinstance(x, str))):
        raise ModelError(
            f"{where}: 'target_parameters' must be a list of names, not {brief(given)}"
        )
    layers = config.get("layers_to_transform")
    if not (layers is None or is_whole(layers) or _all(layers, is_whole)):
        raise ModelError(f"{where}: 'layers_to_transform' must be layer numbers")
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(config.get(key), bool | None):
            raise ModelError(f"{where}: '{key}' must be true or false, not {brief(config[key])}")


def _check_names(value: Any, where: str) -> None:
    if not (value is None or isinstance(value, str) or _all(value, lambda x: isinstance(x, str))):
        raise ModelError(f"{where} must be a list of module names, not {brief(value)}")


def _all(value: Any, is_one: Any) -> bool:
    return isinstance(value, list) and all(is_one(item) for item in value)


# --- the tensors ---


def _sorted(tensors: Any, where: str) -> tuple[dict[str, _Parts], dict[str, str], str | None]:
    """The tensors by module and part, those that replace the base's, by its name for them, and the
    adapter that all are named for.
    """
    modules: dict[str, _Parts] = {}
    saved: dict[str, str] = {}
    spare: dict[str, FileTensor] = {}
    names: dict[str | None, str] = {}
    for info in tensors:
        check_letters(info.name, where)
        plain, named = _without_adapter(info.name.removeprefix(PREFIX))
        if _ORIGINAL in plain:
            continue
        if _WHOLE in plain:
            spare[_of_base(plain.replace(_WHOLE, "."))] = info
            continue
        ending = next((end for end in _PARTS if plain.endswith(end)), None)
        if named is not None or ending is not None:
            names.setdefault(named, info.name)
        _check_type(info, where)
        if ending is not None:
            parts = modules.setdefault(plain.removesuffix(ending), {})
            if parts.setdefault(_PARTS[ending], info) is not info:
                raise ModelError(f"{where}: tensor {show(info.name)} is there twice")
        elif ".lora_" in plain:
            raise UnsupportedError(
                f"{where}: tensor {show(info.name)} is no part of a LoRA that is known "
                f"(known: {', '.join(end.lstrip('.') for end in _PARTS)})"
            )
        elif saved.setdefault(_of_base(plain), info.name) != info.name:
            raise ModelError(f"{where}: tensor {show(info.name)} is there twice")
    for name, info in spare.items():
        _check_type(info, where)
        saved.setdefault(name, info.name)
    if len(names) > 1:
        first, second, *_ = names.values()
        raise ModelError(
            f"{where}: tensors {show(first)} and {show(second)} are of two adapters; save one of "
            "them with save_pretrained"
        )
    return modules, saved, next(iter(names), None)


def _check_type(info: FileTensor, where: str) -> None:
    if not info.dtype.kernels:
        raise UnsupportedError(
            f"{where}: tensor {show(info.name)} is {info.dtype.name}, which has no kernels; "
            "save the adapter in float32 or bfloat16"
        )


def _without_adapter(name: str) -> tuple[str, str | None]:
    """A tensor's name as save_pretrained writes it, and the adapter's that it has beside."""
    for pattern in _NAMED:
        found = pattern.fullmatch(name)
        if found is not None:
            return f"{found[1]}{found[3]}", found[2]
    return name, None


def _of_base(name: str) -> str:
    """The base's name for a tensor, without the layers that PEFT put around its module."""
    while f"{BASE_LAYER}." in name:
        name = name.replace(f"{BASE_LAYER}.", ".")
    return name


def check_letters(name: str, where: str) -> None:
    """Raises ModelError for a name so long that finding its ends among others takes minutes."""
    if len(name) > MAX_ADAPTED_LETTERS:
        raise ModelError(
            f"{where}: the name of tensor {show(name)} has {len(name)} letters; over "
            f"{MAX_ADAPTED_LETTERS} are no module's"
        )


def _factors(
    module: str,
    parts: _Parts,
    scale_of: Callable[[int], float],
    config: Mapping[str, Any],
    where: str,
) -> Factors:
    embedding = "embedding_a" in parts or "embedding_b" in parts
    a, b = (parts.get("embedding_" * embedding + letter) for letter in "ab")
    if a is None or b is None:
        there = next(iter(parts.values()))
        raise ModelError(
            f"{where}: has tensor {show(there.name)} but not both factors of '{module}'; save the "
            "adapter again"
        )
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or math.prod(b.shape[2:]) != 1:
        raise ModelError(
            f"{where}: the factors of '{module}' are {list(a.shape)} and {list(b.shape)}, not "
            "(rank, in) and (out, rank)"
        )
    rank, out_size, in_size = a.shape[0], b.shape[0], math.prod(a.shape[1:])
    if b.shape[1] != rank:
        raise ModelError(
            f"{where}: the factors of '{module}' disagree: A {list(a.shape)} has rank {rank}, "
            f"B {list(b.shape)} has rank {b.shape[1]}"
        )
    magnitude, bias = parts.get("magnitude"), parts.get("bias")
    if bool(config.get("use_dora")) != (magnitude is not None):
        said = "use_dora is set, but" if magnitude is None else "use_dora is not set, but"
        has = "has no" if magnitude is None else "has a"
        raise ModelError(f"{where}: {said} '{module}' {has} lora_magnitude_vector")
    for info in (magnitude, bias):
        if info is not None and info.count != out_size:
            raise ModelError(
                f"{where}: tensor {show(info.name)} is {list(info.shape)}; '{module}' needs "
                f"{out_size} numbers"
            )
    return Factors(
        module, a.name, b.name, rank, out_size, in_size, scale_of(rank), embedding,
        None if magnitude is None else magnitude.name, None if bias is None else bias.name,
    )  # fmt: skip


def _of_parameter(
    target: str, parts: _Parts, scales: _Scales, config: Mapping[str, Any], where: str
) -> Factors:
    """Of what target_parameters names: as many products as the rank that the config says goes into
    the factors'.
    """
    module, _, parameter = target.rpartition(".")
    if set(parts) != {"a", "b"}:
        there = next(iter(parts.values()))
        raise ModelError(
            f"{where}: '{target}', which target_parameters names, needs a lora_A and a lora_B and "
            f"nothing else ({show(there.name)} is there); save the adapter again"
        )
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise ModelError(
                f"{where}: '{key}' is set, which PEFT does not take for what target_parameters "
                f"names ('{target}'); one of the two files is stale"
            )
    a, b = parts["a"], parts["b"]
    rank = scales.rank_of(target)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        raise ModelError(
            f"{where}: the factors of '{target}' are {list(a.shape)} and {list(b.shape)}, not "
            f"(experts x {rank}, in) and (out, {rank} x experts)"
        )
    return Factors(
        module, a.name, b.name, rank, b.shape[0], a.shape[1], scales.of(target, rank),
        parameter=parameter, matrices=a.shape[0] // rank,
    )  # fmt: skip


class _Rows:
    """``trainable_token_indices``: the rows of the embeddings, or of each module by its name or the
    end of it after a dot; the first that is given counts.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._given = config.get("trainable_token_indices")
        by_name = self._given if isinstance(self._given, dict) else {}
        self._orders = {key: order for order, key in enumerate(by_name)}

    def tokens(self, module: str, rows: TensorInfo) -> Tokens:
        given = self._given
        if isinstance(given, dict):
            ends = [module[at:] for at in starts(module) if module[at:] in given]
            given = given[min(ends, key=self._orders.__getitem__)] if ends else None
        listed = given if isinstance(given, list) else []
        listed = listed if all(is_whole(i) and i >= 0 for i in listed) else []
        if not rows.shape or len(listed) != rows.shape[0]:
            raise ModelError(
                f"{self._where}: 'trainable_token_indices' must be the numbers of the rows in "
                f"{show(rows.name)}, which is {list(rows.shape)}, not {brief(given)}"
            )
        return Tokens(module, rows.name, tuple(int(index) for index in listed))


class _Scales:
    """The scale of each module's product, from the config; ranks checked against it."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._rank = _rank(config.get("r", 8), f"{where}: 'r'")
        self._alpha = _number(config.get("lora_alpha", 8), f"{where}: 'lora_alpha'")
        self._rooted = bool(config.get("use_rslora"))
        self._ranks = self._patterns(config, "rank_pattern", _rank)
        self._alphas = self._patterns(config, "alpha_pattern", _number)

    def _patterns(self, config: Mapping[str, Any], key: str, check: Any) -> Patterns:
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise ModelError(f"{self._where}: '{key}' must map module names to numbers")
        where = f"{self._where}: '{key}'"
        return Patterns({k: check(v, f"{where} of '{k}'") for k, v in given.items()}, where)

    def rank_of(self, module: str) -> int:
        """What the config says of a module's rank."""
        return int(self._ranks.of(module, self._rank))

    def of(self, module: str, rank: int, *, checked: bool = True) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r), of a module whose factors have this rank, which
        is ``checked`` against what the config says.
        """
        said = self.rank_of(module)
        if checked and said != rank:
            raise ModelError(
                f"{self._where}: rank {said} for '{module}', whose factors have rank {rank}; one "
                "of the two files is stale"
            )
        alpha = self._alphas.of(module, self._alpha)
        return float(alpha / math.sqrt(said) if self._rooted else alpha / said)


def _rank(value: Any, where: str) -> int:
    if not is_whole(value) or not 0 < value <= MAX_RANK:
        raise ModelError(f"{where}: a rank must be a whole number above 0, not {brief(value)}")
    return int(value)


def _number(value: Any, where: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    # 1e30 is beyond any training; at float32's end the scale would be infinite.
    if not good or not abs(value) <= 1e30:
        raise ModelError(f"{where}: must be a finite number, not {brief(value)}")
    return float(value)
