"""Models that programs make, held to the protocol before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fastmerge.dtypes import BY_CODE, DType
from fastmerge.errors import FastmergeError, brief, is_whole
from fastmerge.models.model import Model, TensorInfo

_METHODS = ("view", "prefetch", "drop", "check_unchanged", "side_files")
_ABSENT = object()


def held_to_protocol(source: Any, label: str) -> Model:
    """``source`` as a `Model`; FastmergeError, which names the member and what it must be, where
    one is missing or of another type. ``fingerprint`` is not asked for: it may take long.
    """

    def wrong(member: str, must: str, value: Any) -> NoReturn:
        said = "is missing" if value is _ABSENT else f"is {brief(value)}"
        raise FastmergeError(
            f"{label}: {type(source).__name__}.{member} {said}; it must be {must} "
            "(help(fastmerge.models.model.Model) has every member)"
        )

    def check(member: str, must: str, fits: Callable[[Any], bool]) -> Any:
        value = getattr(source, member, _ABSENT)
        if value is _ABSENT or not fits(value):
            wrong(member, must, value)
        return value

    for name in _METHODS:
        check(name, "a method", callable)
    check("label", "text", lambda v: isinstance(v, str))
    check("config", "a mapping, config.json's", lambda v: isinstance(v, Mapping))
    check("stamp", "a tuple of what can be hashed", _is_stamp)
    check("folder", "a pathlib.Path or None", lambda v: v is None or isinstance(v, Path))
    check("places", "a tuple of pathlib.Path", _are_paths)
    tensors = check("tensors", "a mapping of names to TensorInfo", lambda v: isinstance(v, Mapping))
    for name, info in tensors.items():
        where = f"tensors[{brief(name)}]"
        if not isinstance(info, TensorInfo):
            wrong(where, "a fastmerge.models.model.TensorInfo", info)
        if not isinstance(name, str) or info.name != name:
            wrong(f"{where}.name", "text, the name that it is found by", info.name)
        if not isinstance(info.dtype, DType):
            codes = ", ".join(BY_CODE)
            wrong(f"{where}.dtype", f"one of fastmerge.dtypes.BY_CODE ({codes})", info.dtype)
        if not isinstance(info.shape, tuple) or not all(is_whole(n) and n >= 0 for n in info.shape):
            wrong(f"{where}.shape", "a tuple of whole numbers", info.shape)
        count = math.prod(info.shape)
        if info.count != count:
            wrong(f"{where}.count", f"{count}, the elements of shape {info.shape}", info.count)
        nbytes = info.dtype.bytes_for(count)
        if info.nbytes != nbytes:
            wrong(f"{where}.nbytes", f"{nbytes}, of {count} {info.dtype.name}", info.nbytes)
    files = source.side_files()
    if not isinstance(files, Mapping) or not all(
        isinstance(file, (bytes, Path)) for file in files.values()
    ):
        wrong("side_files()", "a mapping of names to bytes or pathlib.Path", files)
    model: Model = source
    return model


def _is_stamp(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, Hashable) for each in value)


def _are_paths(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, Path) for each in value)
