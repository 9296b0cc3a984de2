"""What a user's mistake raises: one class for each thing that can be at fault.

    FastmergeError
    ├── RecipeError       what is asked for: a recipe, a schedule, a method's parameter
    ├── ModelError        a model: files missing, damaged, changed; models that do not fit
    ├── UnsupportedError  understood and in order, but not done (here): a LoRA, a quantised model
    ├── OutputError       where the result goes: it exists, is an input, cannot be written
    └── ResourceError     what the machine lacks: memory, disk space, threads, a GPU, a package

FastmergeError itself is raised for an argument of a Python call that is none of these. Every
message is one line that names the file, tensor or key at fault and the fix. The command line prints
it and exits with code 2; anything else that escapes is a defect in fastmerge. Callers catch
classes; no message is promised to stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from numbers import Integral
from pathlib import PurePath
from reprlib import Repr
from typing import Any

_BEGINNING, _END = 1000, 500  # characters of a message that are always shown
_OF_A_KIND = 5
_VARIES = re.compile(r"'[^']*'|\d+")

# What code that a user brings along may raise; an exit of its own would end the command without a
# word. Ctrl-C is none of it.
FOREIGN = (Exception, SystemExit)


class FastmergeError(Exception):
    """Bad input or an impossible request; the message is one line and names the remedy.

    Every class is made from the message alone, so that an error can be pickled, and raised again as
    ``type(error)(f"{where}: {error}")``.
    """

    def __init__(self, message: str) -> None:
        # What Exception's own __init__ does, which torch.compile cannot trace: it told of that.
        self.args = (shortened(printable(message)),)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook: the one line, as on the command line."""
        return [f"{type(self).__name__}: {self}"]


class RecipeError(FastmergeError):
    """A recipe or schedule, an evaluation's settings, or a method's name or parameter: its words,
    its values, or how they go together.
    """


class ModelError(FastmergeError):
    """A model's files are missing, unreadable, malformed or changed, or models are not of one
    architecture.
    """


class UnsupportedError(FastmergeError):
    """Understood, and nothing is wrong with it, but fastmerge or this device does not do it."""


class OutputError(FastmergeError):
    """The folder to write, or what an earlier run left in it, stands in the way."""


class ResourceError(FastmergeError):
    """The machine lacks memory, disk space, threads, a GPU or an installed package."""


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Says a MemoryError, Python's or a std::bad_alloc of the kernels, as a ResourceError. For
    ``with`` and as a decorator of public functions.
    """
    try:
        yield
    except MemoryError as error:
        raise ResourceError(
            f"{what}: the system has no more memory; give a lower memory limit and fewer threads, "
            "or end other programs"
        ) from error


_commanded = False  # whether a command line is being run


@contextmanager
def command_line() -> Iterator[None]:
    """Within it, `argument` says options: whoever reads the messages wrote a command."""
    global _commanded
    before, _commanded = _commanded, True
    try:
        yield
    finally:
        _commanded = before


def argument(name: str, value: object = None) -> str:
    """A public function's argument as its caller writes it: ``memory_limit``, ``device='cpu'``,
    ``overwrite=True`` and ``evaluate=False`` in Python; ``--memory-limit``, ``--device cpu``,
    ``--overwrite`` and ``--no-evaluate`` in a command.
    """
    if not _commanded:
        return name if value is None else f"{name}={value!r}"
    option = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
    return option if value is None or isinstance(value, bool) else f"{option} {value}"


@contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Within it, errors of a recipe that a function made are in its caller's words: ``words`` has
    what to say for each regular expression.
    """
    try:
        yield
    except FastmergeError as error:
        said = str(error)
        for pattern, own in words.items():
            said = re.sub(pattern, own, said)
        if said == str(error):
            raise
        raise type(error)(said) from error.__cause__


# Of recipes that hold models alone.
MODELS_ALONE = {r"^recipe\.models\[\d+\]\.model: ": ""}


def printable(text: str) -> str:
    """One line that a terminal shows as it is: file and tensor names are other people's, and no
    line break, escape sequence or change of direction gets through.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(message: str) -> str:
    """The message without the middle of a megabyte that somebody wrote for a value: the place is
    at its beginning, the remedy at its end.
    """
    left = len(message) - _BEGINNING - _END
    if left <= 100:
        return message
    return f"{message[:_BEGINNING]} ... ({left} characters) ... {message[-_END:]}"


def few_of_a_kind(notes: Iterable[str]) -> tuple[str, ...]:
    """The notes, `shortened`, at most five that differ in numbers and quoted names alone, then a
    count.
    """
    kinds: dict[str, list[str]] = {}
    for note in map(shortened, notes):
        kinds.setdefault(_VARIES.sub("...", note), []).append(note)
    found: list[str] = []
    for kind, same in kinds.items():
        found += same[:_OF_A_KIND]
        if len(same) > _OF_A_KIND:
            found.append(f"{len(same) - _OF_A_KIND} more of the kind: {kind}")
    return tuple(found)


def some_of(names: Sequence[str], shown: int = 1) -> str:
    """The first ``shown`` names, and how many more there are: "a, b and 3 more"."""
    left = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {left} more" if left > 0 else "")


def and_others(count: int) -> str:
    """What follows the first of ``count``: " (and 3 more)"; nothing where it is the only one."""
    return f" (and {count - 1} more)" if count > 1 else ""


def first_line(error: Exception) -> str:
    """Another library's message up to its first line's end; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_sentences(text: str, limit: int = 200) -> str:
    """The first line of another library's message: as many whole sentences as ``limit`` characters
    hold, or, where the first is longer, its whole words and an ellipsis.
    """
    line = (text.strip().splitlines() or [""])[0]
    if len(line) <= limit:
        return line
    end = line.rfind(". ", 0, limit)
    return line[: end + 1] if end > 0 else line[:limit].rsplit(" ", 1)[0] + " ..."


def nearest(word: str, known: object, *, limit: int = 12) -> str:
    """A hint for an unknown ``word``: the nearest known one, else the first ``limit`` of them."""
    import difflib

    word = str(word)  # of a mapping that a program made, a key may be a number
    names = sorted(str(name) for name in known)  # type: ignore[attr-defined]
    plain = {plain_word(name): name for name in reversed(names)}
    close = difflib.get_close_matches(plain_word(word), plain, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{plain[close[0]]}'?"
    return f"known: {', '.join(names[:limit])}{', ...' if len(names) > limit else ''}"


def near_miss(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` is most likely a misspelling of; None for a word of its
    own. Five letters of six agree: 'lamda' and 'Base-Model' do, 'target_model' and 'base_model'
    do not.
    """
    import difflib

    plain = {plain_word(name): name for name in known}
    close = difflib.get_close_matches(plain_word(word), plain, n=1, cutoff=0.8)
    return plain[close[0]] if close else None


def plain_word(word: str) -> str:
    """A word without what people vary: case, and what stands between its parts."""
    return word.lower().replace("-", "_").replace(" ", "_")


class _Brief(Repr):
    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > _WRITTEN_BITS:
            return f"a number of {value.bit_length()} bits"
        return super().repr_int(value, level)


_BRIEF = _Brief()
_WRITTEN_BITS = 10_000  # Python refuses to write numbers of more than 4300 digits
_BRIEFEST = 160  # characters: of six lists of six numbers each there are 800
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60


def brief(value: Any) -> str:
    """``repr(value)`` on one short line, however long, deep or circular the value is."""
    text = " ".join(_BRIEF.repr(value).split())
    return text if len(text) <= _BRIEFEST else f"{text[:_BRIEFEST]} ..."


def in_a_line(thing: Any, *names: str) -> str:
    """A ``__repr__`` of one line: the attributes ``names``, of collections how many are in them."""

    def said(value: Any) -> str:
        if isinstance(value, Sized) and not isinstance(value, str):
            return f"<{len(value)}>"
        return brief(str(value) if isinstance(value, PurePath) else value)

    shown = ", ".join(f"{name}={said(getattr(thing, name))}" for name in names)
    return f"{type(thing).__name__}({shown})"


def is_whole(value: Any) -> bool:
    """Whether it is an integer: Python's or NumPy's, but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
