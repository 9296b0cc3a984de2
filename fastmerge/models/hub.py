"""Where a reference leads: a local path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from fastmerge.errors import ModelError, ResourceError, first_sentences
from fastmerge.models.side_files import OTHER_FORMATS, WEIGHT_SUFFIXES

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# What `side_files` would take, and the weights. `*` crosses folders in these patterns; the
# weights of sentence-transformers' modules lie in folders that begin with a digit.
_HUB_PATTERNS = ("*",)
_HUB_IGNORED = (
    *(f"[!0-9]*.{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != "safetensors"),
    "[!0-9]*/*.safetensors",
    "consolidated*",
    *(f"{folder}/*" for folder in OTHER_FORMATS),
    ".*",
    "*/.*",
)


def resolve(reference: str, *, revision: str | None = None) -> Path:
    """The local path of ``reference``: a folder, a file, or else a Hub id, ``org/name[@revision]``.

    The safetensors weights and side files of a Hub id come from huggingface_hub's cache or are
    downloaded into it. Raises FastmergeError that says what was tried.
    """
    local = _local(reference)
    if local is not None:
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
        found = snapshot_download(
            name,
            revision=revision or pinned or None,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=list(_HUB_IGNORED),
        )
    except (
        Exception
    ) as error:  # its own, httpx's, requests' and the OS's errors share no base class
        reason = first_sentences(str(error)) or type(error).__name__
        raise ModelError(
            f"{reference}: not a local folder, and the Hub did not provide it "
            f"({type(error).__name__}: {reason})"
        ) from error
    return Path(found)


def _local(reference: str) -> Path | None:
    """The folder or file of that name, if there is one."""
    if not reference:  # Path('') would be the current folder
        return None
    try:
        local = Path(reference).expanduser()
        return local if local.exists() else None
    except RuntimeError:
        user = reference.split("/")[0]
        raise ModelError(f"{reference}: no user {user} with a home here; write it out") from None
    except (OSError, ValueError) as error:  # too long, not searchable, a character it cannot hold
        raise ModelError(f"{reference}: no path that can be opened ({error})") from error
