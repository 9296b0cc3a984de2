"""What shows that a user's function has changed, so that its kept scores are not taken for another.

A function of a file is its file's text, its own code (two lambdas of a file may differ by a number)
and the plain values that it reads. One without a file, of `python -`, of `exec` or of a notebook,
is its code and all that it reads: other functions, data, modules. What hides its contents there
leaves the identity unknown, which a resumed run refuses.
"""

from __future__ import annotations

import dis
import functools
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from fastmerge.evaluation.as_read import INSTALLED, LIBRARY
from fastmerge.evaluation.journal import digest

MAIN = ("__main__", "__mp_main__")  # a script, and the same where a process was spawned for it
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass(frozen=True)
class Identity:
    """``parts``: what differs where the function does; ``unknown``: what it reads and nothing shows
    the contents of, "" where there is none.
    """

    parts: list[str]
    unknown: str


def identity_of(function: Any, texts: Mapping[str, str]) -> Identity:
    """The identity of something that can be called; ``texts``: files whose texts are the whole
    truth, as they were read.
    """
    walk = _Walk(function, texts)
    walk.go()
    return Identity(walk.found, walk.unknown)


class _Walk:
    def __init__(self, function: Any, texts: Mapping[str, str]) -> None:
        self.found: list[str] = []
        self.unknown = ""
        self._function, self._texts = function, texts
        self._seen: dict[int, Any] = {}  # with the objects, so that no other gets an id of theirs
        # What is still to be looked at, and whether a text says how it was made.
        self._left: list[tuple[Any, bool]] = [(function, _file_of(function) is not None)]

    def go(self) -> None:
        while self._left:
            value, told = self._left.pop()
            if isinstance(value, (*_PLAIN, np.generic, Path)):
                self.found.append(repr(value))
            elif id(value) not in self._seen:
                self._seen[id(value)] = value
                self._look(value, told)

    def _add(self, told: bool, *values: Any) -> None:
        self._left += [(value, told) for value in values]

    def _look(self, value: Any, told: bool) -> None:
        if isinstance(value, (list, tuple)):
            self._add(told, "]", *value, f"[{len(value)}")
        elif isinstance(value, (set, frozenset)):
            self.found.append(repr(sorted(map(repr, value))))
        elif isinstance(value, np.ndarray):
            self.found.append(digest([value.dtype.str, value.shape, value.tobytes().hex()]))
        elif isinstance(value, dict):
            self._add(told, "]", *(x for pair in value.items() for x in pair), f"[{len(value)}")
        elif isinstance(value, functools.partial):
            self._add(told, value.func, value.args, value.keywords)
        elif inspect.ismethod(value):
            own = value.__self__
            self._add(told, value.__func__, *([own] if inspect.isclass(own) else _attributes(own)))
        elif isinstance(value, FunctionType):
            self._function_of(value)
        elif isinstance(value, CodeType):
            self._code(value)
        elif isinstance(value, type):
            self.found += [_module_of(value), value.__qualname__]
            self._of_class(value)
        elif value is self._function and not isinstance(value, BuiltinFunctionType):
            self.found += [type(value).__qualname__, _text_of(type(value), self._texts)]
            self._of_class(type(value))
            self._add(told, *_attributes(value))
        elif not told:
            self._untold(value)

    def _function_of(self, value: FunctionType) -> None:
        file = _file_of(value)
        told = file is not None
        self.found += [value.__qualname__, _text_of(value, self._texts)]
        self._add(told, value.__defaults__, value.__kwdefaults__)
        self._add(told, getattr(value, "__wrapped__", None))
        cells = [cell for cell in value.__closure__ or () if _is_filled(cell)]
        self._add(told, *(cell.cell_contents for cell in cells))
        if _is_installed(file) or str(file) in self._texts:
            return
        self._add(told, value.__code__)
        for name in sorted(set(_globals_of(value.__code__))):
            read = value.__globals__.get(name)
            if name in value.__globals__ and (not told or isinstance(read, _PLAIN)):
                self._add(told, read, name)

    def _code(self, code: CodeType) -> None:
        self.found += [code.co_code.hex(), repr(code.co_names)]
        for constant in code.co_consts:
            if isinstance(constant, (CodeType, frozenset)):
                self._add(True, constant)
            else:
                self.found.append(repr(constant))

    def _of_class(self, kind: type) -> None:
        """A class: its file's text and its functions; where it has no file, all its body made."""
        file = _file_of(kind)
        if kind is object or _is_installed(file) or str(file) in self._texts:
            return
        if file is not None:
            self.found.append(_text_of(kind, self._texts))
        for name, value in vars(kind).items():
            inner = [getattr(value, part, None) for part in ("fget", "fset", "__func__")]
            made = [x for x in inner if x is not None] or [value]
            if isinstance(made[0], FunctionType) or (file is None and name not in _OF_EVERY_CLASS):
                self._add(file is not None, *made, name)
        self._add(file is not None, *kind.__bases__)

    def _untold(self, value: Any) -> None:
        """What a function without a file reads."""
        if isinstance(value, ModuleType):
            self.found.append(value.__name__)
            file = getattr(value, "__file__", None)
            if file and not _is_installed(Path(file)):
                self.found.append(_read(Path(file)))
            return
        kind = type(value)
        package = kind.__module__.partition(".")[0]
        self.found += [_module_of(kind), kind.__qualname__]
        if isinstance(value, BuiltinFunctionType):
            self.found.append(value.__qualname__)
            if not isinstance(value.__self__, (ModuleType, type)):
                self._add(False, value.__self__)
        elif getattr(value, "__wrapped__", None) is not None:  # functools.cache and the like
            self._add(False, value.__wrapped__)
        elif package == "torch" and hasattr(value, "detach"):
            self.found.append(digest([str(value.dtype), value.detach().cpu().tolist()]))
        elif package in sys.stdlib_module_names or kind.__name__ in _WORDS:
            self._said(value)
        elif kind.__flags__ & _HEAP and not _is_installed(_file_of(kind)):
            self._of_class(kind)
            self._add(False, *_attributes(value))
        else:
            self._hidden(value)

    def _said(self, value: Any) -> None:
        """A value of a library whose words say all, unless they only say where it lies."""
        if " at 0x" in repr(value):
            self._hidden(value)
        self.found.append(repr(value))

    def _hidden(self, value: Any) -> None:
        name = getattr(value, "__name__", "")
        self.unknown = self.unknown or f"{type(value).__name__}{f' {name}' if name else ''}"


_WORDS = ("dtype", "device", "Size")  # of numpy and torch: what they say is what they are
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class statement made it
_OF_EVERY_CLASS = {
    "__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__",
    "__abstractmethods__", "_abc_impl",
}  # fmt: skip


def _module_of(kind: type) -> str:
    return "" if kind.__module__ in MAIN else kind.__module__


def _globals_of(code: CodeType) -> Iterator[str]:
    """The names that it, or a function inside, looks up in its module."""
    for line in dis.get_instructions(code):
        if line.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(line.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _attributes(thing: Any) -> list[Any]:
    return [] if inspect.isclass(thing) else list(getattr(thing, "__dict__", {}).items())


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _file_of(thing: Any) -> Path | None:
    """The file that defines it (for an object its class, for a partial its function); None for what
    was typed, or made by exec.
    """
    while isinstance(thing, functools.partial):
        thing = thing.func
    if not inspect.isroutine(thing) and not inspect.isclass(thing):
        thing = type(thing)
    if inspect.isclass(thing):
        # Of a class, inspect believes the module, which may be what executed it.
        files = {_file_of(x) for x in vars(thing).values() if isinstance(x, FunctionType)}
        if files:
            return min(files - {None}, key=str, default=None)
    try:
        name = inspect.getsourcefile(thing)
    except TypeError:  # built in
        return None
    return Path(name) if name and os.path.isfile(name) else None


def _is_installed(file: Path | None) -> bool:
    """Whether a file is the library's or of an installed package: no text that a user edits."""
    if file is None:
        return False
    installed = not INSTALLED.isdisjoint(file.parts) or LIBRARY in file.resolve().parents
    return installed or Path(__file__).parents[1] in file.parents


def _text_of(thing: Any, texts: Mapping[str, str]) -> str:
    """The text of the file that defines it; in a notebook its own; "" where there is none."""
    try:
        # Not getsource alone: it looks through decorators, which may close over something.
        name = inspect.getsourcefile(thing) or ""
        if name in texts:
            return texts[name]
        file = Path(name)
        return file.read_text("utf-8") if os.path.isfile(file) else inspect.getsource(thing)
    except (OSError, TypeError, UnicodeDecodeError):
        return ""  # built in, or made by exec


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
