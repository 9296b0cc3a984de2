"""Beyond 2^31 and 2^32 elements, files beyond 5 GB. What is read is pages of zeros, which take no
memory; what is written goes to the same few pages again and again, but for its end.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import _C
from fastmerge.averages import average_recipe
from fastmerge.compute import reference
from fastmerge.models import hub
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.output import upload
from fastmerge.output.checksum import checksums_in_file
from fastmerge.selection import INDEX, MAGNITUDE, MIXED, RANDOM, RANKED, Selection, Sparsify

# Whole merges through the disk, of 4.3 GB tensors: minutes, and 30 GB of disk.
WHOLE = bool(os.environ.get("FASTMERGE_LARGE"))

INT32, UINT32 = 1 << 31, 1 << 32
AROUND = 2048  # elements on either side of a limit that are looked at
ONE, HALF, TWO = 0x3F80, 0x3F00, 0x4000  # bfloat16's bits
_RING_BYTES = 32 << 20
_NORESERVE = 0x4000  # mmap.MAP_NORESERVE, from Python 3.13 on
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_int64]


def holes(count: int, dtype: Any = np.uint16) -> np.ndarray:
    """Zeros that share one page until they are written to."""
    memory = mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=_PRIVATE)
    memory.madvise(mmap.MADV_HUGEPAGE)  # 2 MiB a page fault
    return np.frombuffer(memory, dtype)


def ring(count: int, dtype: Any = np.uint16) -> np.ndarray:
    """An array whose pages are the same few again and again, but for its last 64 MiB or less."""
    array = holes(count, dtype)
    pages = os.memfd_create("ring")
    os.ftruncate(pages, _RING_BYTES)
    try:
        for begin in range(0, array.nbytes - 2 * _RING_BYTES, _RING_BYTES):
            where = array.ctypes.data + begin
            flags = mmap.MAP_SHARED | 0x10  # MAP_FIXED
            got = libc.mmap(where, _RING_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, pages, 0)
            assert got == where
    finally:
        os.close(pages)
    return array


def view_of(array: np.ndarray, code: str = "") -> _C.View:
    code = code or {"uint16": "BF16", "float32": "F32", "uint8": "RAW"}[array.dtype.name]
    count = array.nbytes if code == "RAW" else array.size
    return _C.View(array.ctypes.data, count, code, array)


def sink_of(array: np.ndarray) -> _C.Sink:
    return _C.MemorySink(view_of(array))


@pytest.fixture(scope="module")
def pool() -> _C.Pool:
    return _C.Pool(2)


@pytest.fixture(scope="module")
def far() -> SimpleNamespace:
    """Two tensors that end behind 2^32 elements, zeros but around there, zeros, and room."""
    count = UINT32 + AROUND + 5
    x, y = holes(count), holes(count)
    x[UINT32 - AROUND :] = ONE
    y[INT32], y[-1] = ONE, TWO
    return SimpleNamespace(
        x=x, y=y, zeros=holes(count), out=ring(count), begin=UINT32 - AROUND, end=2 * AROUND + 5
    )


# --- primitives ---


def test_sums_and_products(pool: _C.Pool, far: SimpleNamespace) -> None:
    inputs = [view_of(far.x), view_of(far.y)]
    assert _C.gram(pool, inputs).tolist() == [[far.end, 2], [2, 5]]
    assert _C.combine(pool, inputs, np.array([0.5, 1.0]), sink_of(far.out)) == 0
    tail = far.out[far.begin - 1 :]
    assert tail[0] == 0 and (tail[1:-1] == HALF).all() and tail[-1] == 0x4020  # 2.5
    assert not _C.equal(pool, *inputs)


def kept_of(
    pool: _C.Pool, end: np.ndarray, origin: int, found: Selection, masks: Any = ()
) -> np.ndarray:
    """Which elements of a tensor's ``end``, all of them 1, are kept; it begins at ``origin``."""
    out = np.empty_like(end)
    _C.consensus(
        pool, [view_of(end)], view_of(np.zeros_like(out)), [1.0], [found], sink_of(out), masks,
        elect=False, normalize=False, origin=origin,
    )  # fmt: skip
    return out == ONE


@pytest.mark.parametrize("rule", [MIXED, INDEX])
def test_trims(pool: _C.Pool, far: SimpleNamespace, rule: int) -> None:
    """Exactly so many of those that tie on both sides of 2^32, by their order."""
    keep = 1500
    spec = Sparsify(MAGNITUDE, keep, rule)
    (found,) = _C.select(pool, [view_of(far.x)], view_of(far.zeros), [spec])
    orders = np.arange(far.begin, far.x.size, dtype=np.uint64)
    if rule == MIXED:
        orders = reference.mixed_indices(far.end, far.begin)
    wanted = orders < np.sort(orders)[keep]
    assert found.threshold_bits == 0x3F800000 and found.kept == wanted.sum() == keep
    assert (kept_of(pool, far.x[far.begin :], far.begin, found) == wanted).all()


def test_random_masks(pool: _C.Pool, far: SimpleNamespace) -> None:
    """Four elements have one counter: those of the second place are beyond 2^32 too."""
    drawn = Selection(RANDOM, keep_below=1 << 31, key=12345)
    for origin in (far.begin, (5 << 34) + (1 << 16)):
        words = reference.philox_words(far.end, drawn.key, origin)
        kept = kept_of(pool, far.x[far.begin :], origin, drawn)
        assert (kept == (words < drawn.keep_below)).all()


def test_masks_drawn_by_rank(pool: _C.Pool) -> None:
    """One bit an element: 256 MiB of them."""
    count, length, key, below = INT32 + 32 * 4096, 4096, 99, 1 << 30
    begin = INT32 - AROUND
    x = holes(count)
    x[begin:] = ONE
    spec = Sparsify(RANKED, keep_below=below, keep_below_top=below, key=key, length=length)
    mask = view_of(holes(count // 32, np.float32))
    (found,) = _C.select(pool, [view_of(x)], view_of(holes(count)), [spec], [mask])
    wanted = reference.philox_words(count - begin, key, begin) < below
    assert (kept_of(pool, x[begin:], begin, found, [mask]) == wanted).all()


def read_end(pool: _C.Pool, tensor: _C.View, count: int) -> np.ndarray:
    """The last elements of a tensor that is computed where it is read."""
    out = np.empty(count, np.float32)
    _C.copy(pool, tensor.slice(tensor.count - count, tensor.count), sink_of(out))
    return out


def test_what_is_computed_where_it_is_read(pool: _C.Pool) -> None:
    rows, cols, end = (1 << 17) + 1, 1 << 15, (1 << 15) + 3
    x, base = holes(rows * cols), holes(rows * cols)
    x[-cols:], base[-cols:] = TWO, ONE
    wide = [view_of(x), view_of(base)]

    factors = np.arange(rows, dtype=np.float32)
    made = _C.pointwise("importance", [wide[0]], wide[1], [], factors=factors)
    found = read_end(pool, made, end)
    assert found[:3].tolist() == [0, 0, 0] and (found[3:] == factors[-1]).all()

    left, right = holes(rows, np.float32), np.arange(cols, dtype=np.float32)
    left[-1] = 3
    made = _C.low_rank(wide[1], view_of(left), view_of(right), 1, 2.0)
    found = read_end(pool, made, end)
    assert found[:3].tolist() == [0, 0, 0] and (found[3:] == 1 + 6 * right).all()

    addresses = np.full(rows, x.ctypes.data, np.uint64)
    addresses[-1] += np.uint64(2 * (rows - 1) * cols)
    made = _C.gathered(addresses, ["BF16"], np.zeros(rows, np.uint8), cols, "F32", x)
    found = read_end(pool, made, end)
    assert found[:3].tolist() == [0, 0, 0] and (found[3:] == 2).all()

    codes, across = holes(rows * cols, np.uint8), cols // 128
    codes[-cols:] = 0x38  # 1 in E4M3
    scales = np.ones(-(-rows // 128) * across, np.float32)
    scales[-across:] = 5
    made = _C.dequantised(
        "e4m3", view_of(codes), view_of(scales), rows=rows, cols=cols, block_rows=128,
        block_cols=128,
    )  # fmt: skip
    found = read_end(pool, made, end)
    assert found[:3].tolist() == [0, 0, 0] and (found[3:] == 5).all()


def test_checksums(pool: _C.Pool, far: SimpleNamespace) -> None:
    """Of 8.6 GB: every block's sum, where any is not 0."""
    found = _C.Checksum(far.x.nbytes)
    found.add_all(pool, view_of(far.x, "RAW"))
    sums, first = found.sums(), far.begin * 2 // 4096
    assert sums.size == -(-far.x.nbytes // 4096) and np.flatnonzero(sums)[0] == first
    end = far.x[first * 2048 :]
    alone = _C.Checksum(end.nbytes)
    alone.add_all(pool, view_of(end, "RAW"))
    assert (sums[first:] == alone.sums()).all()


# --- merges in memory ---


def merged(method: str, models: list[np.ndarray], base: int | None, **parameters: Any) -> Any:
    out = {"w": ring(models[0].size)}
    given = [{"w": model} for model in models]
    fastmerge.merge_state_dicts(
        given, method, parameters=parameters, base=base, out=out, seed=5, dtype="bfloat16"
    )
    return out["w"]


@pytest.mark.parametrize(
    ("method", "base", "parameters"),
    [
        ("linear", None, {"weight": [1.0, 3.0, 4.0]}),
        ("ties", 0, {"weight": 1.0, "density": 2000.5 / (INT32 + 1001)}),
    ],
)
def test_a_merge(method: str, base: int | None, parameters: dict[str, Any]) -> None:
    """Beyond 2^31 elements, the same as of its last million alone (a trim: as many of them)."""
    count, end = INT32 + 1001, 1 << 20
    rng = np.random.default_rng(7)
    models = [holes(count) for _ in range(3)]
    for model in models:
        model[-5000:] = (rng.normal(size=5000).astype(np.float32).view(np.uint32) >> 16) & 0xFFFF
    whole = merged(method, models, base, **parameters)[-end:]
    if "density" in parameters:
        parameters = {**parameters, "density": 2000.5 / end}
    ends = [model[-end:].copy() for model in models]
    assert (whole == merged(method, ends, base, **parameters)).all()
    assert np.count_nonzero(whole) > 2000


# --- files ---


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """One that is removed at once: pytest keeps those of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def sparse_model(folder: Path, seed: int, *, count: int = INT32 + 1001) -> Path:
    """A model of one tensor beyond 2^31 elements and a small one behind it, in one file of holes
    but for the ends of both.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    small = 1000
    entries = {
        "model.embed_tokens.weight": ([count], 0, 2 * count),
        "model.norm.weight": ([small], 2 * count, 2 * (count + small)),
    }
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        for name, (shape, begin, end) in entries.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    bits = np.random.default_rng(seed).normal(size=5000 + small).astype(np.float32).view(np.uint32)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * (count + small))
        file.seek(8 + len(text) + 2 * (count - 5000))
        file.write((bits >> 16).astype(np.uint16).tobytes())
    return folder


def end_of(model: Path, count: int) -> np.ndarray:
    file = model / "model.safetensors"
    bits = np.fromfile(file, np.uint16, offset=file.stat().st_size - 2 * count)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_a_file_is_read_behind_5_gb(folder: Path) -> None:
    count = 3 << 30  # elements: 6.4 GB
    place = sparse_model(folder / "m", 1, count=count)
    model = Checkpoint.open(place)
    large, small = model.tensors.values()
    assert (large.count, large.nbytes) == (count, 2 * count)
    bits = np.random.default_rng(1).normal(size=6000).astype(np.float32).view(np.uint32) >> 16
    found = np.empty(6000, np.uint16)
    view = model.view(large.name)
    _C.copy(_C.Pool(1), view.slice(count - 5000, count), sink_of(found[:5000]))
    _C.copy(_C.Pool(1), model.view(small.name), sink_of(found[5000:]))
    assert (found == bits).all()
    model.drop(large.name)
    before = model.fingerprint
    with (place / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert Checkpoint.open(place).fingerprint != before
    plan = fastmerge.plan({"models": [{"model": str(place)}], "merge_method": "passthrough"})
    assert plan.describe()["bytes_in"] == 2 * (count + 1000)


class Ranges(BaseHTTPRequestHandler):
    """Parts of the server's file."""

    def do_GET(self) -> None:
        found = self.path.endswith("/model.safetensors") and "range" in self.headers
        data = b""
        if found:
            begin, end = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
            with self.server.file.open("rb") as file:  # type: ignore[attr-defined]
                file.seek(begin)
                data, size = file.read(end + 1 - begin), os.fstat(file.fileno()).st_size
        self.send_response(206 if found else 404)
        if found:
            self.send_header("content-range", f"bytes {begin}-{begin + len(data) - 1}/{size}")
        self.send_header("etag", '"1"')
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_remote_file_is_read_behind_5_gb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr(hub, "_REMOTE", (*hub._REMOTE, "http://"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    server.file = sparse_model(folder / "m", 2, count=3 << 30) / "model.safetensors"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        plan = fastmerge.plan(average_recipe([f"http://127.0.0.1:{server.server_port}/m"]))
        view = plan.models[0].view("model.norm.weight")
        found = np.empty(view.count, np.uint16)
        _C.copy(_C.Pool(1), view, sink_of(found))
    finally:
        server.shutdown()
    wanted = np.random.default_rng(2).normal(size=6000).astype(np.float32).view(np.uint32) >> 16
    assert (found == wanted[5000:]).all()


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_file_is_written_behind_5_gb(folder: Path, pool: _C.Pool, io: str) -> None:
    """What an interrupted run had written is kept: 6.4 GB, which here nobody wrote."""
    if shutil.disk_usage(folder).free < 10 << 30:
        pytest.skip("needs 6.4 GB of disk, which is reserved and not written")
    begin, data = 6_400_000_000, np.random.default_rng(3).integers(0, 256, 3 << 20, np.uint8)
    path, size = folder / "f", begin + data.nbytes
    staging = _C.Staging(1 << 20, 8, 1)
    file = _C.StagedFile(staging, str(path), size, io=io)
    file.keep(0, begin)
    sums = _C.Checksum(data.nbytes)
    _C.copy(pool, view_of(data), file.sink(begin, data.nbytes, "RAW", checksum=sums))
    file.finish()
    assert path.stat().st_size == size and file.done(0, size)
    places = {"t": (begin, data.nbytes), "before": (begin - 4096, 4096)}
    found = dict(checksums_in_file(pool, path, places))
    assert found["t"] == reference.checksum(data.tobytes())
    assert found["before"] == reference.checksum(bytes(4096))


@pytest.mark.parametrize("size", [5 << 30, 5 << 40])
def test_a_large_object_goes_in_few_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """S3 takes 5 GB at once, or up to 10 000 parts of 5 MiB to 5 GiB: 5 TB in all."""
    (folder / "shard").touch()
    os.truncate(folder / "shard", size)
    asked: list[dict[str, Any]] = []

    def put(*_: object, **options: Any) -> dict[str, str]:
        asked.append(options)
        return {"e_tag": "t"}

    monkeypatch.setattr(upload, "library", lambda: SimpleNamespace(put=put))
    held = SimpleNamespace(_store=None, _asked=lambda name, ask: ask())
    assert upload.Upload._put_file(held, "shard", folder / "shard") == "t"
    (options,) = asked
    part = options["chunk_size"]
    assert 5 << 20 <= part <= 5 << 30 and -(-size // part) <= 10_000
    assert part * options["max_concurrency"] <= max(64 << 20, part)  # of memory


@pytest.mark.skipif(not WHOLE, reason="FASTMERGE_LARGE=1: minutes, and 30 GB of disk")
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("linear", {"weight": 0.5}), ("ties", {"density": 0.5, "weight": 1.0, "trim": "model"})],
)
def test_whole_merges(folder: Path, method: str, parameters: dict[str, Any]) -> None:
    """One file of 8.6 GB in fp32, in parts and whole; the end as of a million entries alone."""
    models = [str(sparse_model(folder / f"m{seed}", seed)) for seed in range(3)]
    recipe: dict[str, Any] = {
        "merge_method": method, "dtype": "float32", "parameters": parameters,
        "models": [{"model": model} for model in models[1:]],
    }  # fmt: skip
    if method == "ties":
        recipe["base_model"] = models[0]
    fastmerge.merge(recipe, folder / "whole", max_shard_bytes=1 << 34)
    file = folder / "whole" / "model.safetensors"
    assert file.stat().st_size > 4 * INT32
    assert not fastmerge.verify(folder / "whole").differences
    end = 1 << 20
    with file.open("rb") as opened:
        opened.seek(-4 * (end + 1000), os.SEEK_END)
        found = np.frombuffer(opened.read(), np.float32)
    wide = [end_of(Path(model), end + 1000) for model in models]
    if method == "linear":
        assert (found == (wide[1] + wide[2]) * np.float32(0.5)).all()
    else:  # half of all entries is more than are not 0: nothing that differs is trimmed
        deltas = np.stack([wide[1] - wide[0], wide[2] - wide[0]])
        sign = np.where(deltas.sum(0) >= 0, 1, -1)
        agree = (np.sign(deltas) == sign) & (deltas != 0)
        mean = np.where(agree, deltas, 0).sum(0) / np.maximum(agree.sum(0), 1)
        np.testing.assert_allclose(found, wide[0] + mean, rtol=1e-6, atol=1e-7)
    shutil.rmtree(folder / "whole")
    for number in (2, 1):
        fastmerge.merge(recipe, folder / "parts", part=(number, 2), max_shard_bytes=1 << 20)
    fastmerge.finish(folder / "parts")
    assert not fastmerge.verify(folder / "parts").differences
    last = max((folder / "parts").glob("*.safetensors"))
    assert last.read_bytes()[-4000:] == found[-1000:].tobytes()
