"""Checkpoints of one training: which of them a pattern means, in which order, how each counts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fastmerge.errors import FastmergeError, ModelError, UnsupportedError, argument
from fastmerge.models.header import show
from fastmerge.models.hub import is_remote

_NUMBER = re.compile(r"(\d+)", re.ASCII)


def natural(name: str) -> tuple[int | str, ...]:
    """A key that sorts ``checkpoint-200`` before ``checkpoint-1000``."""
    parts = _NUMBER.split(name)  # text and digits in turn: like is compared with like
    return tuple(int(part) if at % 2 else part for at, part in enumerate(parts))


def find_series(folder_name: str, pattern: str) -> list[Path]:
    """The folders and .safetensors files in a folder whose names fit ``pattern`` (``*``, ``?``,
    ``[...]``), in natural order. Raises ModelError where there are none.
    """
    if "/" in pattern or not pattern:
        raise FastmergeError(
            f"pattern: {show(pattern)} is no pattern of names; give the folder before it as a model"
        )
    if is_remote(folder_name):
        raise UnsupportedError(
            f"{folder_name}: {argument('pattern')} looks into folders of this machine; give the "
            "URL of each model"
        )
    folder = Path(folder_name)
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and (entry.is_dir() or entry.name.endswith(".safetensors"))
            ]
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror or error})") from error
    found = sorted((name for name in names if fnmatchcase(name, pattern)), key=natural)
    if not found:
        there = ", ".join(show(name)[1:-1] for name in sorted(names, key=natural)[:5])
        raise ModelError(
            f"{folder}: no model in it is called {show(pattern)}; it has {there or 'none'}"
        )
    return [folder / name for name in found]


def check_order(names: Sequence[str]) -> None:
    """Raises FastmergeError where the order is a shell's, by letters, and not that of the numbers:
    whoever asks for the last ones does not mean checkpoint-900 of 1000.
    """
    plain = sorted(names, key=natural)
    if list(names) == sorted(names) and list(names) != plain:
        at = next(i for i, name in enumerate(names) if name != plain[i])
        raise FastmergeError(
            f"the order of the models counts, and {show(names[at])} comes before {show(plain[at])} "
            f"here, as a shell lists them; give their folder and {argument('pattern')}, which goes "
            "by the numbers"
        )


def check_series(names: Sequence[str]) -> None:
    """Raises FastmergeError where names differ in more than their numbers: whoever asks for the
    last of checkpoint-100, checkpoint-200 and checkpoint-best does not mean the one that letters
    put there.
    """
    shapes: dict[str, list[str]] = {}
    for name in map(os.path.basename, names):
        shapes.setdefault(_NUMBER.sub("0", name), []).append(name)
    if len(shapes) > 1:
        most, *others = sorted(shapes.values(), key=len, reverse=True)
        raise FastmergeError(
            f"the order of the models counts, and {show(others[0][0])} has no place by its number "
            f"among those called as {show(most[0])}; narrow {argument('pattern')} to one kind, or "
            "name the models in their order"
        )


def ema_weights(decay: float, count: int) -> list[float]:
    """How each of ``count`` models in order counts in m_i = decay m_{i-1} + (1 - decay) x_i, which
    begins at m_0 = x_0: decay^(n-1) for the first, (1 - decay) decay^(n-1-i) for the others.
    """
    later = [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    return [decay ** (count - 1), *later]
