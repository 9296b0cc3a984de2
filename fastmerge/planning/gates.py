"""The rows of a mixture's routers: drawn, or directions in which the base model moves on prompts.

Definitions as mergekit-moe 0.1.5 (moe/router.py). A layer's router is a matrix of one row for each
expert, over the hidden state that enters the layer's MLP. They are made when they are written: a
plan reads no weight for them, and runs no model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from fastmerge.errors import FastmergeError, ModelError, ResourceError, UnsupportedError
from fastmerge.extras import install
from fastmerge.methods.noise import normal, uniform, words
from fastmerge.methods.types import Float32, Float64
from fastmerge.models.model import Model, numbers_of
from fastmerge.models.side_files import is_tokenizer
from fastmerge.models.vocabulary import identity
from fastmerge.planning.inputs import View
from fastmerge.planning.loading import check_own_model, odd, one_line, own_tokenizer, quiet
from fastmerge.recipe.mixture import Mixture
from fastmerge.selection import random_key
from fastmerge.tree.nodes import Made, Stored

Prompts = tuple[tuple[str, ...], tuple[str, ...]]  # for an expert, and against it

_LEAST_NORM = 1e-8  # below it a direction is none


class Gates:
    """The routers of one mixture. ``prompts``: of each row, of all its layers."""

    def __init__(
        self,
        mixture: Mixture,
        base: View,
        models: Sequence[Model],
        prompts: Sequence[Prompts],
        seed: int | None,
    ) -> None:
        """Raises FastmergeError where what the mode needs is not there."""
        self._mode, self._seed = mixture.gate_mode, seed
        self._prompts = tuple(prompts)
        self._lock = Lock()
        self._found: Float64 | None = None  # (layers or 1, rows, hidden)
        self._measure: Callable[[], Float64] | None = None
        where = mixture.at("gate_mode")
        # Rows without prompts are zeros: `Mixture.is_unprompted`.
        if mixture.draws_gates or not any(any(each) for each in prompts):
            return
        folder = _checked(base, where, self._mode)
        if self._mode == "cheap_embed":
            stored = _embeddings(base, where)
            self._measure = partial(
                _of_embeddings, folder, models[stored.model], stored, self._prompts
            )
        else:
            _check_runs(base, where, self._mode)
            average = self._mode == "hidden_avg"
            self._measure = partial(_of_states, folder, self._prompts, average)
        self._basis = f"{base.donor.fingerprint} {identity(base.donor.side_files())}"

    def rows(self, name: str, layer: int, first: int, count: int, hidden: int) -> Made:
        """Rows [first, first + count) of the router of ``layer``, as the tensor ``name``."""
        shape = (count, hidden)
        if self._mode in ("random", "uniform_random"):
            assert self._seed is not None
            key = random_key(self._seed, name, 0)
            draw = _normal if self._mode == "random" else _uniform
            return Made(partial(draw, key, shape), f"{self._mode} {key}", self._kind, shape)
        if self._measure is None:
            return zeros(shape, "router of zeros")
        asked = json.dumps(self._prompts[first : first + count])
        digest = hashlib.sha256(f"{self._basis} {asked}".encode(errors="surrogatepass")).hexdigest()
        make = partial(self._layer, layer, first, shape)
        return Made(make, f"{self._mode} {layer} {digest}", self._kind, shape)

    @property
    def _kind(self) -> str:
        return f"router ({self._mode})"

    def _layer(self, layer: int, first: int, shape: tuple[int, int]) -> Float32:
        assert self._measure is not None
        with self._lock:  # the first of several threads measures for all
            if self._found is None:
                self._found = self._measure()
        found = self._found
        rows = found[layer if len(found) > 1 else 0, first : first + shape[0]]
        if rows.shape != shape:
            raise ModelError(
                f"gate_mode {self._mode}: the base model gave states of {rows.shape[-1]} numbers "
                f"for {len(found)} layers, and its config says {shape[1]}; mend its config"
            )
        return rows.astype(np.float32)


def zeros(shape: tuple[int, ...], kind: str) -> Made:
    """A tensor of zeros."""
    return Made(lambda: np.zeros(shape, np.float32), f"zeros {shape}", kind, shape)


# ---------------------------------------------------------------- drawn


def _normal(key: int, shape: tuple[int, int]) -> Float32:
    return normal(words(key, math.prod(shape))).reshape(shape)


def _uniform(key: int, shape: tuple[int, int]) -> Float32:
    """In +-1/sqrt(hidden): how torch.nn.Linear begins."""
    drawn = 2.0 * uniform(words(key, math.prod(shape))) - 1.0
    return (drawn / math.sqrt(shape[1])).astype(np.float32).reshape(shape)


# ---------------------------------------------------------------- from prompts


def _of_embeddings(
    folder: Path, model: Model, stored: Stored, prompts: Sequence[Prompts]
) -> Float64:
    """(1, rows, hidden): the direction of the sum of the prompts' token embeddings, less that of
    the sum of those against it; reads the rows of these tokens and no others.
    """
    tokenizer = _tokenizer(folder)

    def direction(texts: Sequence[str]) -> Float64:
        ids = [token for text in texts for token in _ids(tokenizer, text)]
        return _unit(_rows_of(model, stored, ids).sum(axis=0))

    try:
        return _directions(direction, prompts)[None]
    finally:
        model.drop(stored.name)


def _of_states(folder: Path, prompts: Sequence[Prompts], average: bool) -> Float64:
    """(layers, rows, hidden): the mean over the prompts of the state that enters each layer, at the
    last token or averaged over all, less that of those against it.
    """
    import torch

    tokenizer, model = _tokenizer(folder), _causal(folder)

    def state(text: str) -> Float64:
        ids = torch.tensor([_ids(tokenizer, text)])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, use_cache=False)
        states = torch.stack(out.hidden_states[:-1])[:, 0].float()  # (layers, tokens, hidden)
        return np.asarray((states.mean(dim=1) if average else states[:, -1]), np.float64)

    def mean(texts: Sequence[str]) -> Float64:
        return np.asarray(sum(map(state, texts)) / len(texts))

    return _directions(mean, prompts).transpose(1, 0, 2)


def _directions(measure: Callable[[Sequence[str]], Float64], prompts: Sequence[Prompts]) -> Float64:
    return np.stack(
        [
            _unit(measure(wanted) - measure(unwanted) if unwanted else measure(wanted))
            for wanted, unwanted in prompts
        ]
    )


def _unit(vectors: Float64) -> Float64:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, _LEAST_NORM))


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt after the tokenizer's first token, if it has one."""
    text = (tokenizer.bos_token or "") + prompt
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not found:
        raise ModelError(f"prompt {prompt!r} has no token in the base model's tokenizer; reword it")
    return list(found)


def _rows_of(model: Model, stored: Stored, ids: Sequence[int]) -> Float64:
    height, width = stored.shape
    if max(ids) >= height:
        raise ModelError(
            f"{model.label}: its tokenizer has a token {max(ids)}, and '{stored.name}' {height} "
            "rows; mend the tokenizer or write `gate_mode: random`"
        )
    view = model.view(stored.name)
    found = [numbers_of(view, stored.dtype, token * width, (token + 1) * width) for token in ids]
    return np.array(found, np.float64)


# ---------------------------------------------------------------- what a mode needs


def _checked(base: View, where: str, mode: str) -> Path:
    """The base's folder, with what reads prompts; FastmergeError where anything is missing."""
    needed = ("transformers",) if mode == "cheap_embed" else ("torch", "transformers")
    lost = next((name for name in needed if not find_spec(name)), None)
    if lost is not None:
        raise ResourceError(
            f"{where}: gate_mode {mode} needs {lost}; install it with: {install('llama')}, "
            "or write `gate_mode: random`"
        )
    if base.donor.folder is None:
        raise UnsupportedError(
            f"{where}: gate_mode {mode} reads the base model's folder, and '{base.label}' is in "
            "none; save it first, or write `gate_mode: random`"
        )
    if not any(is_tokenizer(name) for name in base.donor.side_files()):
        raise ModelError(
            f"{where}: gate_mode {mode} needs the base model's tokenizer, and '{base.label}' has "
            "none; add it, or write `gate_mode: random`"
        )
    return base.donor.folder


def _embeddings(base: View, where: str) -> Stored:
    name = base.embedding
    root = None if name is None else base.tensors[name].root
    if not isinstance(root, Stored) or not root.dtype.mergeable:
        raise UnsupportedError(
            f"{where}: gate_mode cheap_embed reads the base model's embeddings, and '{base.label}' "
            "has none that are stored as floats; merge it to a folder first, or write "
            "`gate_mode: random`"
        )
    return root


def _check_runs(base: View, where: str, mode: str) -> None:
    """UnsupportedError where the base is not what lies in its folder: an adapter on it, a merge."""
    for name, tensor in base.tensors.items():
        root = tensor.root
        if not isinstance(root, Stored) or root.name != name:
            raise UnsupportedError(
                f"{where}: gate_mode {mode} runs the base model, and '{base.label}' lies in no "
                "folder as it is (adapter, codes, or document of this recipe); merge it to "
                "one first, or write `gate_mode: cheap_embed`"
            )


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        with own_tokenizer(folder) as own:
            return transformers.AutoTokenizer.from_pretrained(
                own, local_files_only=True, trust_remote_code=False
            )
    except FastmergeError:
        raise
    except Exception as error:  # tokenizers raises no other class for a file that it cannot read
        raise ModelError(f"{folder}: has no tokenizer that loads: {one_line(error)}") from error


def _causal(folder: Path) -> Any:
    import transformers

    check_own_model(folder)
    try:
        with quiet(transformers):
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                dtype="auto",
            )  # fmt: skip
    except odd() as error:
        raise ModelError(f"{folder}: does not load: {one_line(error)}") from error
    return model.eval()
