"""``--check``: whether transformers' own class loads what a plan will write, before a weight is
read.

The class is built on the meta device and loads tensors that have shapes and no memory, through
``from_pretrained``: so every renaming and conversion that it does for stored weights is done, and
its own loading report is the verdict. Code from a model's folder is never run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastmerge.errors import ModelError, ResourceError, UnsupportedError, some_of
from fastmerge.extras import install
from fastmerge.limits import MAX_PATH_LETTERS
from fastmerge.models.adapter import CONFIG as ADAPTER_CONFIG
from fastmerge.models.architecture import layer_of
from fastmerge.models.code_elsewhere import code_on_the_hub
from fastmerge.models.config import classes_of, layer_count
from fastmerge.models.header import read_object, show
from fastmerge.models.links import Home
from fastmerge.models.side_files import is_tokenizer, side_files
from fastmerge.models.vocabulary import CONFIG as TOKENIZER_CONFIG
from fastmerge.models.vocabulary import HARMLESS, SPECIALS
from fastmerge.planning.plan import Plan


def check_loading(plan: Plan, *, strict: bool = True) -> None:
    """Raises ModelError where the class of the plan's config finds a tensor missing, in another
    shape, or (``strict``) one that it has no place for. Where the config names no class of
    transformers', one of its type with a head that loads it whole will do (``strict``).

    Layers behind those that the config counts are no finding. UnsupportedError where transformers
    does not know the config; ResourceError where torch, transformers or accelerate are missing.
    """
    lost = [name for name in ("torch", "transformers", "accelerate") if not find_spec(name)]
    if lost:
        raise ResourceError(
            "checking that the result loads needs torch, transformers and accelerate "
            f"({lost[0]} is missing); install them with: {install('llama')}"
        )
    import torch
    import transformers

    with quiet(transformers):
        classes, config = _classes_of(plan.config)
        state = {
            tensor.name: torch.empty(
                tensor.shape, device="meta", dtype=getattr(torch, tensor.dtype.name, torch.float32)
            )
            for tensor in plan.tensors
        }
        faults: list[ModelError] = []
        for model_class in classes if strict else classes[:1]:
            try:
                _judge(_loaded(model_class, config, state), plan, model_class.__name__, strict)
                return
            except ModelError as error:
                faults.append(error)
    raise faults[0]


def _loaded(model_class: Any, config: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a class says of loading tensors that have shapes and no memory."""
    import transformers

    try:
        _, loading = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except odd() as error:
        raise ModelError(
            f"{model_class.__name__} of transformers {transformers.__version__} cannot be made "
            f"from the merged config.json: {one_line(error)}"
        ) from error
    found: Mapping[str, Any] = loading
    return found


def _judge(loading: Mapping[str, Any], plan: Plan, name: str, strict: bool) -> None:
    found = {
        kind: sorted(_named(key) for key in loading[f"{kind}_keys"])
        for kind in ("missing", "mismatched", *(["unexpected"] if strict else []))
    }
    count = layer_count(plan.config)
    if strict:
        found["unexpected"] = [key for key in found["unexpected"] if not _is_behind(key, count)]
    said = [f"{kind} weight {some_of(keys)}" for kind, keys in found.items() if keys]
    if said:
        raise ModelError(
            f"the merged model: {'; '.join(said)}: {name} would not load it whole; config.json and "
            "tensors are not of one model"
        )


def _named(key: Any) -> str:
    """A missing key, or a mismatched one with both shapes."""
    if isinstance(key, tuple):
        name, stored, wanted = key
        return f"{name} ({list(stored)}, the config makes it {list(wanted)})"
    return str(key)


def _is_behind(name: str, count: int | None) -> bool:
    place = layer_of(name)
    return place is not None and count is not None and place.number >= count


def model_class_of(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' class for a config.json, by its ``architectures``, else the causal language
    model of its ``model_type``; and the config as its object. FastmergeError where it has none.
    """
    classes, made = _classes_of(config)
    return classes[0], made


def _classes_of(config: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The class that a config names, or else those of its type: the one of `model_class_of`, and
    all with a head.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    check_runs_nothing(config, "the merged config.json")
    kind = config.get("model_type")
    known = transformers.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedError(
            f"transformers {transformers.__version__} does not know the merged config's model_type "
            f"'{kind}'; upgrade it, or write a folder and load that with its own code"
        )
    try:
        made = known[kind].from_dict(_floats(config))
    except odd() as error:
        raise ModelError(
            f"transformers {transformers.__version__} does not take the merged config.json: "
            f"{one_line(error)}"
        ) from error
    names = classes_of(config)
    mappings = [
        mapping
        for name, mapping in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("MAPPING") and hasattr(mapping, "keys")
    ]
    found: list[Any] = []
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, *mappings):
        if type(made) in mapping:
            classes = mapping[type(made)]
            found += classes if isinstance(classes, tuple) else [classes]
    for name in names:
        for one in found:
            if one.__name__ == name:
                return [one], made
    if names:  # a class that no AutoModel lists
        one = getattr(transformers, names[0], None)
        if getattr(one, "config_class", None) is type(made):
            return [one], made
    if not found:
        raise UnsupportedError(
            f"model_type '{kind}' is not a causal language model, nor any other that transformers "
            f"{transformers.__version__} loads"
        )
    headed = [one for one in found[1:] if "For" in one.__name__]
    return list(dict.fromkeys([found[0], *headed])), made


def check_runs_nothing(config: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedError where transformers would fetch code that a config names, and run it:
    attention, experts and such by their repository on the Hub. It asks nobody for a leave.
    """
    for key, named in code_on_the_hub(config):
        raise UnsupportedError(
            f"{where}: {show(key)} names code on the Hub, {show(named)}, which would run; "
            "remove that line"
        )


def check_own_model(folder: Path) -> None:
    """Raises FastmergeError where transformers would not load the weights of ``folder`` alone: for
    a link out of it, code on the Hub, or an adapter, whose base it loads in their place.
    """
    side_files(folder)
    if os.path.lexists(folder / ADAPTER_CONFIG):
        raise ModelError(
            f"{folder / ADAPTER_CONFIG}: sends transformers to the base that it names, in place of "
            "this model; remove it"
        )
    place = folder / "config.json"
    check_runs_nothing(read_object(Home(folder).inside(place)), str(place))


@contextlib.contextmanager
def own_tokenizer(folder: Path) -> Iterator[Path]:
    """Where transformers makes the tokenizer of ``folder`` from its own files alone: there, or,
    where its settings name files elsewhere ("vocab" is opened wherever it leads), in a copy that
    does not. Raises ModelError for links out of the folder.
    """
    files, home = side_files(folder), Home(folder)
    said = {
        name: read_object(home.inside(folder / name))
        for name in (TOKENIZER_CONFIG, SPECIALS, "config.json")
        if (folder / name).exists()
    }
    kept = {
        name: {key: value for key, value in found.items() if not _names_a_file(key, value)}
        for name, found in said.items()
    }
    if kept == said:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fastmerge-tokenizer-") as place:
        for name, file in files.items():
            if is_tokenizer(name) and "/" not in name:
                data = file if isinstance(file, bytes) else file.read_bytes()
                Path(place, name).write_bytes(data)
        for name, found in kept.items():
            Path(place, name).write_text(json.dumps(found))
        yield Path(place)


def _names_a_file(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_names_a_file(inner, each) for inner, each in value.items())
    if isinstance(value, list):
        return any(_names_a_file(key, each) for each in value)
    if not isinstance(value, str) or key in HARMLESS or key.endswith(("_token", "template")):
        return False
    return len(value) < MAX_PATH_LETTERS and os.path.lexists(value)


def _floats(value: Any) -> Any:
    """``value`` with floats for the infinities and NaN that transformers 5 writes as mappings."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value


def odd() -> tuple[type[Exception], ...]:
    """What config and model classes raise for values that they do not take."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, AssertionError,
        ZeroDivisionError, RuntimeError, OSError, StrictDataclassError,
    )  # fmt: skip


def one_line(error: Exception) -> str:
    """Another library's message as part of one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300].rsplit(' ', 1)[0]} ..."


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and reports: their many lines are said in one."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
