"""Modules that users write, run as they were read: what runs is what is hashed."""

from __future__ import annotations

import os
import sys
from importlib import import_module, invalidate_caches
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import decode_source
from pathlib import Path
from typing import Any

LIBRARY = Path(os.__file__).parent
INSTALLED = {"site-packages", "dist-packages"}


class _Loader(SourceFileLoader):
    """Compiles the text that it notes. Never the bytecode that Python keeps: after an edit within
    the same second, to a text of the same length, that is still the old text's.
    """

    def __init__(self, name: str, path: str, texts: dict[str, str]) -> None:
        super().__init__(name, path)
        self._texts = texts

    def get_code(self, fullname: str) -> Any:  # noqa: ARG002
        data = self.get_data(self.path)
        code = self.source_to_code(data, self.path)
        self._texts[self.path] = decode_source(data)
        return code


class AsRead:
    """One module of a user's, and those beside it or in ``folder`` that it imports.

    A context, inside which such modules run as they are read; ``texts`` holds them by file.
    """

    def __init__(self, module: str, folder: Path) -> None:
        self.texts: dict[str, str] = {}
        self._module = module
        self._beside = folder.resolve()
        self._folders = {self._beside}

    def load(self) -> Any:
        """The module, anew: what somebody imported before may be another text than the file's."""
        for name, module in list(sys.modules.items()):
            loader = getattr(getattr(module, "__spec__", None), "loader", None)
            if isinstance(loader, _Loader) or (name == self._module and self._is_own(name, loader)):
                del sys.modules[name]  # a reload would keep what is no longer there
        invalidate_caches()
        with self:
            return import_module(self._module)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """What Python's own way of finding modules finds, with another loader where it is ours."""
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if type(spec.loader) is SourceFileLoader:
            if f"{self._module}.".startswith(f"{name}."):  # it, or a package that it is in
                self._folders.add(Path(spec.loader.path).resolve().parent)
            if self._is_own(name, spec.loader):
                spec.loader = _Loader(name, spec.loader.path, self.texts)
            elif name != self._module and path is None:
                self._check_near(name, Path(spec.loader.path).resolve())
        return spec

    def _check_near(self, name: str, file: Path) -> None:
        """Refuses another folder's module where one of that name lies beside the schedule."""
        near = [self._beside / f"{name}{end}" for end in (".py", "/__init__.py")]
        others = [one for one in near if one.is_file() and one.resolve() != file]
        if others and LIBRARY not in file.parents and INSTALLED.isdisjoint(file.parts):
            raise ImportError(
                f"'{name}' lies beside the schedule, and another one comes first ({file}); rename "
                "one of them"
            )

    def _is_own(self, name: str, loader: Any) -> bool:
        """Whether a module is the user's, and not the library's or an installed one's."""
        if type(loader) is not SourceFileLoader or name.partition(".")[0] == "fastmerge":
            return False
        file = Path(loader.path).resolve()
        is_installed = not INSTALLED.isdisjoint(file.parts)
        if name == self._module:
            return is_installed or LIBRARY not in file.parents
        return not is_installed and not self._folders.isdisjoint(file.parents)

    def __enter__(self) -> AsRead:
        sys.meta_path.insert(sys.meta_path.index(PathFinder), self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(self)
