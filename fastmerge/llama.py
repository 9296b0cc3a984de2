"""Merged models in transformers: from a folder, or from a recipe without a round trip through the
disk.

Any architecture that transformers' AutoModelForCausalLM knows will load; llama is the one that is
tested. Needs the extra ``llama``; torch and transformers are imported when a function
is called.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.arguments import a_path
from fastmerge.errors import FastmergeError, ModelError, ResourceError, first_line, some_of
from fastmerge.extras import install
from fastmerge.models.side_files import is_tokenizer
from fastmerge.models.vocabulary import GENERATION
from fastmerge.planning.loading import (
    check_loading,
    check_own_model,
    model_class_of,
    odd,
    one_line,
    own_tokenizer,
)

if TYPE_CHECKING:
    from fastmerge.api import Source
    from fastmerge.live import OnTensor
    from fastmerge.planning.plan import Plan

__all__ = ["load", "load_merged", "load_tokenizer", "merge_into"]


def load(path: str | Path, **kwargs: Any) -> Any:
    """The causal language model in the folder ``path``; nothing is downloaded.

    ``path``: a folder of this machine. ``kwargs``: go to ``AutoModelForCausalLM.from_pretrained``;
    ``dtype`` defaults to the stored type.

    Returns the model in evaluation mode (LlamaForCausalLM for llama). Raises ModelError where the
    folder is no model or lacks a weight (transformers alone would fill it with random numbers and
    go on), ResourceError where torch or transformers are missing, FastmergeError for what is no
    path.
    """
    transformers = _transformers()
    folder = _model_folder(path)
    kwargs.setdefault("dtype", "auto")
    kwargs.setdefault("trust_remote_code", False)  # without it transformers asks on the terminal
    kwargs.setdefault("use_safetensors", True)
    check_own_model(folder)
    if (folder / GENERATION).is_file():  # which transformers leaves out in silence if it is damaged
        _generation_config(transformers, folder)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **kwargs
        )
    # Shapes that do not fit; code of the model's own, or a class that is not known.
    except odd() as error:
        raise ModelError(f"{folder}: does not load: {one_line(error)}") from error
    _check(loading, str(folder))
    return model.eval()


def load_merged(
    recipe: Source,
    *,
    threads: int | None = None,
    seed: int | None = None,
    observe: OnTensor | None = None,
    **kwargs: Any,
) -> Any:
    """The model that ``recipe`` describes, merged in memory: the same weights, bit for bit, as
    `fastmerge.merge` followed by `load`. The merged tensors become the model's parameters without a
    copy, so memory stays at one model.

    ``recipe``: a path, YAML text, a mapping, a list of mappings, or what `fastmerge.plan` gave.
    ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU. ``seed``: a whole
    number in [0, 2^64) from which methods that draw do so, in place of the recipe's. ``observe``: a
    function of the tensor's plan and its array, called for every merged tensor. ``kwargs``: go to
    ``from_pretrained`` of the model's class (``dtype``, ``device_map``, ``attn_implementation``,
    ...).

    Returns the model in evaluation mode. Raises RecipeError, ModelError, UnsupportedError as
    `fastmerge.plan` does, ModelError for a model that transformers would have to complete,
    ResourceError where torch or transformers are missing, FastmergeError for another argument.
    """
    transformers = _transformers()
    from fastmerge import api, live

    plan = api.plan(recipe, seed=seed)
    if find_spec("accelerate"):  # before a weight is read; else the report below says it
        check_loading(plan, strict=False)
    model_class, config = model_class_of(plan.config)
    made = live.tensors(plan, threads=threads, observe=observe)
    state = {item.name: tensor for item, tensor in made}
    kwargs.setdefault("dtype", "auto")
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **kwargs
    )
    _check(loading, "the merged model")
    with beside(plan, lambda name: name == GENERATION) as folder:
        if (folder / GENERATION).is_file():
            model.generation_config = _generation_config(transformers, folder)
    return model.eval()


def merge_into(
    model: Any,
    recipe: Source,
    *,
    keep: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
) -> None:
    """Merges into the live ``model`` in place, on the device where it is: its parameters get what
    `load_merged` gives, bit for bit, and keep their type.

    ``model``: a torch module. ``recipe``: a path, YAML text, a mapping, a list of mappings, or what
    `fastmerge.plan` gave, or coefficients, {model folder: number}, for the plain weighted sum of
    those models. ``keep``: where a GPU model's sources stay for the next call, "device" or "pinned"
    memory, or "auto", which warns where it must pin; ``fastmerge.live.forget(model)`` lets go of
    them. ``threads``: of the CPU's pool, default FASTMERGE_NUM_THREADS or every CPU. ``seed``: a
    whole number in [0, 2^64) from which methods that draw do so, in place of the recipe's.

    Raises, before anything changes, ModelError where recipe and model do not fit, RecipeError,
    UnsupportedError as `fastmerge.plan` does, ResourceError where torch or transformers are
    missing, FastmergeError for another argument.
    """
    _transformers()
    from fastmerge import api, live
    from fastmerge.planning.of_models import of_models

    weights = dict(recipe) if isinstance(recipe, Mapping) and "merge_method" not in recipe else {}
    if weights and all(isinstance(value, (int, float)) for value in weights.values()):
        recipe = of_models([str(path) for path in weights], list(weights.values()))
    live.merge_into(model, api.plan(recipe, seed=seed), keep=keep, threads=threads)


def load_tokenizer(source: Source, **kwargs: Any) -> Any:
    """The tokenizer of a model folder, or the one that a recipe's merge would take over.

    ``source``: a folder of this machine, or a recipe as `fastmerge.plan` takes it. ``kwargs``: go
    to ``AutoTokenizer.from_pretrained``.

    Returns the tokenizer. Raises ModelError where there is none that loads, RecipeError,
    UnsupportedError as `fastmerge.plan` does, ResourceError where torch or transformers are
    missing.
    """
    transformers = _transformers()
    from fastmerge import api

    if isinstance(source, (str, Path)) and os.path.isdir(source):
        return _tokenizer(transformers, Path(source), str(source), kwargs)
    plan = api.plan(source)
    if plan.vocabulary is None and plan.chat_template is None:
        return _tokenizer(transformers, plan.donor, str(plan.donor), kwargs)
    with beside(plan, is_tokenizer) as folder:
        return _tokenizer(transformers, folder, "the merged model", kwargs)


@contextmanager
def beside(plan: Plan, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A folder for the length of the context with what a merge writes beside the weights."""
    with tempfile.TemporaryDirectory(prefix="fastmerge-") as name:
        folder = Path(name)
        files: dict[str, bytes | Path] = dict(plan.side_files())
        if plan.config:
            files["config.json"] = json.dumps(plan.config).encode()
        for file, content in files.items():
            if (wanted(file) or file == "config.json") and "/" not in file:
                data = content if isinstance(content, bytes) else content.read_bytes()
                (folder / file).write_bytes(data)
        yield folder


def _tokenizer(transformers: Any, folder: Path, where: str, kwargs: Mapping[str, Any]) -> Any:
    kwargs = {"trust_remote_code": False, **kwargs}  # without it transformers asks
    try:
        with own_tokenizer(folder) as own:
            return transformers.AutoTokenizer.from_pretrained(own, local_files_only=True, **kwargs)
    except FastmergeError:
        raise
    except Exception as error:  # tokenizers raises no other class for a file that it cannot read
        if not any(map(is_tokenizer, os.listdir(folder))):
            raise ModelError(
                f"{where}: has no tokenizer, which text needs: put the tokenizer.json and "
                "tokenizer_config.json of its family there"
            ) from error
        raise ModelError(
            f"{where}: has no tokenizer that loads: {first_line(error)[:200]}"
        ) from error


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ResourceError(
            f"loading a model needs torch and transformers ({error.name} is missing); "
            f"install them with: {install('llama')}"
        ) from error
    return transformers


def _model_folder(path: str | Path) -> Path:
    folder = a_path(path, "path")
    if not os.path.isdir(folder):
        raise ModelError(f"{path}: no such folder; give the folder of a merged model")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path}: has no config.json, so it is not a Hugging Face model")
    return folder


def _generation_config(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except odd() as error:
        raise ModelError(
            f"{folder / GENERATION}: {one_line(error)}; mend it or remove it"
        ) from error


def _check(loading: Mapping[str, Any], where: str) -> None:
    """Refuses a model that transformers had to complete with random weights."""
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in loading[kind])
        if names:
            raise ModelError(f"{where}: {kind.replace('_keys', '')} weight {some_of(names)}")
