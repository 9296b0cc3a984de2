"""The commands by name, how one is run and reports a mistake, and the options that several have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

from fastmerge.cli.console import pairs, put, say
from fastmerge.cli.options import Argument, Option, name_of, parse
from fastmerge.cli.streams import deliver
from fastmerge.errors import FastmergeError, command_line, enough_memory, nearest
from fastmerge.version import __version__

DIFFERS, MISTAKE = 1, 2  # exit codes: 1 as diff and cmp have it
PROGRAM = "fastmerge"
COMMANDS: dict[str, Callable[..., int | None]] = {}  # in the order of --help
# By command: other tools' flags, and what to write instead.
ELSEWHERE: dict[str, Mapping[str, str]] = {}
ABSENT: dict[str, str] = {}  # other tools' commands that are not there, and why

F = TypeVar("F", bound=Callable[..., "int | None"])


def command(function: F) -> F:
    """Registers ``function`` as the command of its name, dashes for underscores. What it returns is
    the exit code, 0 for None.
    """
    COMMANDS[name_of(function)] = function
    return function


@command_line()
def run(words: Sequence[str]) -> None:
    """Runs the command line ``words``; a user's mistake ends the process in one line."""
    first = words[0] if words else "--help"
    code = None
    try:
        if first == "--version":
            put(f"{PROGRAM} {__version__}")
        elif first in ("-h", "--help", "help") and not set(words[1:]) & COMMANDS.keys():
            _help()
        elif first == "help":
            parse(COMMANDS[next(word for word in words if word in COMMANDS)], ["--help"], PROGRAM)
        elif first in ABSENT:
            fail(f"{first}: {ABSENT[first]}", MISTAKE)
        elif first not in COMMANDS:
            known = ("--version", "--help") if first.startswith("-") else COMMANDS
            what = "option" if first.startswith("-") else "command"
            fail(f"no {what} '{first}'; {nearest(first, known, limit=len(COMMANDS))}", MISTAKE)
        else:
            function = COMMANDS[first]
            given = parse(function, words[1:], PROGRAM, ELSEWHERE.get(first))
            with enough_memory(first):
                code = function(**given)
        deliver()
    except FastmergeError as error:
        fail(str(error), MISTAKE)
    except BrokenPipeError:  # `fastmerge methods | head`: who read has enough
        raise SystemExit(1) from None
    except OSError as error:  # what no layer could foresee: a full disk, a vanished mount
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", MISTAKE)
    if not words:
        code = MISTAKE
    if code:
        raise SystemExit(code)


def fail(message: str, code: int) -> NoReturn:
    """Ends the process with ``code`` and one line on stderr."""
    say(f"error: {' '.join(message.split())}")
    raise SystemExit(code)


def _help() -> None:
    put(f"usage: {PROGRAM} [-h] [--version] COMMAND ...", "")
    put("Merge the weights of language models at the speed of memory.", "")
    pairs((f"  {name}", (command.__doc__ or "").strip()) for name, command in COMMANDS.items())
    put("", f"{PROGRAM} COMMAND --help says what a command takes.")


RecipePath = Annotated[Path, Argument(metavar="RECIPE", help="Recipe in mergekit's YAML.")]
Json = Annotated[bool, Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[
    bool, Option("--quiet", "-q", help="No progress, no summary, no notes; warnings stay.")
]
Threads = Annotated[
    int | None, Option(help="Worker threads; without it FASTMERGE_NUM_THREADS, else every CPU.")
]
Seed = Annotated[int | None, Option(help="For random methods, instead of the recipe's own.", min=0)]
