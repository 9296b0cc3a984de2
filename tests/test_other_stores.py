"""gs:// and az://: the same as s3://, against servers that speak Google's and Azure's protocols."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree as ET

import pytest

import fastmerge
from fastmerge.errors import FastmergeError, ModelError
from fastmerge.models import remote, store
from fastmerge.output import upload
from tests.test_remote import same_weights

pytest.importorskip("obstore")

SECRET = "dmVyeS1zZWNyZXQ="  # base64, as Azure's keys are


class Store(ThreadingHTTPServer):
    """Objects by name, and the pieces of those that are on their way."""

    daemon_threads = True

    def __init__(self, root: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root  # of the URLs' paths: the bucket, or account and container
        self.objects: dict[str, bytes] = {}
        self.pieces: dict[str, dict[str, bytes]] = {}
        self.down: set[str] = set()  # names whose writes are refused
        self.methods: list[tuple[str, str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """What both protocols have in common, and of each what a whole object, a piece of one, the list
    of its pieces, and a list of objects are.
    """

    protocol_version = "HTTP/1.1"
    server: Store

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        asked = {key: value[0] for key, value in parse_qs(parts.query, True).items()}
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        name = path.removeprefix(self.server.root).lstrip("/")
        self.server.methods.append((self.command, name, parts.query))
        if self.command in ("GET", "HEAD") and name and not asked:
            self.read(name)
        elif self.command == "GET":
            self.list(asked.get("prefix", ""))
        elif self.command == "DELETE":
            self.server.objects.pop(name, None)
            self.answer(204 if self.server.root == "/models" else 202)
        elif name in self.server.down:
            self.answer(403)
        elif "uploads" in asked:
            self.server.pieces[name] = {}
            self.answer(200, tree("InitiateMultipartUploadResult", UploadId="1"))
        elif "partNumber" in asked or asked.get("comp") == "block":
            key = asked.get("partNumber", "").zfill(5) + asked.get("blockid", "")
            self.server.pieces.setdefault(name, {})[key] = body
            self.answer(201 if "blockid" in asked else 200, b"", {"etag": f'"{key}"'})
        elif "uploadId" in asked:
            pieces = self.server.pieces.pop(name)
            tag = self.put(name, b"".join(pieces[key] for key in sorted(pieces)))
            self.answer(200, tree("CompleteMultipartUploadResult", ETag=tag))
        elif asked.get("comp") == "blocklist":
            pieces = self.server.pieces.pop(name)
            order = [entry.text or "" for entry in ET.fromstring(body)]
            tag = self.put(name, b"".join(pieces["00000" + key] for key in order))
            self.answer(201, b"", {"etag": tag})
        else:
            tag = self.put(name, body)
            self.answer(201 if "x-ms-blob-type" in self.headers else 200, b"", {"etag": tag})

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

    def put(self, name: str, data: bytes) -> str:
        self.server.objects[name] = data
        return tag_of(data)

    def read(self, name: str) -> None:
        data = self.server.objects.get(name)
        if data is None:
            self.answer(404)
            return
        headers = {"etag": tag_of(data), "x-ms-blob-type": "BlockBlob"}
        if self.headers.get("if-match", headers["etag"]) != headers["etag"]:
            self.answer(412)
            return
        size, status = len(data), 200
        span = self.headers.get("range") or self.headers.get("x-ms-range")
        if span:
            begin, end = map(int, span.removeprefix("bytes=").split("-"))
            data, status = data[begin : end + 1], 206
            headers["content-range"] = f"bytes {begin}-{begin + len(data) - 1}/{size}"
        self.answer(status, data, headers)

    def list(self, prefix: str) -> None:
        found = [(n, d) for n, d in sorted(self.server.objects.items()) if n.startswith(prefix)]
        when = "2026-01-01T00:00:00Z"
        if self.server.root == "/models":
            each = "".join(
                f"<Contents><Key>{n}</Key><Size>{len(d)}</Size><ETag>{tag_of(d)}</ETag>"
                f"<LastModified>{when}</LastModified></Contents>"
                for n, d in found
            )
            text = f"<ListBucketResult>{each}<IsTruncated>false</IsTruncated></ListBucketResult>"
        else:
            each = "".join(
                f"<Blob><Name>{n}</Name><Properties><Content-Length>{len(d)}</Content-Length>"
                f"<Etag>{tag_of(d)[1:-1]}</Etag><Last-Modified>{formatdate(usegmt=True)}"
                "</Last-Modified><Content-Type>x</Content-Type></Properties></Blob>"
                for n, d in found
            )
            text = f"<EnumerationResults><Blobs>{each}</Blobs><NextMarker/></EnumerationResults>"
        self.answer(200, text.encode())

    def answer(self, status: int, data: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for key, value in {**headers, "last-modified": formatdate(0, usegmt=True)}.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def tag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def tree(kind: str, **fields: str) -> bytes:
    each = "".join(f"<{key}>{value}</{key}>" for key, value in fields.items())
    return f"<{kind}><Bucket>b</Bucket><Key>k</Key>{each}</{kind}>".encode()


@pytest.fixture(params=["gs", "az"])
def there(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Store, str]]:
    """A server, and the URL of what is in it."""
    if request.param == "gs":
        made = Store("/models")
        key = {"gcs_base_url": made.url, "disable_oauth": True, "client_email": ""}
        key |= {"private_key": SECRET, "private_key_id": ""}
        (tmp_path / "key.json").write_text(json.dumps(key))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "key.json"))
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    else:
        made = Store("/account/models")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", SECRET)
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", made.url)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(remote, "_FIRST_BYTES", 512)
    monkeypatch.setattr(store, "_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(upload, "_PART_BYTES", 5 << 20)
    yield made, f"{request.param}://models"
    made.shutdown()


def put(server: Store, folder: Path) -> None:
    for path in folder.iterdir():
        server.objects[f"{folder.name}/{path.name}"] = path.read_bytes()


def test_a_model_is_read(zoo: Any, there: tuple[Store, str], tmp_path: Path) -> None:
    server, url = there
    base = zoo.base("base", shards=2)
    (base / "tokenizer.json").write_text('{"a": 1}')
    put(server, base)
    fastmerge.average([f"{url}/base"], tmp_path / "out")
    assert same_weights(zoo, base, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    assert all(SECRET.encode() not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_change_is_noticed(zoo: Any, there: tuple[Store, str], tmp_path: Path) -> None:
    server, url = there
    put(server, zoo.base("base", shards=2))
    plan = fastmerge.plan(fastmerge.averages.average_recipe([f"{url}/base"]))
    name = "base/model-00001-of-00002.safetensors"
    server.objects[name] = server.objects[name][:-1] + b"x"
    with pytest.raises(ModelError, match=r"of-00002\.safetensors: changed while it was being read"):
        fastmerge.merge(plan, tmp_path / "out")


def test_a_model_is_written_index_last(
    zoo: Any, there: tuple[Store, str], tmp_path: Path
) -> None:  # fmt: skip
    server, url = there
    base = zoo.base("base", hidden=1024, layers=1)  # a file of two pieces
    server.down = {"out/model.safetensors"}
    with pytest.raises(FastmergeError, match=r"out/model\.safetensors: the store refuses to take"):
        fastmerge.average([base], f"{url}/out")
    assert server.objects and "out/model.safetensors" not in server.objects
    server.down, server.methods = set(), []
    fastmerge.average([base], f"{url}/out")
    fastmerge.average([base], tmp_path / "out")
    written = {f"out/{path.name}": path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert server.objects == written and not server.pieces
    sent = [name for method, name, _ in server.methods if method in ("PUT", "POST")]
    assert set(sent) == {"out/model.safetensors"} and len(sent) > 2
    with pytest.raises(FastmergeError, match=rf"{url}/out: holds {len(written)} objects already"):
        fastmerge.average([base], f"{url}/out")
