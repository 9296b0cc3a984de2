"""Whether a program of torch's is being recorded; torch itself is not imported for the answer."""

from __future__ import annotations

import sys

from fastmerge.errors import UnsupportedError


def is_recorded() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or make_fx is recording this call: a
    kernel that ran now would leave its numbers, or uninitialised memory, in every later run.
    """
    return _is_compiled() or _keeps_constants()


def is_traced() -> bool:
    """Whether torch.jit.trace or make_fx is recording it, which let Python run and keep as
    constants what is no tensor of theirs.
    """
    return not _is_compiled() and _keeps_constants()


def _keeps_constants() -> bool:
    jit = getattr(sys.modules.get("torch"), "jit", None)
    if jit is None:
        return False
    if jit.is_tracing():
        return True
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    mode = getattr(proxies, "get_proxy_mode", None)
    return mode is not None and mode() is not None


def _is_compiled() -> bool:
    compiler = getattr(sys.modules.get("torch"), "compiler", None)
    return compiler is not None and bool(compiler.is_compiling())  # None: not imported to the end


def refuse_traces(where: str, instead: str) -> None:
    """Raises UnsupportedError where numbers made now would be constants of a trace."""
    if is_traced():
        raise UnsupportedError(
            f"{where}: torch.jit.trace and make_fx would keep its numbers as constants; {instead}"
        )
