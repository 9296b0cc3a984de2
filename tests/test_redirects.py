"""Redirects to another host or port: models are read there, and no credential is sent along."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge.errors import ModelError, OutputError
from fastmerge.models import store

obstore = pytest.importorskip("obstore")

SECRETS = ("hf_very_secret", "very-secret-key", "very-secret-session")


class Server(ThreadingHTTPServer):
    """Serves the files of a folder, or, ``to`` another server, redirects."""

    daemon_threads = True

    def __init__(self, folder: Path, to: str = "", code: int = 302) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.to, self.code = folder, to, code
        self.heard: list[str] = []  # every header
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.get()

    def get(self) -> None:
        self.server.heard += [f"{key.lower()}: {value}" for key, value in self.headers.items()]
        name = self.path.partition("?")[0].rpartition("/")[2]
        file = self.server.folder / name
        if self.server.to:
            self.answer(self.server.code, b"", {"location": self.server.to + self.path})
        elif not name or not file.is_file():
            self.answer(404, b"", {})
        else:
            data, size = file.read_bytes(), file.stat().st_size
            tag = {"etag": '"1"'}
            if asked := self.headers.get("range"):
                begin, end = map(int, asked.removeprefix("bytes=").split("-"))
                data = data[begin : end + 1]
                tag["content-range"] = f"bytes {begin}-{begin + len(data) - 1}/{size}"
            self.answer(206 if asked else 200, data, tag)

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def model(zoo: Any) -> Path:
    return zoo.base("base")


@pytest.fixture(params=["127.0.0.1", "localhost"])
def servers(
    request: pytest.FixtureRequest, model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Server]]:
    """One that redirects, and the other, which answers at another port and maybe another name."""
    monkeypatch.setattr(store, "_WAIT_SECONDS", 0.01)
    other = Server(model)
    first = Server(model, f"http://{request.param}:{other.server_port}")
    yield first, other
    first.shutdown()
    other.shutdown()


def leaked(server: Server) -> list[str]:
    return [line for line in server.heard if any(secret in line for secret in SECRETS)]


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_hub_token_stays_with_its_host(
    servers: tuple[Server, Server], model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, code: int,
) -> None:  # fmt: skip
    first, other = servers
    first.code = code
    names = tuple(path.name for path in model.iterdir())
    found = (
        f"http://127.0.0.1:{first.server_port}/m", names,
        {"authorization": "Bearer hf_very_secret"},
    )  # fmt: skip
    monkeypatch.setattr("fastmerge.models.remote.repository", lambda _: found)
    fastmerge.average(["hf://org/base", model], tmp_path / "out")
    assert leaked(first) and other.heard and not leaked(other)


def s3(first: Server, monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    given = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "very-secret-key",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{first.server_port}",
        "AWS_ALLOW_HTTP": "true",
        **more,
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_a_signature_stays_with_its_host(
    servers: tuple[Server, Server], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = servers
    s3(first, monkeypatch)
    fastmerge.average(["s3://bucket/m/model.safetensors", model], tmp_path / "out")
    assert any("Signature=" in line for line in first.heard) and other.heard
    assert not any("Signature=" in line or "authorization" in line for line in other.heard)


def test_a_session_token_reaches_no_other_host(
    servers: tuple[Server, Server], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = servers
    s3(first, monkeypatch, AWS_SESSION_TOKEN="very-secret-session")
    with pytest.raises(ModelError, match=r"m/model\.safetensors: the endpoint redirects to ") as no:
        fastmerge.average(["s3://bucket/m/model.safetensors", model], tmp_path / "out")
    assert "\n" not in str(no.value) and not any(secret in str(no.value) for secret in SECRETS)
    with pytest.raises(OutputError, match=r"s3://bucket/out: the endpoint redirects to ") as no:
        fastmerge.average([model], "s3://bucket/out")
    assert not other.heard
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{other.server_port}")
    fastmerge.average(["s3://bucket/m/model.safetensors", model], tmp_path / "out")
    assert leaked(other)  # which is its own host now
