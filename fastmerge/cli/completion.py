"""``fastmerge completion``: what a shell reads to complete commands, options and their values."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from fastmerge.cli.app import COMMANDS, PROGRAM, command
from fastmerge.cli.console import put
from fastmerge.cli.options import Argument, choices_of, flags_of


class Shell(str, Enum):
    """Whose completion is written."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


@command
def completion(shell: Annotated[Shell, Argument(help="bash, zsh or fish.")]) -> None:
    """Print the completion of a SHELL: eval "$(fastmerge completion bash)"."""
    commands = {name: flags_of(function) for name, function in COMMANDS.items()}
    first = {name: choices_of(function) for name, function in COMMANDS.items()}
    first["methods"] = (*_methods(), "--adapters", "--json")
    first = {name: choices for name, choices in first.items() if choices}
    texts = {name: _first_line(function.__doc__) for name, function in COMMANDS.items()}
    if shell is Shell.fish:
        put(*_fish(commands, first, texts))
    else:
        put(*(["autoload -U +X bashcompinit && bashcompinit"] if shell is Shell.zsh else []))
        put(*_bash(commands, first))


def _methods() -> list[str]:
    from fastmerge.methods import METHODS

    return [*METHODS]


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


Flags = dict[str, tuple[str, ...]]  # of a command: a flag's choices


First = dict[str, tuple[str, ...]]  # what a command's own argument may be, where it is a choice


def _bash(commands: dict[str, Flags], first: First) -> list[str]:
    """A function of bash's that zsh runs too: commands first, then options, choices, files."""
    lines = [
        f"_{PROGRAM}() {{",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f'    words="{" ".join(commands)} --help --version"',
        "  else",
        '    case "${COMP_WORDS[1]} $before" in',
    ]
    for name, flags in commands.items():
        lines += [
            f'      "{name} {flag}") words="{" ".join(choices)}" ;;'
            for flag, choices in flags.items()
            if choices
        ]
    lines += [
        *(f'      "{name} {name}") words="{" ".join(words)}" ;;' for name, words in first.items()),
        "      *)",
        '        case "${COMP_WORDS[1]}" in',
        *(f'          {name}) words="{" ".join(flags)}" ;;' for name, flags in commands.items()),
        "        esac",
        '        case "$word" in -*) ;; *) words="" ;; esac ;;',
        "    esac",
        "  fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        f"complete -o default -o bashdefault -F _{PROGRAM} {PROGRAM}",
    ]
    return lines


def _fish(commands: dict[str, Flags], first: First, texts: dict[str, str]) -> list[str]:
    outer = f"complete -c {PROGRAM} -n __fish_use_subcommand"
    lines = [f"{outer} -f -a {name} -d {_quoted(texts[name])}" for name in commands]
    for name, flags in commands.items():
        inside = f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {name}'"
        for flag, choices in flags.items():
            form = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            given = f" -x -a {_quoted(' '.join(choices))}" if choices else ""
            lines.append(f"{inside} {form}{given}")
    for name, words in first.items():
        inside = f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {name}' -f"
        plain = [word for word in words if not word.startswith("-")]
        lines.append(f"{inside} -a {_quoted(' '.join(plain))}")
    return lines


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
