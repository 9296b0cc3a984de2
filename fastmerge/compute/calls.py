"""The calls behind `fastmerge.ops`: at once, or written down where torch records a program."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from fastmerge.compute import combining, of_tensors

C = TypeVar("C", bound=Callable[..., Any])


def is_recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording this call: a kernel that
    ran now would leave its numbers, or uninitialised memory, in every later run.
    """
    torch = sys.modules.get("torch")
    compiler, jit = getattr(torch, "compiler", None), getattr(torch, "jit", None)
    if compiler is None or jit is None:  # not imported, or not yet to the end
        return False
    return bool(compiler.is_compiling() or jit.is_tracing())


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
