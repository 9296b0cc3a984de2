"""Runs the examples of the documentation as a reader does who copies and pastes.

    python docs/examples.py index.md        # in an empty folder of its own
    python docs/examples.py --python callers.md     # prints its Python alone, line by line in
                                                    # its place, for a type checker

A page's fences run from top to bottom in one folder and one Python session:

    ```yaml title="recipe.yml"      is written to that file, whatever its language
    ```python                       is executed
    ```bash                         is run, line by line; `# exit code 1` says what is expected
    ```sh                           is for a reader's machine alone (a GPU, a cluster): only
                                    read, so that its options and files are known to be there
    ```yaml                         must be YAML; a recipe must be one
    ```toml, ```json                must be that

`tests/test_docs.py` runs every page so, in a folder with the models that they name.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(
    r"^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.DOTALL | re.MULTILINE
)
_SHELL = ("bash", "sh")
_PASSED_BY = ("export", "cd", "python", "pip", "make", "git", "eval", "sbatch")
KNOWN = ("python", "yaml", "toml", "json", "text", *_SHELL)


class Fence(NamedTuple):
    """One example: its language, the file that it is written to if any, its text, its line."""

    language: str
    title: str | None
    text: str
    line: int


def fences(page: str) -> Iterator[Fence]:
    for match in _FENCE.finditer(page):
        indent, language, title, text = match.groups()
        text = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
        yield Fence(language, title, text, page.count("\n", 0, match.start()) + 1)


def python(page: str) -> str:
    """The page's Python, each line where it is on the page."""
    lines = [""] * page.count("\n")
    for fence in fences(page):
        if fence.language == "python" and fence.title is None:
            code = fence.text.splitlines()
            lines[fence.line : fence.line + len(code)] = code
    return "\n".join(lines) + "\n"


def run(page: Path) -> dict[str, Any]:
    """Runs the page's examples in the working directory; what its Python defined. Raises
    AssertionError with the page and the line.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    for fence in fences(page.read_text()):
        where = f"{page.name}:{fence.line}"
        try:
            _one(fence, where, names)
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    return names


def _one(fence: Fence, where: str, names: dict[str, Any]) -> None:
    if fence.title is not None:
        place = Path(fence.title)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(fence.text)
    elif fence.language == "python":
        exec(compile(fence.text, where, "exec"), names)
    elif fence.language in _SHELL:
        for line in commands(fence.text):
            _command(line, really=fence.language == "bash")
    elif fence.language == "yaml":
        _yaml(fence.text)
    elif fence.language == "json":
        import json

        json.loads(fence.text)


def commands(text: str) -> list[str]:
    """The lines of a shell example, those that end in a backslash joined."""
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def _command(line: str, *, really: bool) -> None:
    expected = int(found[1]) if (found := re.search(r"# exit code (\d)", line)) else 0
    words = shlex.split(line, comments=True)
    if words[0] == "fastmerge":
        code = fastmerge(words[1:]) if really else known(words[1:])
        assert code == expected, f"{line}: exit code {code}"
        return
    assert words[0] in _PASSED_BY, f"{line}: no command that examples have; see docs/examples.py"
    if words[0] == "make":
        assert f"\n{words[1]}:" in _make(), f"{line}: no such target"
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        assert (ROOT / words[1]).is_file(), f"{line}: no such file"
    elif words[0] == "python" and really:
        subprocess.run([sys.executable, *words[1:]], check=True, stdout=subprocess.DEVNULL)


def _make() -> str:
    return (ROOT / "Makefile").read_text().replace(".venv/.built", "")


def fastmerge(words: list[str]) -> int:
    """The exit code of a command of fastmerge's, run in this process."""
    from fastmerge.cli import main

    try:
        with redirect_stdout(io.StringIO()):
            main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


def known(words: list[str]) -> int:
    """0 where the command and its options are fastmerge's, 2 where they are not."""
    from fastmerge import cli
    from fastmerge.cli.app import COMMANDS, MISTAKE
    from fastmerge.cli.options import parse
    from fastmerge.errors import FastmergeError

    fastmerge(["--version"])  # fills in the commands
    assert cli and words[0] in COMMANDS, f"no command {words[0]}"
    try:
        parse(COMMANDS[words[0]], words[1:], "fastmerge")
    except SystemExit as stop:
        return int(stop.code or 0)
    except FastmergeError:
        return MISTAKE
    return 0


def _yaml(text: str) -> None:
    import yaml

    from fastmerge import api

    for document in yaml.safe_load_all(text):
        if isinstance(document, dict) and "merge_method" in document:
            api.decide(document)


def main() -> None:
    *options, page = sys.argv[1:]
    if options == ["--python"]:
        print(python((Path(__file__).resolve().parent / page).read_text()), end="")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(__file__).resolve().parent / page
        os.chdir(folder)
        run(path)
        print(f"{page}: every example runs")


if __name__ == "__main__":
    main()
