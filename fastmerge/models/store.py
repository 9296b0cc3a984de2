"""Object stores and web servers through obstore (the extra ``remote``), Rust's object_store: one
interface to S3, Google, Azure and HTTP, with their credentials, connection pools and retries,
maintained by those who wrote it; fsspec is a package and an event loop for each of them.
Credentials are those of the environment; nothing here keeps or writes any.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from fastmerge.errors import FastmergeError, ModelError, OutputError, ResourceError, first_sentences
from fastmerge.extras import install

ATTEMPTS = 4  # of what was cut or came wrong, beyond obstore's own of each request
_RETRIES = 5
# obstore gives a request 30 s from its first byte to its last, which 32 ranges of 8 MiB together
# exceed below 70 Mbit/s, and a store that joins the parts of 5 GB: all was sent again, four times.
_SILENT_SECONDS = 30.0  # without a byte of an answer
_WHOLE_SECONDS = 3600.0
# What obstore takes of the environment (AWS_ALLOW_HTTP, GOOGLE_PROXY_URL) where it is given nothing
# of the kind.
_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_", "abfs": "AZURE_", "abfss": "AZURE_"}
_OF_CLIENT = (
    "allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only",
    "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes",
    "proxy_url", "randomize_addresses", "read_timeout", "timeout", "user_agent",
)  # fmt: skip
_WAIT_SECONDS = 0.2  # before the second attempt; doubled for each further one

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SESSIONS = ("AWS_SESSION_TOKEN", "AWS_TOKEN")
_STAYS_SECONDS = 30.0

R = TypeVar("R")


def library() -> Any:
    """obstore; ResourceError where it is not installed."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise ResourceError(
            f"models by URL are read and written by obstore; run: {install('remote')}"
        ) from error
    return obstore


def check_plain(url: str, kind: type[FastmergeError] = ModelError) -> None:
    """Raises ``kind`` for a URL that holds credentials."""
    try:
        parts = urlsplit(url)
    except ValueError:  # which repeats what may be a password
        raise kind(
            f"{url.partition('://')[0]}://...: not a URL that can be read; write scheme://host/path"
        ) from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise kind(
            f"{parts.scheme}://{parts.hostname}{parts.path}: a URL with credentials or a query "
            "would be written beside the output; give the plain one, and credentials in the "
            "environment"
        )


def check_stays(url: str, kind: type[FastmergeError] = ModelError) -> None:
    """Raises ``kind`` where the S3 endpoint of the environment redirects ``url`` to another host.

    obstore would follow. On the way to another host or port it leaves out the signature (as it does
    a Hub token), but not the session token that temporary credentials have. Asked without either.
    """
    there = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    if not (there and url.startswith("s3") and any(map(os.environ.get, _SESSIONS))):
        return
    parts = urlsplit(url)
    address = f"{there.rstrip('/')}/{parts.netloc}{parts.path}"
    try:
        build_opener(_Stays).open(Request(address, method="HEAD"), timeout=_STAYS_SECONDS).close()
    except HTTPError as answer:
        answer.close()
        to = urlsplit(urljoin(address, answer.headers.get("location", "")))
        if answer.code in range(300, 400) and to.netloc != urlsplit(address).netloc:
            raise kind(
                f"{url}: the endpoint redirects to {to.hostname}, which would be sent the session "
                "token of your credentials; give the endpoint that answers in AWS_ENDPOINT_URL"
            ) from None
    except (OSError, HTTPException):  # no answer: obstore tries again, and says so
        return


class EmptyError(Exception):
    """A range was asked for of an object that has no bytes (HTTP's 416)."""


class _Stays(HTTPRedirectHandler):
    """Follows no redirect: it is an HTTPError then."""

    def redirect_request(self, *_: Any) -> None:
        return None


def open_store(
    url: str,
    kind: type[FastmergeError] = ModelError,
    headers: Mapping[str, str] | None = None,
    *,
    writing: bool = False,
) -> Any:
    """The store of what lies below ``url``; raises ``kind``. ``writing``: its silence may last."""
    found = library()
    client: dict[str, Any] = {"timeout": timedelta(seconds=_WHOLE_SECONDS)}
    if not writing:
        client["read_timeout"] = timedelta(seconds=_SILENT_SECONDS)
    prefix = _PREFIXES.get(url.partition(":")[0])
    for name in _OF_CLIENT if prefix else ():
        value = os.environ.get(f"{prefix}{name.upper()}")
        if value:
            client[name] = value
    options: dict[str, Any] = {
        "client_options": client,
        "retry_config": {
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(minutes=2),
            "backoff": {"init_backoff": timedelta(seconds=_WAIT_SECONDS)},
        },
    }
    if url.startswith("http://"):
        client["allow_http"] = True
    if headers:
        client["default_headers"] = dict(headers)
    try:
        return found.store.from_url(url, **options)
    except (found.exceptions.BaseError, ValueError) as error:
        said = first_sentences(str(error))
        raise kind(f"{url}: cannot be opened ({said})") from error


def asked(
    where: str,
    ask: Callable[[], R],
    *,
    changed: Callable[[], FastmergeError] | None = None,
    writing: bool = False,
    ranged: bool = False,
    access: str = "",
) -> R:
    """What ``ask`` returns, tried again where a connection or a body was cut. Raises ModelError,
    or OutputError if ``writing``, in one line, which begins with ``where``; ``changed()`` where
    the object has another ETag; FileNotFoundError; where a range is asked for (``ranged``)
    EmptyError. ``access``: what to do where the store refuses.
    """
    faults = library().exceptions
    kind: type[FastmergeError] = OutputError if writing else ModelError
    gives, may, done = ("take", "write", "written") if writing else ("give", "read", "read")
    usual = f"set credentials that may {may} it, and have not expired, in the environment"
    refusal = f"{where}: the store refuses to {gives} it; {access or usual}"
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except (faults.PermissionDeniedError, faults.UnauthenticatedError) as error:
            raise kind(refusal) from error
        except faults.PreconditionError as error:
            if changed:
                raise changed() from error
            raise kind(
                f"{where}: cannot be {done} ({_answer(error)}); run again when nobody else writes "
                "there"
            ) from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise kind(f"{where}: there is no such bucket") from None
            raise
        except faults.NotSupportedError as error:
            raise kind(
                f"{where}: the server sends whole files where it is asked for a part of one (no "
                "ranges); download the model, or serve it by one that knows them"
            ) from error
        except (faults.BaseError, EOFError) as error:
            if ranged and "416 Range Not Satisfiable" in str(error):
                raise EmptyError from error
            if "ExpiredToken" in str(error) or "InvalidAccessKeyId" in str(error):
                raise kind(refusal) from error
            if "NoSuchBucket" in str(error):
                raise kind(f"{where}: there is no such bucket") from error
            if attempt == ATTEMPTS - 1:
                said = _answer(error)
                if said.endswith("builder error"):  # all that obstore says of it
                    said += ": an endpoint by http:// takes AWS_ALLOW_HTTP=true"
                raise kind(f"{where}: cannot be {done}, tried {ATTEMPTS} times ({said})") from error
            time.sleep(_WAIT_SECONDS * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _answer(error: Exception) -> str:
    """Of what obstore says of a request, which repeats the URL, the answer's text and itself."""
    return first_sentences(str(error).split(" - ")[-1])
