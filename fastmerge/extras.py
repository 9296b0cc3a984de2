"""How to install what an extra brings, as fastmerge itself was installed.

`pip install 'fastmerge[gpu]'` asks an index for fastmerge, where there may be none, or another
package of that name.
"""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

EXTRAS = {
    "matplotlib": "plot", "torch": "llama", "transformers": "llama", "lm_eval": "eval",
    "cma": "search", "optuna": "search", "ray": "ray",
}  # fmt: skip


def missing(*libraries: str) -> list[str]:
    """Those that are not installed; none is imported."""
    return [name for name in libraries if find_spec(name) is None]


def install(extra: str, *others: str) -> str:
    """The command that adds ``extra``, and packages beside it: of the folder, the archive or the
    repository that this fastmerge came from, else of the index.
    """
    words = _words(extra, _origin())
    return " ".join(["pip install", *words, *others])


def _words(extra: str, origin: dict[str, Any] | None) -> list[str]:
    """``origin``: direct_url.json of an installation, empty of one from an index, None where
    fastmerge is not installed but lies on the path.
    """
    here = Path(__file__).resolve().parents[1]
    if origin is None and (here / "pyproject.toml").is_file():
        return [_quoted(f"{here}[{extra}]")]
    url = str((origin or {}).get("url", ""))
    if not url:
        return [_quoted(f"fastmerge[{extra}]")]
    assert origin is not None
    if "dir_info" in origin:
        editable = bool(origin["dir_info"].get("editable"))
        place = _quoted(f"{unquote(urlsplit(url).path)}[{extra}]")
        return ["-e", place] if editable else [place]
    if "vcs_info" in origin:
        known = origin["vcs_info"]
        url = f"{known['vcs']}+{url}@{known.get('requested_revision') or known['commit_id']}"
    return [_quoted(f"fastmerge[{extra}] @ {url}")]


def _quoted(text: str) -> str:
    """In quotes always: brackets are a pattern in some shells."""
    quoted = shlex.quote(text)
    return quoted if quoted.startswith("'") else f"'{text}'"


def _origin() -> dict[str, Any] | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution("fastmerge").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    try:
        return dict(json.loads(text)) if text else {}
    except ValueError:  # not ours to mend
        return {}
