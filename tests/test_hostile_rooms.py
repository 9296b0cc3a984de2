"""Strangers' files behind the merge: loading, tokenizers, servers, runs, data, pictures, parts."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import limits, llama
from fastmerge.errors import FastmergeError
from fastmerge.evaluation import local_data
from fastmerge.evaluation.journal import Journal, write_atomically
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.models import remote, store, vocabulary
from fastmerge.models.patterns import Patterns
from fastmerge.models.remote import Remote
from fastmerge.output.working import beside
from fastmerge.retrograde import run
from fastmerge.search import figures


def refusal(call: Callable[..., Any], *words: Any, **named: Any) -> str:
    with pytest.raises(FastmergeError) as caught:
        call(*words, **named)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1700
    return str(caught.value)


# ---------------------------------------------------------------- what transformers would do


@pytest.fixture(scope="module")
def loadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("loadable") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def with_config(folder: Path, to: Path, **said: Any) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | said))
    return to


@pytest.mark.parametrize(
    "said",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel@main:forward"},
        {"attn_implementation": {"text_config": "somebody/kernel"}},
        {"experts_implementation": "somebody/kernel"},
        {"text_config": {"_attn_implementation": "somebody/kernel"}},
    ],
)
def test_no_code_is_fetched_that_a_config_names(
    loadable: Path, tmp_path: Path, said: dict[str, Any]
) -> None:
    """transformers runs attention kernels from the Hub without asking."""
    folder = with_config(loadable, tmp_path / "m", **said)
    assert "names code on the Hub, 'somebody/kernel" in refusal(llama.load, folder)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    assert "names code on the Hub" in refusal(llama.load_merged, recipe)
    fastmerge.merge(recipe, tmp_path / "out")  # that only copies


@pytest.mark.parametrize(
    "said", [{"dtype": 7}, {"num_attention_heads": 0}, {"rope_parameters": 7}, {"vocab_size": -1}]
)
def test_configs_that_no_class_takes(loadable: Path, tmp_path: Path, said: dict[str, Any]) -> None:
    assert "does not load: " in refusal(llama.load, with_config(loadable, tmp_path / "m", **said))


def test_an_adapter_s_config_does_not_stand_for_the_model(loadable: Path, tmp_path: Path) -> None:
    folder = with_config(loadable, tmp_path / "m")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "/elsewhere"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    assert "sends transformers to the base that it names" in refusal(llama.load, folder)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_loaded_tokenizer_is_of_its_folder(tmp_path: Path, place: str) -> None:
    pytest.importorskip("transformers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "secret").write_text("\n".join([*special, "hunter2"]))
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "vocab.txt").write_text("\n".join([*special, "a"]))
    said = {"tokenizer_class": "BertTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    said |= dict.fromkeys(("vocab", "vocab_file", "tokenizer_file"), str(tmp_path / "secret"))
    (folder / place).write_text(json.dumps(said))
    made = llama.load_tokenizer(folder)
    assert set(made.get_vocab()) == {*special, "a"}
    assert made.model_max_length == 77
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    assert "a link out of the model's folder" in refusal(llama.load_tokenizer, folder)


# ---------------------------------------------------------------- tokenizers

BPE = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, "added_tokens": []}
UNIGRAM = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}}


@pytest.mark.parametrize(
    "model",
    [
        {**BPE["model"], "merges": 7},
        {**BPE["model"], "merges": [7]},
        {**BPE["model"], "merges": ["ab"]},
        {**BPE["model"], "merges": [["a", "b", "c"]]},
        {**BPE["model"], "merges": [["a", {}]]},
        {**BPE["model"], "vocab": {"a": 10**9}},
        {**BPE["model"], "vocab": {"a": True}},
        {**UNIGRAM["model"], "vocab": [["a"]]},
        {**UNIGRAM["model"], "vocab": [["a", "b"]]},
        {**UNIGRAM["model"], "vocab": [["a", 1e999]]},
        {**UNIGRAM["model"], "unk_id": 10**9},
        {**UNIGRAM["model"], "unk_id": -1},
        {**BPE["model"], "vocab": {"\ud800": 0, "a": 1}},
    ],
)
def test_tokenizers_that_are_none(model: dict[str, Any]) -> None:
    good = UNIGRAM if "unk_id" in model else BPE
    files = {"tokenizer.json": json.dumps({"model": model}).encode()}
    other = {"tokenizer.json": json.dumps(good).replace('"a', '"c').encode()}

    def union() -> None:
        own = vocabulary.read_vocabulary("own", files, None)
        theirs = vocabulary.read_vocabulary("theirs", other, None)
        assert own is not None and theirs is not None
        own.with_tokens((theirs, token) for token in theirs.ids).written()

    assert refusal(union).startswith("own")


def test_a_score_beyond_all_floats_and_roles_by_the_thousand() -> None:
    scores = {"unk_id": 0, "vocab": [["<unk>", 0.0], ["a", 10**400]]}
    files = {"tokenizer.json": json.dumps({"model": scores}).encode()}
    assert "no [piece, score]" in refusal(vocabulary.read_vocabulary, "m", files, None)
    roles = {"extra_special_tokens": [f"x{i}" for i in range(100_000)]}
    files = {
        "tokenizer.json": json.dumps(BPE).encode(),
        "tokenizer_config.json": json.dumps(roles).encode(),
    }
    begun = time.process_time()
    found = vocabulary.read_vocabulary("m", files, None)
    assert time.process_time() - begun < 20  # each looked for the largest id so far
    assert found is not None
    first = found.ids["x0"]
    assert [found.ids[f"x{i}"] for i in range(100_000)] == list(range(first, first + 100_000))


def test_a_chat_template_among_odd_ones() -> None:
    listed = [7, {"name": []}, {"name": "default", "template": "x"}, {"template": "y"}]
    files = {"tokenizer_config.json": json.dumps({"chat_template": listed}).encode()}
    assert vocabulary.template_of(files, "m") == "x"


def test_tokenizers_are_read_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(BPE))
    assert vocabulary.read_vocabulary("m", {file.name: file}, tmp_path) is not None
    monkeypatch.setattr(vocabulary, "MAX_TOKENIZER_BYTES", 20)
    assert "over 20 bytes" in refusal(vocabulary.read_vocabulary, "m", {file.name: file}, tmp_path)


# ---------------------------------------------------------------- servers


class Server(ThreadingHTTPServer):
    """Counts the bytes that it has sent."""

    sent = 0


class Hostile(BaseHTTPRequestHandler):
    """Sends what is asked for and more, for as long as somebody listens."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self.path.endswith((".safetensors", "vocab.txt")):
            self.send_error(404)
            return
        self.send_response(206)
        self.send_header("content-range", "bytes 0-63/64")
        self.send_header("content-length", str(10**12))
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * (1 << 20))
                self.server.sent += 1 << 20
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("obstore")
    monkeypatch.setattr(store, "_WAIT_SECONDS", 0.01)
    server = Server(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_what_a_server_sends_beyond_the_range_is_not_read(hostile: Server) -> None:
    said = refusal(Remote, f"http://127.0.0.1:{hostile.server_port}/m")
    assert "not the 64 bytes that were asked for" in said
    assert hostile.sent < 1 << 30


def test_side_files_are_weighed_before_they_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def first(name: str, limit: int) -> Any:
        asked.append((name, limit))
        return remote._Object(name, 200 << 20, '"tag"'), b""

    made = Remote.__new__(Remote)
    made.label = made._base = "s3://bucket/model"
    made._listed = tuple(f"tokenizer_{i}.json" for i in range(100))
    monkeypatch.setattr(made, "_first", first)
    assert "more than 1 GiB beside it" in refusal(made.side_files)
    assert len(asked) == remote._CONNECTIONS
    assert {limit for _, limit in asked} == {remote._FIRST_BYTES}


# ---------------------------------------------------------------- runs


@pytest.fixture
def schedule(zoo: Any, tmp_path: Path) -> dict[str, Any]:
    zoo.tune(zoo.base("m0"), "m1", seed=1, size=0.05)
    return {
        "baseline": str(tmp_path / "m0"),
        "pool": [{"model": str(tmp_path / "m1"), "name": "dolphin"}],
        "seed": 1,
        "schedule": {
            "cycles": 1,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.4},
            "retrace": {"toward": "baseline", "method": "linear", "t": 0.3},
        },
        "evaluate": {"callable": "own:score"},
    }


def begun(schedule: dict[str, Any], out: Path) -> Path:
    """A run that was interrupted after a score."""
    scores = iter([50.0])

    def score(_: Any) -> float:
        for one in scores:
            return one
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(schedule, out, score=score)
    return out


@pytest.mark.parametrize("name", ["journal.jsonl", "run.json", "grams.npz", ".grams.npz"])
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_nothing_is_written_through_a_run_s_folder(
    schedule: dict[str, Any],
    tmp_path: Path,
    name: str,
    kind: str,
) -> None:
    """A run's folder out of an archive, with the victim under a name that the run will use."""
    victim = tmp_path / "bashrc"
    victim.write_text("alias ls=ls\nno end of line")
    out = begun(schedule, tmp_path / "out")
    (out / name).unlink(missing_ok=True)
    if kind == "link":
        (out / name).symlink_to(victim)
    else:
        os.link(victim, out / name)
    with suppress(FastmergeError):
        run(schedule, out, score=lambda model: 40.0, resume=True)
    assert victim.read_text() == "alias ls=ls\nno end of line"


def test_a_journal_of_odd_lines(tmp_path: Path) -> None:
    for line in ("[" * 100_000, '{"key": 7, "value": 1}', '{"key": [1], "value": 1}', "7", "{}"):
        (tmp_path / "journal").write_text(f"{line}\n")
        assert "line 1 is damaged" in refusal(Journal, tmp_path / "journal")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(Journal, tmp_path / "pipe")


def test_a_file_is_replaced_and_not_the_link_s_target(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "report.md").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "report.md", "theirs")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "report.md").read_text() == "theirs"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "report.md", "victim"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_a_run_of_another_user_is_not_gone_on_with(
    schedule: dict[str, Any],
    tmp_path: Path,
) -> None:
    out = begun(schedule, tmp_path / "out")
    os.chown(out, 65534, 65534)
    assert "another user's (uid 65534)" in refusal(
        run, schedule, out, score=lambda model: 40.0, resume=True
    )
    os.chown(out, 0, 0)
    os.chown(out / "run.json", 65534, 65534)
    assert "another user's" in refusal(run, schedule, out, score=lambda model: 40.0, resume=True)


# ---------------------------------------------------------------- data and pictures


def rows(folder: Path) -> Any:
    data = local_data.LocalData(folder, "data")
    return data._read(data.layout("lambada_openai", "data"), "test", "data")


def test_data_is_unpacked_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "lambada_openai" / "test.jsonl.gz"
    place.parent.mkdir()
    place.write_bytes(gzip.compress(b'{"text": "a b"}\n'))
    assert rows(tmp_path) == [{"text": "a b"}]
    monkeypatch.setattr(local_data, "MAX_DATA_BYTES", 1 << 20)
    place.write_bytes(gzip.compress(b"\n" * (1 << 24)))
    assert "over 1 MiB" in refusal(rows, tmp_path)
    place.unlink()


def test_rows_that_python_cannot_hold(tmp_path: Path) -> None:
    place = tmp_path / "lambada_openai" / "test.jsonl"
    place.parent.mkdir()
    place.write_text("[" * 100_000)
    assert "is no JSON" in refusal(rows, tmp_path)
    assert local_data._hellaswag({"label": "9" * 5000, "endings": ["a"]}) is not None


@pytest.mark.parametrize("name", ["$\\frac{", "$a$ $", "\\$a$", "_hidden", "a\nb" * 99, "\ud800\0"])
@pytest.mark.filterwarnings("ignore:Tight layout")
def test_names_in_pictures_are_text_of_one_short_line(name: str) -> None:
    pytest.importorskip("matplotlib")
    shown = figures.label(name)
    assert len(shown) <= 2 * limits.MAX_LABEL_LETTERS and "\n" not in shown
    assert not shown.startswith("_")
    assert figures.heat_png(["model.layers.0.w"], np.ones((1, 1)), [name])
    scores = Scores({"t": TaskScore(50.0, "acc", 2)})
    assert figures.spent_png({"cma": [(1, scores)]}, {name: scores}, "items")


# ---------------------------------------------------------------- parts


@pytest.fixture
def parts(zoo: Any, tmp_path: Path) -> Path:
    """The folder of a merge in one part, which is done."""
    zoo.tune(zoo.base("a"), "b", seed=1)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    recipe |= {"models": [{"model": str(tmp_path / name)} for name in "ab"]}
    fastmerge.merge(recipe, tmp_path / "out", part="1/1")
    return beside(tmp_path / "out", "parts")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", {"../../planted": {"bytes": 1, "sha256": ""}}),
        ("files", {"/tmp/planted": {"bytes": 1, "sha256": ""}}),
        ("files", {"": {"bytes": 1, "sha256": ""}}),
        ("files", {"a": {"bytes": "1", "sha256": ""}}),
        ("files", 7),
        ("shards", {"../../a/model.safetensors": {"bytes": 1, "header_sha256": ""}}),
        ("shards", {"model.safetensors": {}}),
        ("shards", []),
        ("shares", [[0, 9]]),
        ("shares", [[1, 0]]),
        ("shares", [7]),
        ("parts", 10**9),
        ("parts", "1"),
        ("tensors", None),
        ("version", []),
        ("lineage", []),
    ],
)
def test_a_forged_plan_of_parts(parts: Path, tmp_path: Path, key: str, value: Any) -> None:
    place = parts / "plan" / "manifest.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {key: value}))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert f"'{key}' is not what a part writes" in refusal(fastmerge.finish, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_a_run_of_a_part_says_is_checked(parts: Path, tmp_path: Path) -> None:
    (place,) = parts.glob("part-00001.*.run")
    good = place.read_text()
    place.write_text(good + '{"kept": [7]}\n')
    assert "is damaged" in refusal(fastmerge.finish, tmp_path / "out")
    place.write_text(good + "[" * 100_000 + "\n")
    assert fastmerge.finish(tmp_path / "out").tensors > 0


def test_a_link_among_the_files_of_parts(parts: Path, tmp_path: Path) -> None:
    place = parts / "plan" / "files" / "config.json"
    (tmp_path / "secret").write_text("{}")
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(FastmergeError, match=r"not a regular file"):
        fastmerge.finish(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- names, spaces, threads


def test_names_that_no_folder_has(tmp_path: Path) -> None:
    """Longer than Linux takes: pathlib raises where os.path says that nothing is there."""
    long = str(tmp_path / ("x" * 5000))
    walk = {"baseline": long, "pool": [long], "schedule": {"cycles": 1}}
    entry = {"model": long, "parameters": {"weight": "0..1"}}
    space = {"merge_method": "linear", "models": [entry]}
    search = {"space": space, "optimiser": "random", "budget": {"items": 4}}
    search |= {"evaluate": {"callable": "own:score"}}
    step = {"partner": "next", "method": "slerp", "t": 0.4}
    walk["schedule"] |= {"degrade": step, "retrace": {**step, "toward": "baseline"}}
    del walk["schedule"]["retrace"]["partner"]
    for call, *words in (
        (fastmerge.verify, long),
        (fastmerge.finish, long),
        (fastmerge.fold, long, long, tmp_path / "out"),
        (fastmerge.average, [long, long], tmp_path / "out"),
        (run, walk, tmp_path / "out"),
        (fastmerge.search.run, search, tmp_path / "out"),
        (llama.load, long),
    ):
        assert refusal(call, *words)


@pytest.mark.parametrize(
    "space",
    [
        {"low": 0, "high": 1},
        {"choose": [1, 2]},
        {"models": 7, "parameters": {"weight": "0..1"}},
        {"models": {"low": 0, "high": 1}},
        {"models": [[{"model": "a", "parameters": {"weight": {"low": 0, "high": 1}}}]]},
        {"models": [7, {"model": "a", "parameters": {"weight": {"low": 0, "high": 1}}}]},
        {"filter": "a", "parameters": {"weight": "0..1"}},
    ],
)
def test_spaces_that_are_no_recipes(tmp_path: Path, space: dict[str, Any]) -> None:
    search = {"space": {"merge_method": "linear", **space}, "optimiser": "random"}
    search |= {"budget": {"items": 4}, "evaluate": {"callable": "own:score"}}
    refusal(fastmerge.search.run, search, tmp_path / "out")


def test_an_expression_that_later_pythons_read_otherwise(recwarn: pytest.WarningsRecorder) -> None:
    assert Patterns({"[[a]b.*": 1}, "rank_pattern").of("[b", 0) in (0, 1)
    assert not recwarn.list


def test_parts_where_no_thread_is_left(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.tune(zoo.base("a"), "b", seed=1)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    recipe |= {"models": [{"model": str(tmp_path / name)} for name in "ab"]}

    def refused(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        said = refusal(fastmerge.merge, recipe, tmp_path / "out", part="1/1")
    assert "refuses another thread" in said
    fastmerge.merge(recipe, tmp_path / "out", part="1/1")
    assert fastmerge.finish(tmp_path / "out").parts == 1
