"""The calls behind `fastmerge.ops`: at once, or written down where torch records a program."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from fastmerge.compute import combining, of_tensors
from fastmerge.compute.recording import is_recorded

C = TypeVar("C", bound=Callable[..., Any])


def _recordable(call: C) -> C:
    """The same call, which torch records as one of its operators."""
    name = call.__name__

    @wraps(call)
    def either(*args: Any, **kwargs: Any) -> Any:
        if is_recorded():
            from fastmerge.compute import torch_library

            return getattr(torch_library, name)(*args, **kwargs)
        return call(*args, **kwargs)

    either.__module__ = __name__  # where pickle finds it
    return cast(C, either)


merge = _recordable(of_tensors.merge)
combine = _recordable(combining.combine)
gram = _recordable(combining.gram)
