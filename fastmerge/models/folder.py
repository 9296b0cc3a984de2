"""Which files of a folder are a model's weights."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastmerge.errors import FastmergeError, ModelError, UnsupportedError, argument
from fastmerge.limits import MAX_HEADER_BYTES
from fastmerge.models.header import Header, read_object, show
from fastmerge.models.links import Home
from fastmerge.models.names import is_of_optimizer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DISTRIBUTED_INDEX = ".metadata"  # of PyTorch's distributed checkpoints


# --- finding the files ---


def find_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    index, single = folder / INDEX, folder / SINGLE
    home = Home(folder)
    if index.exists():
        weight_map = _read_weight_map(index, home.inside(index))
        names = sorted(set(weight_map.values()))
        if single.exists() and names != [SINGLE]:
            raise ModelError(
                f"{folder}: has both {SINGLE} and {INDEX} for other files; remove the stale one"
            )
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise ModelError(f"{index}: shard {show(name)} lies outside the folder")
            if not (folder / name).exists():
                raise ModelError(
                    f"{index}: shard {show(name)} is missing; download or copy it again"
                )
            home.inside(folder / name)
        return tuple(folder / name for name in names), weight_map
    if single.exists():
        home.inside(single)
        return (single,), None
    raise _none_in(folder)


def _none_in(folder: Path) -> FastmergeError:
    """Why there are no weights of a model, by what is there instead."""
    single = folder / SINGLE
    if single.is_symlink():
        return ModelError(f"{single}: a link to nothing ({os.readlink(single)}); mend the link")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if any("-of-" in name for name in others):
        return ModelError(f"{folder}: has shards but no {INDEX}; download or copy it again")
    if any((folder / f"adapter_model.{kind}").exists() for kind in ("safetensors", "bin")):
        return UnsupportedError(
            f"{folder}: a LoRA adapter, not a model; name it behind its base: BASE+{folder}"
        )
    if others:
        return ModelError(f"{folder}: no {SINGLE}; to use {others[0]}, name that file itself")
    pickled = sorted(
        file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}")
    )
    if pickled:
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({str(folder)!r}, dtype='auto')"
            f".save_pretrained({f'{folder}-safe'!r}, safe_serialization=True)"
        )
        return UnsupportedError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code; convert, on a "
            f"machine that you can lose: "
            f"python -c {shlex.quote(code)}"
        )
    if any(folder.glob("*.gguf")):
        return UnsupportedError(
            f"{folder}: GGUF files, which are quantised; get the safetensors ones"
        )
    if any(folder.glob("*.distcp")):
        return ModelError(
            f"{folder}: a PyTorch distributed checkpoint without its {DISTRIBUTED_INDEX}: either "
            "its save did not end, or a copy left out the hidden file"
        )
    inner = (folder / "snapshots", folder) if folder.name.startswith("models--") else (folder,)
    within = sorted(file.parent for at in inner for file in at.glob(f"*/{SINGLE[:5]}*.safetensors"))
    hint = f"; the model is in {within[0]}: give that" if within else ""
    several = len(set(within))
    if several > 1 and inner == (folder,):
        hint = (
            f"; {several} models are in it, as {within[0]}: give one (`average` has "
            f"{argument('pattern')})"
        )
    return ModelError(f"{folder}: no {SINGLE} or {INDEX} in it{hint}")


def find_distributed(path: Path) -> Path | None:
    """The folder of a PyTorch distributed checkpoint: ``path``, or, as accelerate writes it, the
    one folder in it with an index that is not the optimizer's. None where there is none, or where
    safetensors lie beside it.
    """
    if not path.is_dir() or (path / SINGLE).exists() or (path / INDEX).exists():
        return None
    if (path / DISTRIBUTED_INDEX).is_file():
        return path
    within = sorted(file.parent for file in path.glob(f"*/{DISTRIBUTED_INDEX}"))
    weights = [folder for folder in within if not is_of_optimizer(folder.name)]
    return weights[0] if len(weights) == 1 else None


def _read_weight_map(index: Path, place: Path) -> dict[str, str]:
    try:
        return weight_map_of(read_object(index, place, strict=True, max_bytes=MAX_HEADER_BYTES))
    except ValueError as error:
        raise ModelError(f"{index}: {error}") from None


def weight_map_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The file of each tensor, by an index; ValueError where it has none."""
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("has no 'weight_map'")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise ValueError(f"tensor {show(name)} has no shard name")
    return weight_map


def check_index(
    index: Path, weight_map: Mapping[str, str], files: tuple[Path, ...], headers: Iterable[Header]
) -> None:
    missing = dict(weight_map)
    for file, header in zip(files, headers, strict=True):
        shard = file.relative_to(index.parent).as_posix()
        for info in header.tensors:
            place = missing.pop(info.name, None)
            if place == shard:
                continue
            place = weight_map.get(info.name)
            where = (
                f"but the index places it in '{place}'"
                if place
                else "but the index does not list it"
            )
            raise ModelError(
                f"{file}: has tensor {show(info.name)}, {where}; one of the two is stale"
            )
    for name, shard in missing.items():
        raise ModelError(f"{index}: tensor {show(name)} is not in its shard '{shard}'")
