"""Models in object stores, on moto's S3 server behind a proxy that fails as networks do."""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge import api
from fastmerge.cli import main
from fastmerge.errors import FastmergeError, ModelError, ResourceError, UnsupportedError
from fastmerge.models import ahead, remote, store
from tests.test_bad_input_cli import refused

obstore = pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")

SILENCE = 0.8  # seconds
Fault = Callable[[str, int], str | None]  # of a path and the how-manieth request for it


class Proxy(ThreadingHTTPServer):
    """Hands requests on; ``fault`` says what shall go wrong, ``served`` what was sent."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = (host, port)
        self.reset()

    def handle_error(self, *given: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # who waited no longer is gone
            super().handle_error(*given)

    def reset(self, fault: Fault = lambda path, number: None, of=("GET", "HEAD")) -> None:
        self.of = of
        self.fault, self.served, self.asked = fault, {}, {}
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        with self.server.lock:
            number = self.server.asked[name] = self.server.asked.get(name, 0) + 1
        wrong = self.server.fault(name, number) if self.command in self.server.of else None
        if wrong and wrong.isdigit():
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.answer(int(wrong), {}, b"<Error><Code>Injected</Code></Error>")
            return
        if wrong == "silent":
            time.sleep(SILENCE)
        there = http.client.HTTPConnection(*self.server.behind)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        there.request(self.command, self.path, body, dict(self.headers))
        got = there.getresponse()
        data = got.read()
        own = ("connection", "transfer-encoding", "content-length", "date", "server")
        headers = {k: v for k, v in got.getheaders() if k.lower() not in own}
        length = got.getheader("content-length")
        self.answer(got.status, headers, data, length, cut=wrong == "cut", slow=wrong == "slow")
        with self.server.lock:
            self.server.served[name] = self.server.served.get(name, 0) + len(data)

    def answer(
        self,
        status: int,
        headers: dict[str, str],
        data: bytes,
        length=None,
        *,
        cut=False,
        slow=False,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("content-length", length or str(len(data)))
        self.end_headers()
        step = max(1, len(data) // 8) if slow else len(data) or 1
        for begin in range(0, 0 if self.command == "HEAD" else len(data), step):
            time.sleep(SILENCE / 4 if slow else 0)
            self.wfile.write(data[begin : len(data) // 2 if cut else begin + step])
        if cut:
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    s3 = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    proxy = Proxy(*s3.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    given = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ALLOW_HTTP": "true",
    }
    before = {key: os.environ.get(key) for key in given}
    os.environ.update(given)
    there = http.client.HTTPConnection(*proxy.behind)
    there.request("PUT", "/models")
    assert there.getresponse().status == 200
    yield proxy
    proxy.shutdown()
    s3.stop()
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value


@pytest.fixture
def bucket(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    server.reset()
    monkeypatch.setattr(remote, "_FIRST_BYTES", 512)  # less than the headers here
    monkeypatch.setattr(ahead, "_LEAST_BYTES", 1000)
    monkeypatch.setattr(store, "_WAIT_SECONDS", 0.01)
    return server


def upload(folder: Path) -> str:
    url = f"s3://models/{folder.parent.name}/{folder.name}"
    there = obstore.store.from_url(url)
    for path in folder.iterdir():
        obstore.put(there, path.name, path.read_bytes())
    return url


@pytest.fixture
def models(zoo: Any, bucket: Proxy) -> list[Path]:
    bucket.reset()
    base = zoo.base("base", shards=3)
    (base / "tokenizer.json").write_text('{"a": 1}')
    (base / "notes.bin").write_bytes(b"0" * 50)
    return [base, zoo.tune(base, "tune")]


def recipe(models: list[Any], method: str = "slerp") -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models],
        "parameters": {"t": 0.3},
        "dtype": "bfloat16",
    }


def same_weights(zoo: Any, a: Path, b: Path) -> bool:
    mine, theirs = zoo.read(a), zoo.read(b)
    return mine.keys() == theirs.keys() and all((mine[n] == theirs[n]).all() for n in mine)


def test_a_merge_of_remote_models(zoo: Any, models: list[Path], tmp_path: Path) -> None:
    urls = [upload(model) for model in models]
    fastmerge.merge(recipe(models), tmp_path / "local")
    plan = api.plan(recipe(urls))
    report = fastmerge.merge(plan, tmp_path / "remote")
    assert same_weights(zoo, tmp_path / "local", tmp_path / "remote")
    assert (tmp_path / "remote" / "tokenizer.json").read_text() == '{"a": 1}'
    config = json.loads((tmp_path / "remote" / "config.json").read_text())
    assert config == json.loads((tmp_path / "local" / "config.json").read_text())
    assert [model.held_bytes for model in plan.models] == [0, 0]
    assert any("known by name" in note for note in report.notes)
    for path in (tmp_path / "remote").iterdir():
        assert b"very-secret" not in path.read_bytes()


def test_parts_of_remote_models(models: list[Path], tmp_path: Path) -> None:
    urls = [upload(model) for model in models]
    outs = [tmp_path / "parts" / "out", tmp_path / "whole" / "out"]
    for out in outs:
        out.parent.mkdir()
    for number in (2, 1):
        fastmerge.merge(recipe(urls), outs[0], part=(number, 2), max_shard_bytes=20_000)
    fastmerge.finish(outs[0])
    fastmerge.merge(recipe(urls), outs[1], max_shard_bytes=20_000)
    parts, whole = ({f.name: f.read_bytes() for f in out.iterdir()} for out in outs)
    assert parts == whole


def test_a_file_and_a_folder_average(zoo: Any, models: list[Path], tmp_path: Path) -> None:
    one = upload(models[1])
    fastmerge.average([f"{one}/model.safetensors", models[0]], tmp_path / "mixed")
    fastmerge.average([models[1], models[0]], tmp_path / "local")
    assert same_weights(zoo, tmp_path / "local", tmp_path / "mixed")


def test_a_plan_reads_headers_alone(models: list[Path], bucket: Proxy) -> None:
    urls = [upload(model) for model in models]
    bucket.reset()
    plan = api.plan(recipe(urls))
    weights = {name: n for name, n in bucket.served.items() if name.endswith(".safetensors")}
    headers = sum(info.begin == 0 for model in plan.models for info in model.tensors.values())
    assert headers == 0 and len(weights) == 4
    assert sum(weights.values()) < 0.2 * plan.bytes_in


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code
    return json.loads(capsys.readouterr().out)


def test_info_of_a_url_reads_headers_alone(
    zoo: Any, bucket: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    base = zoo.base("base", shards=3, hidden=256)
    (base / "tokenizer.json").write_text(" " * 500_000)
    url = upload(base)
    bucket.reset()
    found = said(capsys, "info", url, "--json")
    weights = sum(n for name, n in bucket.served.items() if name.endswith(".safetensors"))
    assert 0 < weights < 0.05 * found["bytes"] and "tokenizer.json" not in bucket.served
    here = said(capsys, "info", base, "--json")
    apart = {"path": url, "fingerprint": found["fingerprint"]}
    assert found == {**here, **apart} and len(here["side_files"]) == 2


def test_a_dry_run_reads_headers_alone(
    zoo: Any, bucket: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = zoo.base("base", shards=3, hidden=256)
    urls = [upload(base), upload(zoo.tune(base, "tune"))]
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe(urls)))
    bucket.reset()
    found = said(capsys, "plan", tmp_path / "recipe.yml", "--json")
    weights = sum(n for name, n in bucket.served.items() if name.endswith(".safetensors"))
    assert 0 < weights < 0.05 * found["bytes_in"]


def test_a_difference_of_urls(
    models: list[Path], bucket: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [upload(model) for model in models]
    here = said(capsys, "diff", *models, "--json")
    assert said(capsys, "diff", *urls, "--json") == here and not here["same"]
    assert said(capsys, "diff", urls[0], models[0], "--json")["same"]
    bucket.reset(lambda name, number: "cut" if number % 3 == 1 else None)
    assert said(capsys, "diff", *urls, "--json") == here


@pytest.mark.parametrize("wrong", ["500", "cut"])
def test_what_fails_is_asked_for_again(
    zoo: Any, models: list[Path], bucket: Proxy, tmp_path: Path, wrong: str
) -> None:
    urls = [upload(model) for model in models]
    bucket.reset(lambda path, number: wrong if number % 3 == 1 else None)
    fastmerge.merge(recipe(urls), tmp_path / "remote")
    bucket.reset()
    fastmerge.merge(recipe(models), tmp_path / "local")
    assert same_weights(zoo, tmp_path / "local", tmp_path / "remote")


@pytest.mark.parametrize(("wrong", "times"), [("slow", 1), ("silent", 2)])
def test_an_answer_may_be_slow_but_not_silent(
    models: list[Path], tmp_path: Path, bucket: Proxy, monkeypatch: Any, wrong: str, times: int
) -> None:
    """A slow line takes as long as it takes; nothing for a while is asked for again."""
    monkeypatch.setattr(store, "_SILENT_SECONDS", SILENCE / 2)
    there = upload(models[0])
    bucket.reset(
        lambda name, number: wrong if name == "model.safetensors.index.json" and number == 1 else ""
    )
    fastmerge.average([there], tmp_path / "out")
    assert bucket.asked["model.safetensors.index.json"] == times
    assert (tmp_path / "out").is_dir()


def test_what_the_environment_says_of_connections_counts(
    bucket: Proxy, models: list[Path], monkeypatch: Any
) -> None:
    there = upload(models[0])
    bucket.reset(lambda name, number: "silent")
    monkeypatch.setattr(store, "_RETRIES", 0)
    monkeypatch.setenv("AWS_TIMEOUT", f"{SILENCE / 4}s")
    with pytest.raises(ModelError, match="cannot be read, tried 4 times"):
        api.plan(recipe([there, models[1]]))
    monkeypatch.setenv("AWS_TIMEOUT", "soon")
    with pytest.raises(ModelError, match=r'cannot be opened .*"soon"'):
        api.plan(recipe([there, models[1]]))


def test_an_object_that_changes_is_noticed(models: list[Path], tmp_path: Path) -> None:
    urls = [upload(model) for model in models]
    plan = api.plan(recipe(urls))
    path = models[1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    upload(models[1])
    with pytest.raises(ModelError, match=r"tune/model\.safetensors: changed while it was being"):
        fastmerge.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    obstore.delete(obstore.store.from_url(urls[1]), "model.safetensors")
    with pytest.raises(ModelError, match=r"tune/model\.safetensors: changed while it was being"):
        plan.check_unchanged()


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nobucket-at-all/m", r"s3://nobucket-at-all/m/[\w.]*: there is no such bucket"),
        ("s3://models/nothing", r"nothing/model\.safetensors: not there; give the URL"),
        ("s3://key:word@models/m", r"s3://models/m: a URL with credentials or a query"),
        ("https://host/m?X-Amz-Signature=1", r"https://host/m: a URL with credentials or a query"),
    ],
)
def test_what_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, url: str, said: str
) -> None:
    refused(capsys, ["average", url, "-o", tmp_path / "out"], said)


def test_refused_credentials_are_one_line(models: list[Path], bucket: Proxy) -> None:
    url = upload(models[1])
    bucket.reset(lambda path, number: "403")
    with pytest.raises(ModelError, match=r": the store refuses to give it; set credentials") as no:
        api.plan(recipe([url, url + "2"]))
    assert "\n" not in str(no.value) and "very-secret" not in str(no.value)


def test_a_store_that_stays_down_is_one_line(
    models: list[Path], bucket: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(models[1])
    monkeypatch.setattr(store, "_RETRIES", 1)
    bucket.reset(lambda path, number: "500")
    with pytest.raises(ModelError, match=r"index\.json: cannot be read, tried 4 times \(") as down:
        api.plan(recipe([url, url + "2"]))
    assert "\n" not in str(down.value)


def test_damaged_headers(models: list[Path]) -> None:
    url = upload(models[1])
    there = obstore.store.from_url(url)
    for data, said in (
        (b"\x10" + bytes(7) + b"{" + b" " * 15, r"model\.safetensors: bad header: not JSON"),
        (b"\xff" * 100, r"model\.safetensors: not safetensors, or truncated \(100 bytes\)"),
        (b"short", r"model\.safetensors: not safetensors, or truncated \(5 bytes\)"),
        (b"version https://git-lfs", r"model\.safetensors: a Git LFS pointer, not the file"),
    ):
        obstore.put(there, "model.safetensors", data)
        with pytest.raises(FastmergeError, match=said):
            api.plan(recipe([url, url + "2"]))


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(ResourceError, match=r"pip install .*\[remote\]"):
        api.plan(recipe(["s3://a/b", "s3://a/c"]))


def test_a_trim_over_all_tensors_is_refused(models: list[Path], tmp_path: Path) -> None:
    urls = [upload(model) for model in models]
    said = recipe(urls, "ties")
    said["parameters"] = {"weight": 1, "density": 0.5, "trim": "model"}
    with pytest.raises(FastmergeError, match="trim: model reads all tensors two or three times"):
        fastmerge.merge(said, tmp_path / "out")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://here:9000/bucket/model", "http://here:9000/bucket/model: models are not .* s3://"),
        ("S3://bucket/model", r"S3://bucket/model: models are not read .* AWS_ENDPOINT_URL$"),
        ("ftp://me:secret@here/model", "ftp://here/model: models are not read from there"),
        ("file:///models/a?secret#secret", "file:///models/a: models are not read from there"),
    ],
)
def test_a_url_of_another_kind_is_no_missing_folder(url: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as no:
        api.plan(recipe([url, url + "2"]))
    assert "secret" not in str(no.value) and "\n" not in str(no.value)


def test_what_takes_folders_alone_says_so_of_a_url(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"^s3://b/m: verify reads folders of this machine"):
        fastmerge.verify("s3://b/m")
    with pytest.raises(UnsupportedError, match=r"^s3://b: pattern looks into folders of this"):
        fastmerge.average(["s3://b"], tmp_path / "out", pattern="step-*")


def test_an_endpoint_over_http_names_its_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "REGION": "here"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(store, "_WAIT_SECONDS", 0.0)
    with pytest.raises(ModelError, match="http:// takes AWS_ALLOW_HTTP=true"):
        remote.Remote("s3://b/m")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("403", "cannot be listed, a tokenizer's files are asked for"), ("500", "tried 4 times")],
)
def test_a_store_that_does_not_list_is_told_from_one_that_fails(
    models: list[Path], bucket: Proxy, monkeypatch: pytest.MonkeyPatch, wrong: str, said: str
) -> None:
    url = upload(models[1])
    monkeypatch.setattr(store, "_RETRIES", 1)
    model = remote.Remote(url)
    bucket.reset(lambda name, number: wrong if name == "models" else None)
    if wrong == "500":
        with pytest.raises(ModelError, match=said):
            model.side_files()
    else:
        assert said in model.side_files().notes[0]


def test_a_file_that_was_listed_and_is_gone_is_not_left_out(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that a store lists and does not give made a model without one, in silence."""
    opened = remote.Remote(upload(models[0]))
    monkeypatch.setattr(remote.Remote, "_there", lambda self: ["tokenizer.json", "vocab.json"])
    with pytest.raises(ModelError, match=r"base/vocab.json: changed while it was being read"):
        opened.side_files()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "tokenizer.json", "", "base"])
def test_a_store_that_answers_as_for_a_range_where_none_was_asked_for(
    models: list[Path], bucket: Proxy, tmp_path: Path, name: str
) -> None:
    """416 to a HEAD or a list was a traceback."""
    urls = [upload(model) for model in models]
    bucket.reset(lambda path, number: "416" if path == name or not name else None)
    if name == "base":  # of nothing that is asked for
        fastmerge.merge(recipe(urls), tmp_path / "out")
        return
    with pytest.raises(FastmergeError) as no:
        fastmerge.merge(recipe(urls), tmp_path / "out")
    assert "\n" not in str(no.value) and not (tmp_path / "out").exists()
