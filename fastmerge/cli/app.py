"""The typer application, how a command reports a mistake, and the options that several commands
share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from fastmerge.cli.console import put, say
from fastmerge.errors import FastmergeError
from fastmerge.version import __version__

MISTAKE, INTERRUPTED = 2, 130  # exit codes; 130 = 128 + SIGINT, as shells have it

app = typer.Typer(
    name="fastmerge",
    help="Merge the weights of language models at the speed of memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

F = TypeVar("F", bound=Callable[..., None])


def command(function: F) -> F:
    """Registers ``function`` as a command that words its user's mistakes in one line."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except FastmergeError as error:
            fail(str(error), MISTAKE)
        except BrokenPipeError:  # `fastmerge methods | head`: typer ends quietly
            raise
        except OSError as error:  # what no layer could foresee: a full disk, a vanished mount
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", MISTAKE)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)

    app.command()(run)
    return function


def fail(message: str, code: int) -> NoReturn:
    say(f"error: {' '.join(message.split())}")
    raise typer.Exit(code)


RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe in mergekit's YAML.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Worker threads; without it FASTMERGE_NUM_THREADS, else every CPU."),
]
Seed = Annotated[
    int | None, typer.Option(help="For random methods, instead of the recipe's own.", min=0)
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        put(f"fastmerge {__version__}")
        raise typer.Exit
