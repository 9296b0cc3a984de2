"""Packages whose names load when they are first used, so that start-up pays for none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def loading(package: str, homes: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``: names of ``homes`` are taken from those modules, every
    other name is that of a module below the package.
    """
    homes = homes or {}

    def load(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        module = f"{package}.{name}"
        if not name.startswith("__"):
            try:
                return import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:  # the module is there, and what it needs is not
                    raise
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return load
