"""Reading models: what is opened, how a model is identified, where references lead."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastmerge.dtypes import BY_CODE
from fastmerge.errors import FastmergeError
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.folder import INDEX
from fastmerge.models.hub import resolve
from fastmerge.models.side_files import side_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards, four types, one tensor large enough to be sampled and not read whole."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "model"
    folder.mkdir()
    first = {
        "large": rng.standard_normal((64, 1000)).astype(np.float32),
        "half": rng.standard_normal(77).astype(np.float16),
    }
    second = {
        "ids": np.arange(10, dtype=np.int64),
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(2.5, np.float32),
    }
    weight_map = {}
    for number, tensors in enumerate((first, second), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt", "shard": str(number)})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def data(view: Any) -> bytes:
    return ctypes.string_at(view.address, view.nbytes)


def test_open(model: Path) -> None:
    found = Checkpoint.open(model)
    assert found.config == {"model_type": "llama"}
    assert found.metadata == {"format": "pt", "shard": "1"}
    assert set(found.tensors) == {"large", "half", "ids", "none", "one"}
    large = found.tensors["large"]
    assert (large.dtype, large.shape, large.count) == (BY_CODE["F32"], (64, 1000), 64_000)
    assert found.tensors["one"].shape == ()
    assert found.tensors["one"].count == 1
    assert found.total_bytes == 64_000 * 4 + 77 * 2 + 80 + 0 + 4
    assert [path.name for path in found.files] == sorted({path.name for path in found.files})


def test_views(model: Path) -> None:
    found = Checkpoint.open(model)
    expected = np.random.default_rng(5).standard_normal((64, 1000)).astype(np.float32)
    for name in found.tensors:
        found.prefetch(name)
    view = found.view("large")
    assert (view.dtype, view.count) == ("F32", 64_000)
    assert data(view) == expected.tobytes()
    found.drop("large")
    assert data(view) == expected.tobytes()
    assert (found.view("large", raw=True).dtype, found.view("large", raw=True).count) == (
        "RAW",
        256_000,
    )
    assert (found.view("ids").dtype, found.view("ids").count) == ("RAW", 80)
    assert data(found.view("ids")) == np.arange(10).tobytes()
    assert found.view("none").count == 0
    del found
    assert data(view) == expected.tobytes()


def test_unknown_tensor(model: Path) -> None:
    with pytest.raises(FastmergeError, match="no tensor 'larg'; did you mean 'large'"):
        Checkpoint.open(model).view("larg")


def test_single_file(model: Path) -> None:
    found = Checkpoint.open(model / "model-00002-of-00002.safetensors")
    assert set(found.tensors) == {"ids", "none", "one"}
    assert found.config == Checkpoint.open(model).config  # which lies beside it


def test_changed_under_us(model: Path) -> None:
    """A header read before and weights mapped after a rewrite would not belong together."""
    found = Checkpoint.open(model)
    path = found.files[0]
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(FastmergeError, match=f"{path.name}: changed while"):
        found.view("large")


def test_many_tensors_open_quickly(tmp_path: Path) -> None:
    """36 000 tensors, a large mixture of experts: headers must not be what one waits for."""
    weight_map = {}
    for shard in range(12):
        header = {
            f"model.layers.{shard}.mlp.experts.{number}.down_proj.weight": {
                "dtype": "BF16",
                "shape": [2, 1],
                "data_offsets": [number * 4, number * 4 + 4],
            }
            for number in range(3000)
        }
        text = json.dumps(header).encode()
        name = f"model-{shard:05d}-of-00012.safetensors"
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(12_000))
        weight_map |= dict.fromkeys(header, name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    started = time.process_time()
    found = Checkpoint.open(tmp_path)
    assert len(found.tensors) == 36_000
    assert len(found.fingerprint) == 64
    # About 0.3 s; a quadratic step would take minutes.
    assert time.process_time() - started < 10


# --- identity ---


def poke(path: Path, offset: int) -> None:
    """Flips one byte without touching the file's size or dates."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("where", [0, 4095, 128_000, 255_999])
def test_fingerprint_sees_sampled_pages(model: Path, where: int) -> None:
    before = Checkpoint.open(model)
    large = before.tensors["large"]
    old = before.fingerprint
    poke(before.files[large.file], large.begin + where)
    after = Checkpoint.open(model)
    assert after.stamp == before.stamp
    assert after.fingerprint != old


def test_fingerprint_reads_small_tensors_whole(model: Path) -> None:
    before = Checkpoint.open(model)
    old = before.fingerprint
    for name in ("half", "ids", "one"):
        info = before.tensors[name]
        for offset in (info.begin, info.begin + info.nbytes - 1):
            poke(before.files[info.file], offset)
            assert Checkpoint.open(model).fingerprint != old, name
            poke(before.files[info.file], offset)
    assert Checkpoint.open(model).fingerprint == old


def test_stamp_sees_the_rest(model: Path) -> None:
    """A byte between the samples leaves the fingerprint and moves the stamp."""
    before = Checkpoint.open(model)
    large = before.tensors["large"]
    old, path = before.fingerprint, before.files[large.file]
    poke(path, large.begin + 50_000)
    os.utime(path)
    after = Checkpoint.open(model)
    assert after.fingerprint == old
    assert after.stamp != before.stamp


def test_fingerprint_is_of_content(model: Path, tmp_path: Path) -> None:
    old = Checkpoint.open(model).fingerprint
    other = model.rename(tmp_path / "elsewhere")
    os.utime(other / "model-00001-of-00002.safetensors")
    assert Checkpoint.open(other).fingerprint == old


def test_fingerprint_sees_headers(tmp_path: Path) -> None:
    """The same bytes under another name or type are another model."""
    found = set()
    for name, dtype in [("a", np.int16), ("b", np.int16), ("a", np.float16)]:
        save_file({name: np.zeros(4, dtype)}, tmp_path / "model.safetensors")
        found.add(Checkpoint.open(tmp_path).fingerprint)
    assert len(found) == 3


# --- side files and references ---


def test_side_files(model: Path) -> None:
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
        "added_tokens.json",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
        "configuration_custom.py",
    ]
    for name in [*wanted, "README.md", "training_args.bin", "optimizer.pt", "adapter_config.json"]:
        (model / name).write_text("x")
    (model / "tokenizer_dir.json").mkdir()
    found = side_files(model)
    assert list(found) == sorted([*wanted, "config.json"])
    assert all(path == model / name for name, path in found.items())


def test_resolve_local(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(model)) == model
    monkeypatch.chdir(model.parent)
    assert resolve("model").samefile(model)
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/model") == model


def hub(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[str, str | None]]:
    """Puts a stand-in for huggingface_hub in place; returns what it is asked for."""
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, *, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    stand_in = types.ModuleType("huggingface_hub")
    stand_in.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    stand_in.constants = types.SimpleNamespace(HF_HUB_CACHE="none")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return asked


def test_resolve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, tmp_path)
    assert resolve("org/name") == tmp_path
    assert resolve("org/name@v1.0") == tmp_path
    assert resolve("gpt2", revision="main") == tmp_path
    assert asked == [("org/name", None), ("org/name", "v1.0"), ("gpt2", "main")]
    with pytest.raises(FastmergeError, match="contradicts"):
        resolve("org/name@v1", revision="v2")


@pytest.mark.parametrize(
    "reference", ["", "./absent", "/absent/model", "a/b/c", "../x", "a b/c", "a!"]
)
def test_resolve_is_no_hub_id(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # beside a checkout something may be called x
    asked = hub(monkeypatch, "unused")
    with pytest.raises(FastmergeError, match="no such folder or file"):
        resolve(reference)
    assert asked == []


def test_resolve_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(FastmergeError) as caught:
        resolve("org/name")
    assert str(caught.value) == (
        "org/name: not a local folder, and the Hub did not provide it (ConnectionError: no route)"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FastmergeError, match="pip install huggingface_hub"):
        resolve("org/name")


def test_resolve_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real library, with no network and an empty cache: one line as well."""
    hub_constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FastmergeError) as caught:
        resolve("org/name")
    message = str(caught.value)
    assert message.startswith("org/name: not a local folder, and the Hub did not provide it")
    assert message.isprintable()
