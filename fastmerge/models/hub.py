"""Where a reference leads: a local path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from fastmerge.errors import (
    ModelError,
    ResourceError,
    UnsupportedError,
    first_sentences,
    near_miss,
)
from fastmerge.extras import install
from fastmerge.limits import MAX_CONFIG_BYTES, MAX_REF_BYTES
from fastmerge.models.header import readable
from fastmerge.models.side_files import OTHER_FORMATS, WEIGHT_SUFFIXES

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(\w[\w.-]*/\w[\w.-]*)")
_HF = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?/?", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*", re.ASCII)
_REMOTE = ("hf://", "s3://", "gs://", "az://", "abfs://", "abfss://", "https://")
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


def resolve(
    reference: str, *, revision: str | None = None, cache: str | Path | None = None
) -> Path:
    """The local path of ``reference``: a folder, a file, or else a Hub id, ``org/name[@revision]``.

    The safetensors weights and side files of a Hub id come from huggingface_hub's cache or are
    downloaded into it; ``cache``: into that folder instead. Raises FastmergeError that says what
    was tried.
    """
    here = local(reference)
    if here is not None:
        return here
    name, _, pinned = reference.partition("@")
    if revision is not None and pinned and pinned != revision:
        raise ModelError(
            f"{reference}: revision '{revision}' contradicts '@{pinned}'; give one of them"
        )
    if is_path(reference):
        raise no_such_path(reference, Path())
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise ResourceError(
            f"{reference}: not a local folder, and fetching it from the Hub needs "
            "`pip install huggingface_hub`"
        ) from None
    asked = revision or pinned or None
    kept = Path(cache or constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    _check_kept(kept, asked or "main")
    try:
        found = snapshot_download(
            name,
            revision=asked,
            cache_dir=cache,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=list(_HUB_IGNORED),
        )
    except (
        Exception
    ) as error:  # its own, httpx's, requests' and the OS's errors share no base class
        raise ModelError(
            f"{reference}: not a local folder, and the Hub did not provide it "
            f"({_reason(error)}){_remedy(error, name) or _near_here(reference)}"
        ) from error
    return Path(found)


def _reason(error: Exception) -> str:
    """What it says; of the Hub's answers without the status and the request's number, which come
    first.
    """
    said = getattr(error, "server_message", None) or str(error).rpartition("\n\n")[2]
    kind = type(error).__name__
    return f"{kind}: {first_sentences(str(said)) or kind}"


def _remedy(error: Exception, name: str) -> str:
    """What to do where the Hub gives a repository to some alone, as a hint."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"; {access(name)}" if status in (401, 403) else ""


def access(name: str) -> str:
    """What makes the Hub give the repository ``owner/name`` that it refuses."""
    return (
        f"if it is gated, accept its terms at https://huggingface.co/{name}; log in by "
        "`hf auth login`, or set HF_TOKEN"
    )


def _check_kept(repository: Path, revision: str) -> None:
    """Raises ModelError for what the Hub's library would follow out of its own folder, or wait for:
    it opens what its cache holds as it lies there, and a cache may come from somebody else.
    """
    root = os.path.realpath(repository)
    snapshots, trees = f"{root}/snapshots", f"{root}/trees"
    ref = f"{root}/refs/{revision}"
    files = {ref: MAX_REF_BYTES}
    with readable(repository):
        if os.path.isdir(trees):
            files |= {f"{trees}/{name}": MAX_CONFIG_BYTES for name in os.listdir(trees)}
        folders = [snapshots]
        if os.path.isdir(snapshots):
            folders += (f"{snapshots}/{name}" for name in os.listdir(snapshots))
        for place in (*files, *folders):
            if "\0" in place or os.path.realpath(place) != place:
                raise ModelError(
                    f"{place}: leads elsewhere, which nothing in the Hub's cache does but its "
                    "files to their blobs; delete it, or name another revision"
                )
        for place, most in files.items():
            if not os.path.lexists(place):
                continue
            status = os.lstat(place)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                raise ModelError(
                    f"{place}: not a regular file of at most {most} bytes, as the Hub's cache has "
                    "them; delete it"
                )
        if os.path.lexists(ref):
            commit = Path(ref).read_bytes()
            if b"/" in commit or commit in (b"", b".", b".."):
                raise ModelError(f"{ref}: names no commit; delete it")


def _near_here(reference: str) -> str:
    """The folder here that a reference is most likely a misspelling of, as a hint."""
    try:
        near = near_miss(reference, [place.name for place in Path().iterdir() if place.is_dir()])
    except OSError:  # a working folder that is gone, or that others may not list
        return ""
    return f"; did you mean ./{near}?" if near else ""


def is_remote(reference: str) -> bool:
    """Whether it is the URL of an object store or of a web server's files."""
    return reference.startswith(_REMOTE) and _URL.match(reference) is None


class Repository(NamedTuple):
    """A repository's files on the Hub, at one commit."""

    url: str  # below which they lie
    names: tuple[str, ...]
    headers: dict[str, str]  # of each request; with the user's token, where there is one


def repository(reference: str) -> Repository:
    """What ``hf://owner/name[@revision]`` names, at the commit that its revision is at now, by the
    Hub's API at HF_ENDPOINT. Raises ModelError, ResourceError where there is no huggingface_hub.
    """
    found = _HF.fullmatch(reference)
    if found is None:
        raise ModelError(f"{reference}: must be hf://owner/name or hf://owner/name@revision")
    name, revision = found.groups()
    try:
        from huggingface_hub import HfApi, constants, get_token, hf_hub_url
    except ImportError:
        raise ResourceError(
            f"{reference}: the Hub is asked by its library; run: {install('hub')}"
        ) from None
    token = get_token()
    try:
        info = HfApi(token=token).model_info(name, revision=revision)
    except (
        Exception
    ) as error:  # its own, httpx's, requests' and the OS's errors share no base class
        raise ModelError(
            f"{reference}: the Hub does not say what is in it ({_reason(error)})"
            f"{_remedy(error, name)}"
        ) from error
    at = hf_hub_url(name, "x", revision=info.sha, endpoint=constants.ENDPOINT)
    names = tuple(each.rfilename for each in info.siblings or ())
    return Repository(at[:-2], names, token_header())


def token_header() -> dict[str, str]:
    """What each request to the Hub has with it: the user's token, where there is one."""
    from huggingface_hub import get_token

    token = get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


def is_path(reference: str) -> bool:
    """Whether it can only mean a local path, though there is nothing: written as one, or below a
    folder that is there. With an ``@revision`` it means the Hub.
    """
    name, _, pinned = reference.partition("@")
    if not _HUB_ID.fullmatch(name) or name.endswith(".safetensors"):
        return True
    return "/" in name and not pinned and os.path.isdir(Path(name).parent)


def no_such_path(reference: str, *folders: Path) -> ModelError:
    """The error for a missing path that was looked for in ``folders``."""
    scheme, slashes, rest = reference.partition("://")
    if slashes and _SCHEME.fullmatch(scheme) and _URL.match(reference) is None:
        place = re.split(r"[?#]", rest.rpartition("@")[2], maxsplit=1)[0]  # no password, no query
        known = ", ".join(_REMOTE)
        more = "; a store of your own over http is s3:// with AWS_ENDPOINT_URL"
        raise UnsupportedError(
            f"{scheme}://{place}: models are not read from there; give a folder or a URL of "
            f"{known}{more if scheme.lower() in ('http', 's3') else ''}"
        )
    places = dict.fromkeys(str((folder / reference).expanduser().absolute()) for folder in folders)
    hint = ""
    url = _URL.match(reference)
    if url is not None:
        hint = f"; the Hub's models are called by owner and name: write '{url[1]}'"
    if _HUB_ID.fullmatch(reference) and not reference.endswith(".safetensors"):
        hint = f"; if it is the Hub's, write '{reference}@main'"
    return ModelError(
        f"{reference}: no such folder or file (looked for {' and '.join(places)}){hint}"
    )


def local(reference: str) -> Path | None:
    """The folder or file of that name, if there is one."""
    if not reference:  # Path('') would be the current folder
        return None
    try:
        path = Path(reference).expanduser()
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
            raise ModelError(f"{reference}: the folder cannot be read (Permission denied)")
        return path if path.exists() else None
    except RuntimeError:
        user = reference.split("/")[0]
        raise ModelError(f"{reference}: no user {user} with a home here; write it out") from None
    except (OSError, ValueError) as error:  # too long, not searchable, a character it cannot hold
        raise ModelError(f"{reference}: no path that can be opened ({error})") from error
