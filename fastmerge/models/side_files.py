"""What lies beside a model's weights and belongs to it: tokenizer, code, templates, licences.

Everything in the folder and its subfolders does, whatever its name, but for weights, caches,
version control and what a merge writes itself. A model folder is a stranger's: no link leads out of
it, only regular files are opened, and sizes are bounded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmerge.errors import ModelError, some_of
from fastmerge.limits import (
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_FILE_BYTES,
    MAX_MODULES_BYTES,
    MAX_TOTAL_BYTES,
)
from fastmerge.models.header import open_regular, show
from fastmerge.models.links import Home

CARD_FILE = "README.md"
LINEAGE_FILE = "fastmerge.json"
RECIPE_FILE = "fastmerge_recipe.yml"
CONFIG_FILE = "mergekit_config.yml"  # where the Hub and other tools look for a merge's recipe
MOE_CONFIG_FILE = "mergekit_moe_config.yml"  # of a mixture of experts
SCHEDULE_FILE = "schedule.yml"
OURS = frozenset(
    {CARD_FILE, LINEAGE_FILE, RECIPE_FILE, CONFIG_FILE, MOE_CONFIG_FILE, SCHEDULE_FILE}
)

# Every file that a tokenizer class of transformers or of mistral-common names. One expression: a
# pattern for each would be compiled at each start, which takes 2 ms.
_TOKENIZER = re.compile(
    r"tokenizer.*\.(jsonl?|txt|model.*)|special_tokens_map\.json|added_tokens\.json"
    r"|.*vocab.*\.(json|txt)|vocab\.bpe|merges\.txt|bpe\.codes|tekken\.json|spiece\.model"
    r"|(sentencepiece|spm).*\.model|.*_text\.model|.*\.(spm|tiktoken)|chat_template\..*"
    r"|additional_chat_templates/.*|tokenization_.*\.py",
    re.DOTALL,
)
# Known by name beside these: what is taken from beside a file that lies in no model folder of its
# own, and what --overwrite may replace without a list of what was written there.
_SIDE = re.compile(
    r"(generation_)?config\.json|(.*pre)?processor_config\.json"
    r"|(configuration|modeling)_.*\.py",
    re.DOTALL,
)

WEIGHT_SUFFIXES = (
    "safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx",
    "onnx_data", "npz", "tflite", "pkl", "pickle", "mlmodel", "ot", "distcp",
)  # fmt: skip
# An adapter's config without its weights sends loaders in search of them.
_WEIGHTS = re.compile(
    rf"(?i:.+\.(?:{'|'.join(WEIGHT_SUFFIXES)}))|.+\.index(\.[\w-]+)?\.json|adapter_config\.json"
)
# The same weights for other programs, with configs that are not this model's.
OTHER_FORMATS = ("original", "onnx", "openvino", "coreml", "metal", "mlx")
_SILENT = re.compile(
    r"__pycache__|.+\.pyc|\.git.*|\.hg|\.svn|\.cache|\.huggingface|\.locks|\.ipynb_checkpoints"
    r"|\.DS_Store|\.metadata|\..+\.fastmerge-\w+"
)


def check_card(folder: Path) -> None:
    """Raises ModelError where the model's own card may not be read, is none of its files, or no
    file: an output's licence would be said without it.
    """
    card = folder / CARD_FILE
    try:
        if os.path.lexists(card):
            open_regular(Home(folder).inside(card)).close()
    except OSError as error:
        raise ModelError(f"{card}: cannot be read ({error.strerror or error})") from error


class SideFiles(dict[str, bytes | Path]):
    """What is taken from one model's folder: where each file really lies, by name, with ``/``
    between folders. ``notes``: what is left out and why, a sentence each.
    """

    notes: tuple[str, ...] = ()


def bytes_of(files: Mapping[str, bytes | Path]) -> int:
    """Of all contents."""
    return sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in files.values()
    )


def is_tokenizer(name: str) -> bool:
    return _TOKENIZER.fullmatch(name) is not None


def is_known(name: str) -> bool:
    """Whether ``name`` says that the file belongs to a model: weights included."""
    return is_tokenizer(name) or _SIDE.fullmatch(name) is not None or is_weights(name)


def is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def is_silent(name: str) -> bool:
    """Whether it is version control, a cache or what an editor leaves: never a model's."""
    return _SILENT.fullmatch(name) is not None


def side_files(path: Path, weights: Iterable[Path] = ()) -> SideFiles:
    """What a merged model takes over from the one at ``path``, a folder or one .safetensors file.

    From beside a file in a folder without config.json only what is known by name is taken: that is
    somebody's folder of downloads. ``weights``: the model's own, which are not called left out.
    Raises ModelError for a link that is dangling or leads out of the folder, for what is no regular
    file or cannot be read, and for a folder of more than 10 000 files.
    """
    folder = path if path.is_dir() else path.parent
    try:
        return _Gathering(Path(os.path.realpath(folder)), {file.name for file in weights}).take(
            whole=path.is_dir() or (folder / "config.json").exists()
        )
    except OSError as error:
        where = error.filename or folder
        raise ModelError(f"{where}: cannot be read ({error.strerror or error})") from error


class _Gathering:
    def __init__(self, root: Path, weights: set[str]) -> None:
        self._root = root
        self._home = Home(root)
        self._weights = weights
        self._found: dict[str, tuple[Path, int]] = {}
        self._left_out: dict[str, list[str]] = {}
        self._entries = 0

    def take(self, *, whole: bool) -> SideFiles:
        if whole:
            self._modules = _modules(self._root / "modules.json")
            self._folder(self._root, "")
        else:
            for entry in self._sorted(self._root):
                if is_known(entry.name) and not is_weights(entry.name) and entry.is_file():
                    self._file(entry.path, entry.name)
        files: dict[str, Path] = {}
        nbytes = 0
        # The smallest first: a folder of too much loses its data and keeps its configs.
        for name, (place, size) in sorted(self._found.items(), key=lambda item: item[1][1]):
            if size > MAX_FILE_BYTES:
                self._leave(name, f"files of more than {MAX_FILE_BYTES >> 20} MiB")
            elif nbytes + size > MAX_TOTAL_BYTES:
                self._leave(name, f"more than {MAX_TOTAL_BYTES >> 30} GiB in all")
            else:
                files[name] = place
                nbytes += size
        notes = [
            f"left out of what lies beside the weights of {self._root.name} ({why}): {_some(names)}"
            for why, names in self._left_out.items()
        ]
        modules = sorted({n.split("/")[0] for n in files if is_weights(n.rpartition("/")[2])})
        if modules:
            notes.append(
                f"the weights in {_some([f'{name}/' for name in modules])} are copied as they are, "
                "not merged"
            )
        found = SideFiles(sorted(files.items()))
        found.notes = tuple(notes)
        return found

    def _sorted(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                self._entries += entry.name not in self._weights  # 10 000 shards are a model's
                if self._entries > MAX_ENTRIES:
                    raise ModelError(
                        f"{self._root}: more than {MAX_ENTRIES} files beside the weights; give "
                        "the model a folder of its own"
                    )
                yield entry

    def _folder(self, folder: Path, prefix: str) -> None:
        for entry in self._sorted(folder):
            name = prefix + entry.name
            if is_silent(entry.name) or (not prefix and name in OURS):
                continue
            if entry.name.startswith("."):
                self._leave(name, "hidden")
            elif not entry.name.isprintable():  # control characters, or bytes that are not UTF-8
                self._leave(name, "names that cannot be shown")
            elif entry.is_dir():
                self._subfolder(entry, name)
            elif is_weights(entry.name) and not self._of_module(name):
                own = name in self._weights if self._weights else name.endswith(".safetensors")
                if not own and (entry.name == "adapter_config.json" or ".index." not in name):
                    self._leave(name, "weights in another form")
            else:
                self._file(entry.path, name)

    def _subfolder(self, entry: os.DirEntry[str], name: str) -> None:
        if entry.is_symlink():
            self._home.inside(entry.path)
            self._leave(f"{name}/", "links to folders")
        elif name in OTHER_FORMATS or is_weights(entry.name):  # a shard's name is the output's
            self._leave(f"{name}/", "weights in another form")
        elif name.count("/") >= MAX_DEPTH:
            self._leave(f"{name}/", f"folders more than {MAX_DEPTH} deep")
        elif not self._of_module(f"{name}/") and any(
            is_weights(inner) for inner in os.listdir(entry.path)
        ):
            self._leave(f"{name}/", "models of their own")
        else:
            self._folder(Path(entry.path), f"{name}/")

    def _of_module(self, name: str) -> bool:
        """Whether it lies in the folder of a module. What lies beside the model's own weights would
        take their place: an adapter_config.json there sends loaders to another base.
        """
        folder, inner, _ = name.partition("/")
        return bool(inner) and folder in self._modules

    def _file(self, path: str, name: str) -> None:
        place = self._home.inside(path)
        with open_regular(place) as file:
            self._found[name] = place, os.fstat(file.fileno()).st_size

    def _leave(self, name: str, why: str) -> None:
        self._left_out.setdefault(why, []).append(name)


def _modules(path: Path) -> set[str]:
    """The folders that sentence-transformers' modules.json makes part of the model."""
    if not path.is_file():
        return set()
    with open_regular(path) as file:
        text = file.read(MAX_MODULES_BYTES)
    try:
        modules: Any = json.loads(text)
    except (ValueError, RecursionError):
        return set()  # it is copied as it is: what it means is its readers' business
    listed = modules if isinstance(modules, list) else []
    paths = [module.get("path") for module in listed if isinstance(module, dict)]
    return {path.split("/")[0] for path in paths if isinstance(path, str) and path}


def _some(names: list[str]) -> str:
    """At most five of them, then a count."""
    return some_of([show(name)[1:-1] for name in names], 5)
