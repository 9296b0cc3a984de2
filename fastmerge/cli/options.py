"""Commands by argparse: a function's parameters are its arguments and options.

``name: Annotated[type, Option(...)] = default`` is ``--name``, required without a default, a bool a
switch, an Enum a choice; ``Argument(...)`` goes by its place, and may be left out where it has a
default; one of a list's type takes one word or more; ``**rest: Annotated[Any, T]`` has the
annotations of the class ``T`` as options. Only the
parser of the command that runs is made. typer, which reads such signatures too, takes as long to
start as a small merge: from 0.29 on it imports pydantic for every command.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from fastmerge.errors import FastmergeError, near_miss, shortened


class Argument:
    """What goes by its place: its ``help``, and its name there."""

    def __init__(self, *, help: str, metavar: str | None = None) -> None:  # noqa: A002
        self.help, self.metavar = help, metavar


class Option:
    """What goes by name: ``flags`` (by default the parameter's name), the smallest number taken;
    ``either``: a switch that has ``--no-name`` too; ``count``: a number, of how often it is given;
    ``many``: a list of texts, one for each time; ``several``: a list of them behind one flag.
    """

    def __init__(
        self,
        *flags: str,
        help: str,  # noqa: A002
        metavar: str | None = None,
        min: int | None = None,  # noqa: A002
        either: bool = False,
        count: bool = False,
        many: bool = False,
        several: bool = False,
    ) -> None:
        self.flags, self.help, self.metavar, self.min = flags, help, metavar, min
        self.either, self.count, self.many, self.several = either, count, many, several


class Parser(argparse.ArgumentParser):
    """argparse's, whose faults are one line, with the option that a misspelt one is nearest to."""

    def error(self, message: str) -> NoReturn:
        first, _, rest = message.partition("unrecognized arguments: ")
        flags = [word.partition("=")[0] for word in rest.split() if word.startswith("-")]
        known = self._option_string_actions
        close = near_miss(flags[0], known) if flags and not first else None
        hint = f"did you mean {close}?" if close else f"'{self.prog} --help' says what it takes"
        raise FastmergeError(f"{message}; {hint}")


def name_of(function: Callable[..., Any]) -> str:
    """What the command is called on the command line."""
    return function.__name__.replace("_", "-")


def parse(
    function: Callable[..., Any],
    words: Sequence[str],
    program: str,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The arguments of ``function`` in ``words``; raises FastmergeError where they are wrong, ends
    the process where they ask for help (exit code 0). ``elsewhere``: flags of other tools'
    commands, each with what to write instead.
    """
    parser = _parser(function, program)
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else word[:2]
        if flag in (elsewhere or {}):
            parser.error(f"{flag}: {(elsewhere or {})[flag]}")
    return vars(parser.parse_intermixed_args(words))


def flags_of(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """The options of a command, each with what may follow it; () where that is anything, or
    nothing.
    """
    found: dict[str, tuple[str, ...]] = {}
    for action in _parser(function, "")._actions:  # noqa: SLF001 (argparse has no other way)
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        choices = metavar[1:-1].split(",") if metavar.startswith("{") else []
        found |= {flag: tuple(choices) for flag in action.option_strings}
    return found


def choices_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """What the first argument of a command may be; () where that is anything."""
    for hint in get_type_hints(function, include_extras=True).values():
        kind, form = _kind_and_form(hint) if get_args(hint) else (None, None)
        if isinstance(form, Argument):
            if not (isinstance(kind, type) and issubclass(kind, Enum)):
                return ()
            return tuple(str(item.value) for item in kind)
    return ()


def _parser(function: Callable[..., Any], program: str) -> Parser:
    parser = Parser(
        prog=f"{program} {name_of(function)}",
        description=inspect.getdoc(function),
        allow_abbrev=False,
    )
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            _, rest = get_args(hints[name])
            for key, hint in get_type_hints(rest, include_extras=True).items():
                _add(parser, key, *_kind_and_form(hint), None)
            continue
        _add(parser, name, *_kind_and_form(hints[name]), parameter.default)
    return parser


def _kind_and_form(hint: Any) -> tuple[Any, Any]:
    """Of ``Annotated[kind, form]``, which Python 3.10 makes an Optional where the default is
    None.
    """
    if get_origin(hint) is Union:
        hint = next(part for part in get_args(hint) if part is not type(None))
    kind, form = get_args(hint)
    return kind, form


def _add(
    parser: argparse.ArgumentParser, name: str, kind: Any, form: Argument | Option, default: Any
) -> None:
    if isinstance(form, Argument) and get_origin(kind) is list:
        (kind,) = get_args(kind)
        parser.add_argument(
            name, type=kind, metavar=form.metavar or name.upper(), help=form.help, nargs="+"
        )
        return
    (kind,) = [part for part in get_args(kind) if part is not type(None)] or [kind]
    shown = default.value if isinstance(default, Enum) else default
    about = form.help.replace("%", "%%")
    if isinstance(form, Argument):
        optional = {} if default is inspect.Parameter.empty else {"nargs": "?", "default": default}
        reader = _reader(kind, None) if issubclass(kind, Enum) else kind
        parser.add_argument(
            name, type=reader, metavar=form.metavar or name.upper(), help=about, **optional
        )
        return
    flags = form.flags or (f"--{name.replace('_', '-')}",)
    required = default is inspect.Parameter.empty
    if kind is bool or form.count:
        action: Any = "count" if form.count else "store_true"
        if form.either:
            action = argparse.BooleanOptionalAction
        parser.add_argument(*flags, dest=name, action=action, default=default, help=about)
        return
    if form.many or form.several:
        how: dict[str, Any] = {"nargs": "+"} if form.several else {"action": "append"}
        parser.add_argument(
            *flags, dest=name, default=default, metavar=form.metavar, help=about, **how
        )
        return
    if shown is not None and not required:
        about += f" [default: {shown}]"
    metavar = form.metavar or ("N" if kind is int else name.upper())
    if issubclass(kind, Enum):
        metavar = f"{{{','.join(item.value for item in kind)}}}"
    parser.add_argument(
        *flags,
        dest=name,
        type=_reader(kind, form.min),
        default=None if required else default,
        required=required,
        metavar=metavar,
        help=about,
    )


def _reader(kind: type, least: int | None) -> Callable[[str], Any]:
    """``kind`` of a word, with a fault that says what is wanted."""

    def read(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            wanted = "a number" if kind is float else "a whole number"
            if issubclass(kind, Enum):
                wanted = f"one of {', '.join(item.value for item in kind)}"
            raise argparse.ArgumentTypeError(f"'{shortened(word)}' is not {wanted}") from None
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{word} is less than {least}")
        return value

    return read
