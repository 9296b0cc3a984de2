"""Where a reference leads: a local path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from fastmerge.errors import ModelError, ResourceError
from fastmerge.models.folder import INDEX, SIDE_PATTERNS

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HUB_PATTERNS = ("*.safetensors", INDEX, *SIDE_PATTERNS)


def resolve(reference: str, *, revision: str | None = None) -> Path:
    """The local path of ``reference``: a folder, a file, or else a Hub id, ``org/name[@revision]``.

    The safetensors weights and side files of a Hub id come from huggingface_hub's cache or are
    downloaded into it. Raises FastmergeError that says what was tried.
    """
    local = Path(reference).expanduser()
    if reference and local.exists():  # Path('') would be the current folder
        return local
    name, _, pinned = reference.partition("@")
    if revision is not None and pinned and pinned != revision:
        raise ModelError(
            f"{reference}: revision '{revision}' contradicts '@{pinned}'; give one of them"
        )
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{reference}: no such folder or file (and not a Hub id of the form org/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ResourceError(
            f"{reference}: not a local folder, and fetching it from the Hub needs "
            f"`pip install huggingface_hub`"
        ) from None
    try:
        # `*` crosses folders in these patterns: without the second list, `original/` comes along.
        found = snapshot_download(
            name,
            revision=revision or pinned or None,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (
        Exception
    ) as error:  # its own, httpx's, requests' and the OS's errors share no base class
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise ModelError(
            f"{reference}: not a local folder, and the Hub did not provide it "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error
    return Path(found)
