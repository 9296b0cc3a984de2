"""Models below a URL of a web server: what servers do otherwise than S3, and what is said then."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge import api
from fastmerge.errors import ModelError
from fastmerge.models import hub, remote, store
from fastmerge.models.folder import INDEX
from tests.test_bad_input_cli import refused
from tests.test_redirects import Handler, Server
from tests.test_remote import same_weights

pytest.importorskip("obstore")


class Odd(Handler):
    """``way``: how this server is odd."""

    way = ""

    def get(self) -> None:
        file = self.server.folder / self.path.rpartition("/")[2]
        if self.way == "no ranges":
            del self.headers["range"]
        elif file.is_file() and not file.stat().st_size and "range" in self.headers:
            self.answer(416, b"", {"content-range": "bytes */0"})
            return
        if "if-match" in self.headers and self.way == "weak":  # as RFC 9110 has it
            self.answer(412, b"", {})
            return
        super().get()

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        if self.way == "weak":
            headers = {**headers, "etag": f'W/"{type(self).tag}"'}
        super().answer(status, data, headers)

    tag = 1


@pytest.fixture
def server(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(hub, "_REMOTE", (*hub._REMOTE, "http://"))
    monkeypatch.setattr(remote, "_FIRST_BYTES", 512)  # less than the headers here
    monkeypatch.setattr(store, "_WAIT_SECONDS", 0.01)
    base = zoo.base("base", shards=2)
    (base / "tokenizer.json").write_text('{"a": "' + "x" * 2000 + '"}')
    (base / "merges.txt").write_text("")
    made = Server(base)
    yield made
    made.shutdown()


def odd(server: Server, way: str) -> str:
    server.RequestHandlerClass = type("Own", (Odd,), {"way": way})
    return f"http://127.0.0.1:{server.server_port}/m"


@pytest.mark.parametrize("way", ["", "weak"])
def test_empty_files_and_weak_tags(zoo: Any, server: Server, tmp_path: Path, way: str) -> None:
    url = odd(server, way)
    fastmerge.average([url], tmp_path / "out")
    assert same_weights(zoo, server.folder, tmp_path / "out")
    for name in ("tokenizer.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (server.folder / name).read_bytes()


def test_a_change_behind_a_weak_tag_is_noticed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = odd(server, "weak")
    plan = api.plan(fastmerge.averages.average_recipe([url]))
    monkeypatch.setattr(server.RequestHandlerClass, "tag", 2)
    with pytest.raises(ModelError, match=r"safetensors: changed while it was being read"):
        fastmerge.merge(plan, tmp_path / "out")


def test_a_server_without_ranges_is_one_line(server: Server, tmp_path: Path, capsys: Any) -> None:
    url = odd(server, "no ranges")
    said = r"index\.json: the server sends whole files where it is asked for a part of one"
    refused(capsys, ["average", url, "-o", tmp_path / "out"], said)


def test_a_plan_travels_to_another_process_without_what_opens_it(
    zoo: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(fastmerge.averages.average_recipe([odd(server, "")]))
    monkeypatch.setattr(plan.models[0], "_store", None)
    fastmerge.merge(pickle.loads(pickle.dumps(plan)), tmp_path / "out")
    assert same_weights(zoo, server.folder, tmp_path / "out")


@pytest.mark.parametrize(
    "url", ["https://[::1/PASSWORD:x@", "https://user:PASSWORD@h\u2100/m", "s3://a:PASSWORD@[b/c"]
)
def test_what_is_no_url_is_one_line_without_it(url: str, tmp_path: Path, capsys: Any) -> None:
    for words in (["average", url, "-o", tmp_path / "out"], ["info", url]):
        shown = re.escape(f"error: {url.partition('/')[0]}//...: not a URL that can be read; ")
        refused(capsys, words, f"^{shown}write scheme://host/path$")


@pytest.mark.parametrize(
    "name",
    [
        "../secret", "/etc/passwd", "https://evil.example/x", "//evil.example/x", "./x", "a//b",
        "a/./b", ".", "\n", "\t", "\0", "x\r\nHost: evil.example", "\u202ex", "a/../../x",
        "%2e%2e/secret", "%2E%2E%2Fsecret", "..%5cx", "..\\x", "@evil.example/x", "x?token=1",
        "x#y", "x" * 5000,
    ],
)  # fmt: skip
def test_an_index_names_files_below_its_own(server: Server, name: str) -> None:
    """No other place is asked, whatever a server's index says; obstore refuses some names."""
    url, asked = f"{odd(server, '')}/deep", []

    class Asked(Odd):
        def get(self) -> None:
            asked.append(self.path)
            super().get()

    server.RequestHandlerClass = Asked
    index = server.folder / INDEX
    told = json.loads(index.read_text())
    told["weight_map"] |= dict.fromkeys(list(told["weight_map"])[:1], name)
    index.write_text(json.dumps(told))
    with pytest.raises(ModelError) as caught:
        remote.Remote(url)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1700
    assert asked and all(path.startswith("/m/deep/") and "/../" not in path for path in asked)
