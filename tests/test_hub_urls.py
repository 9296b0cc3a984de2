"""hf://owner/name as a source: the Hub's API and its files, played by a server of this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge.models.hub import _reason, _remedy

pytest.importorskip("obstore")
pytest.importorskip("huggingface_hub")

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders: dict[str, Path] = {}
        self.gated: set[str] = set()  # whose files are refused
        self.asked: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((path, self.headers.get("authorization")))
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            folder = self.server.folders.get("/".join(words[2:4]))
            if folder is not None and words[4:] == ["tree", SHA]:
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"}
                    for f in folder.iterdir()
                ]
                self.answer(200, json.dumps(tree).encode(), {"content-type": "application/json"})
                return
            if folder is None or (words[4:] and words[4:] != ["revision", "v1"]):
                self.answer(404, b"{}", {"x-error-code": "RepoNotFound"})
                return
            files = [{"rfilename": f.name} for f in folder.iterdir()]
            said = {"id": "/".join(words[2:4]), "sha": SHA, "siblings": files}
            self.answer(200, json.dumps(said).encode(), {"content-type": "application/json"})
        elif words[2:3] == ["resolve"] and words[-1].endswith(".safetensors"):
            if "/".join(words[:2]) in self.server.gated:
                said = f"Access to model {words[1]} is restricted and you are not in the list."
                self.answer(403, b"", {"x-error-code": "GatedRepo", "x-error-message": said})
                return
            self.answer(302, b"", {"location": f"/cdn{path}"})
        else:
            name = "/".join(words[1:3] if words[0] == "cdn" else words[:2])
            file = self.server.folders.get(name, Path("/none")) / words[-1]
            if SHA not in words or not file.is_file():
                self.answer(404, b"", {})
                return
            data, size = file.read_bytes(), file.stat().st_size
            # Without the commit the Hub's library refuses the file, in whatever thread is first.
            tag = {"etag": f'"{hash(data)}"', "x-repo-commit": SHA}
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
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def command(hub: Hub, *words: Any) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_very_secret"}
    own |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "fastmerge", *map(str, words)],
        env={**os.environ, **own}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_merge_of_repositories(zoo: Any, hub: Hub, tmp_path: Path) -> None:
    base = zoo.base("base", shards=3)
    (base / "tokenizer.json").write_text('{"a": 1}')
    tune = zoo.tune(base, "tune")
    hub.folders = {"org/base": base, "org/tune": tune}
    done = command(hub, "average", "hf://org/base@v1", "hf://org/tune", "-o", tmp_path / "out")
    assert not done.returncode, done.stderr
    fastmerge.average([base, tune], tmp_path / "local")
    mine, theirs = zoo.read(tmp_path / "out"), zoo.read(tmp_path / "local")
    assert mine.keys() == theirs.keys() and all((mine[n] == theirs[n]).all() for n in mine)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert all(b"very_secret" not in f.read_bytes() for f in (tmp_path / "out").iterdir())
    assert any(path == "/api/models/org/base/revision/v1" for path, _ in hub.asked)
    own = [token for path, token in hub.asked if "/org/" in path and "/cdn" not in path]
    assert set(own) == {"Bearer hf_very_secret"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://org/none", "hf://org/none: the Hub does not say what is in it"),
        ("hf://org", "hf://org: must be hf://owner/name"),
        ("hf://org/base@v2", "hf://org/base@v2: the Hub does not say what is in it"),
    ],
)
def test_what_is_not_there_is_one_line(
    zoo: Any, hub: Hub, tmp_path: Path, name: str, said: str
) -> None:
    hub.folders = {"org/base": zoo.base("base")}
    done = command(hub, "average", name, "-o", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.count("\n") == 1 and "very_secret" not in done.stderr


@pytest.mark.parametrize("name", ["hf://org/tune@v1", "org/tune@v1"])
def test_a_gated_repository_says_what_opens_it(
    zoo: Any, hub: Hub, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of its files is everybody's, the weights are not."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    hub.folders, hub.gated = {"org/tune": zoo.base("tune")}, {"org/tune"}
    done = command(hub, "average", name, "-o", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    _, found, said = done.stderr.partition("error: ")  # behind the Hub's library's own bar
    assert found and "Request ID" not in said, done.stderr
    assert "accept its terms at https://huggingface.co/org/tune; log in by `hf auth login`" in said
    assert "very_secret" not in done.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_hub_itself_says_comes_first(status: int) -> None:
    class Answer:
        status_code = status

    class GatedRepoError(Exception):
        response = Answer()
        server_message = "" if status == 401 else "Access to model x is restricted. Log in."

    said = GatedRepoError(f"{status} Client Error. (Request ID: 1)\n\nCannot access it at url u.")
    assert "Request ID" not in _reason(said)
    assert _reason(said).startswith(
        "GatedRepoError: " + ("Cannot access" if status == 401 else "Access to model x")
    )
    assert "https://huggingface.co/org/x;" in _remedy(said, "org/x")
    assert _remedy(ConnectionError("no route"), "org/x") == ""
