"""What MkDocs fills in while it builds the pages: links to files of the repository, and the checks
that no page fetches anything and that methods.md says of each method what the method table does:

    python docs/hooks.py        # writes the table's facts into methods.md

MkDocs calls the functions by their names (mkdocs.yml, `hooks`). A warning ends `make docs`.
"""

from __future__ import annotations

import logging
import posixpath
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("mkdocs.hooks.fastmerge")

_LINK = re.compile(r"(?<!!)\[([^]\[]+)\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^### (\w+)$", re.MULTILINE)
_BEGIN, _END = "<!-- from the method table: python docs/hooks.py -->", "<!-- end -->"
_FACTS = re.compile(rf"\n\n{re.escape(_BEGIN)}\n.*?{re.escape(_END)}", re.DOTALL)
# What a browser fetches by itself: not the links that a reader follows.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\shref=["']?(?:https?:)?//""",
)


def on_config(config: Any) -> Any:
    config.repo_url = repository() or None
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "methods.md" and markdown != with_facts(markdown):
        log.warning("methods.md: is not what the method table says; run python docs/hooks.py")
    return linked(markdown, page.file.src_uri)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    for found in _FETCHED.findall(output):
        log.warning("%s: fetches from elsewhere: %s", page.file.src_uri, found)
    return output


def repository() -> str:
    """The repository's address, from pyproject.toml's `project.urls`; empty where none is given."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project.get("urls", {}).get("Repository", "")).rstrip("/")


def linked(markdown: str, page: str) -> str:
    """Links to files of the repository outside docs/ lead into it, where its address is known, and
    are their text where it is not.
    """
    address = repository()

    def one(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
        if "://" in target or not path or place.startswith("docs/"):
            return match[0]
        if not (ROOT / place).exists():
            log.warning("%s: links to %s, which is not there", page, place)
        return (
            f"[{text}]({address}/blob/main/{place}{anchor and '#' + anchor})" if address else text
        )

    return _LINK.sub(one, markdown)


# ---------------------------------------------------------------- methods


def with_facts(markdown: str) -> str:
    """The facts of the method table below the heading of each method, `### name`, in the place of
    those that are there.
    """
    from fastmerge.methods import METHODS

    headings = _HEADING.findall(markdown)
    if sorted(headings) != sorted(METHODS):
        wrong = ", ".join(sorted(set(headings) ^ set(METHODS))) or "some twice"
        log.warning("methods.md: a heading for each method of the table, not so for: %s", wrong)
    plain = _FACTS.sub("", markdown)
    return _HEADING.sub(
        lambda match: f"{match[0]}\n\n{_BEGIN}\n\n{facts(METHODS[match[1]])}\n{_END}", plain
    )


def facts(method: Any) -> str:
    """What the table says of one method, in Markdown."""
    from fastmerge.methods.cost import cost

    lines = [f"{method.summary[0].upper()}{method.summary[1:]}.", ""]
    lines += [f"* **Paper:** {_paper(method.paper)}"]
    lines += [f"* **Models:** {_models(method)}", f"* **Cost:** {cost(method)}", ""]
    if method.parameters:
        lines += _table(
            ("parameter", "given", "default", "allowed", "meaning"),
            (
                (
                    f"`{own.name}`",
                    "for each model" if own.per_model else "once",
                    _default(own.default),
                    own.bounds(),
                    own.doc,
                )
                for own in method.parameters
            ),
        )
    else:
        lines.append("No parameters.")
    return "\n".join(lines) + "\n"


def _paper(paper: str) -> str:
    paper = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    paper = re.sub(r"doi:(10\.\S+)", r"[doi:\1](https://doi.org/\1)", paper)
    return paper.removeprefix("-; ") if paper != "-" else "none"


def _models(method: Any) -> str:
    low, high = method.min_operands, method.max_operands
    count = str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    base = {
        "required": "and `base_model`",
        "optional": "with or without `base_model`",
        "none": "no `base_model`",
        "first": "one of which is `base_model`",
        "operand": "of which `base_model` may be one",
    }[method.base]
    return f"{count}, {base}{'; draws from the seed' * method.random}"


def _default(value: object) -> str:
    from fastmerge.methods import REQUIRED

    return (
        "required" if value is REQUIRED else "none" if value is None else f"`{str(value).lower()}`"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    ]


if __name__ == "__main__":
    page = ROOT / "docs" / "methods.md"
    page.write_text(with_facts(page.read_text()))
