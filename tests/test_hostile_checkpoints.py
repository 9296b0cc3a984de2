"""Distributed checkpoints of strangers: their index is a pickle, their pieces are too."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge.errors import FastmergeError
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.distributed import Distributed
from fastmerge.models.distributed_index import Piece, overlap, read_index
from tests.test_average import save

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import torch

    return save({"w": torch.arange(24.0).reshape(6, 4)}, tmp_path / "step")


def refused(folder: Path) -> str:
    with pytest.raises(FastmergeError) as caught:
        Distributed(folder, folder).view("w")
    assert str(caught.value).isprintable()
    return str(caught.value)


def edited(folder: Path, edit: Callable[[Any], object]) -> Path:
    index = pickle.loads((folder / ".metadata").read_bytes())
    edit(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def test_an_index_changes_no_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of (None, {...}) is set as attributes: of a class, for the whole process."""
    before = Path.exists
    monkeypatch.setattr(Path, "exists", before)  # which puts it back, whatever happens
    name = b"\x8c\x07pathlib\x8c\x04Path\x93"
    told = b"N}(\x8c\x06exists" + name + b"u\x86b."
    (folder / ".metadata").write_bytes(b"\x80\x04" + name + told)
    assert "not an index of torch's" in refused(folder)
    assert Path.exists is before


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # room for 2^32 objects
        b"\x80\x02Np4294967295\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
        b"\x80\x04cos\nsystem\n(\x8c\x04true\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x011\x85R.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04" + b"(" * 10_000 + b".",
        b"",
        b".",
        b"\x80\x04]\x94h\x00a.",  # a list in itself
    ],
)
def test_pickles_that_are_no_index(folder: Path, text: bytes) -> None:
    (folder / ".metadata").write_bytes(text)
    assert ".metadata: " in refused(folder)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "size",
    [(-1, 4), ("6", "4"), None, 7, (True, 4), (2**70, 4), (6,) * 65, (2**40, 2**40), (6, 4, 1)],
)
def test_shapes_that_are_none(folder: Path, size: Any) -> None:
    edited(folder, lambda index: setattr(index.state_dict_metadata["w"], "size", size))
    assert "not an index of torch's" in refused(folder)


def test_values_of_other_kinds(folder: Path) -> None:
    good = (folder / ".metadata").read_bytes()

    def edits() -> Any:
        yield lambda index: setattr(index.state_dict_metadata["w"], "properties", 7)
        yield lambda index: setattr(index.state_dict_metadata["w"], "chunks", 7)
        yield lambda index: setattr(index.state_dict_metadata["w"], "chunks", [7])
        yield lambda index: setattr(index.state_dict_metadata["w"].properties, "dtype", "float32")
        yield lambda index: index.state_dict_metadata.update({7: 8})
        yield lambda index: setattr(index, "state_dict_metadata", [])
        yield lambda index: setattr(index, "storage_data", None)
        yield lambda index: setattr(index, "storage_data", {7: 8})
        for field, value in (("offset", -5), ("offset", "a"), ("length", 2**63), ("length", None)):
            for_all = {field: value}
            yield lambda index, said=for_all: [
                vars(place).update(said) for place in index.storage_data.values()
            ]
        yield lambda index: [
            vars(place).update(relative_path=7) for place in index.storage_data.values()
        ]
        yield lambda index: [
            vars(place).update(transform_descriptors=["zstd"])
            for place in index.storage_data.values()
        ]

    for edit in edits():
        (folder / ".metadata").write_bytes(good)
        assert ".metadata: " in refused(edited(folder, edit))
    (folder / ".metadata").write_bytes(good)
    edited(folder, lambda index: setattr(index, "planner_data", {"w": (["a"], 7)}))
    assert list(Distributed(folder, folder).tensors) == ["w"]


def test_pieces_that_overlap_leave_nothing_out(folder: Path) -> None:
    """As many elements as the tensor has, and half of them nobody's: memory of who knows what."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    def half(index: Any) -> None:
        piece = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((3, 4)))
        index.state_dict_metadata["w"].chunks = [piece, piece]

    assert "its pieces overlap" in refused(edited(folder, half))


def test_a_piece_told_again_and_again(folder: Path) -> None:
    """Two bytes of a pickle repeat a list of any length."""
    data = (folder / ".metadata").read_bytes()

    def many(index: Any) -> None:
        index.state_dict_metadata["w"].chunks *= 100_000

    edited(folder, many)
    assert len((folder / ".metadata").read_bytes()) < len(data) + 400_000
    assert "told many times" in refused(folder)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_overlap_where_numpy_says_so(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        shape = tuple(rng.integers(1, 7, size=rng.integers(1, 4)))
        filled, pieces = np.zeros(shape, int), []
        for _ in range(rng.integers(1, 5)):
            begin = tuple(int(rng.integers(0, n)) for n in shape)
            sizes = tuple(
                int(rng.integers(0, n - a + 1)) for a, n in zip(begin, shape, strict=True)
            )
            box = zip(begin, sizes, strict=True)
            filled[tuple(slice(a, a + n) for a, n in box)] += 1
            pieces.append(Piece(begin, sizes, "", 0, 0))
        assert overlap(pieces) == bool((filled > 1).any())


def stored(folder: Path) -> tuple[Path, bytes]:
    (file,) = folder.glob("*.distcp")
    return file, file.read_bytes()


def replaced(folder: Path, content: bytes) -> Path:
    """The piece is ``content``, at the end of the file."""
    file, data = stored(folder)
    file.write_bytes(data + content)

    def edit(index: Any) -> None:
        for place in index.storage_data.values():
            place.offset, place.length = len(data), len(content)

    return edited(folder, edit)


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.mkdir, (Path("ran"),)


@pytest.mark.parametrize("kind", ["code", "text", "other", "narrow", "wide", "sparse", "packed"])
def test_pieces_that_are_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    made: dict[str, Any] = {
        "code": Evil(), "other": {"w": torch.zeros(6, 4)}, "narrow": torch.zeros(6, 3),
        "wide": torch.zeros(6, 4, dtype=torch.float64), "sparse": torch.zeros(6, 4).to_sparse(),
        "packed": torch.zeros(6, 4),
    }  # fmt: skip
    if kind != "text":
        torch.save(made[kind], buffer)
    content = buffer.getvalue() or b"x" * 5000
    if kind == "packed":
        packed = io.BytesIO()
        with (
            zipfile.ZipFile(buffer) as old,
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        content = packed.getvalue()
    said = refused(replaced(folder, content))
    assert "tensor 'w'" in said and ("packed" in said) == (kind == "packed")
    assert not Path("ran").exists()


def test_only_regular_files_of_the_folder_are_read(folder: Path, tmp_path: Path) -> None:
    file, data = stored(folder)
    file.unlink()
    os.mkfifo(file)
    assert "not a regular file" in refused(folder)
    file.unlink()
    (tmp_path / "secret").write_bytes(data)
    file.symlink_to(tmp_path / "secret")
    assert "a link out of the model's folder" in refused(folder)


def test_a_tensor_larger_than_its_bytes(folder: Path) -> None:
    import torch

    def grow(index: Any) -> None:
        about = index.state_dict_metadata["w"]
        about.size = about.chunks[0].sizes = torch.Size((1 << 20, 1 << 20))

    assert "cannot be read" in refused(edited(folder, grow))


def test_the_index_of_torch_itself(tmp_path: Path) -> None:
    """Positive control: names, shapes, types and places of what torch writes."""
    import torch

    saved = {"model": {"a.b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.ones(())}}
    folder = save(saved | {"optimizer": {"lr": 0.1}}, tmp_path / "own")
    entries = {entry.key: entry for entry in read_index((folder / ".metadata").read_bytes())}
    assert entries["model.a.b"].path == ("model", "a.b")
    assert (entries["model.a.b"].dtype, entries["model.a.b"].shape) == ("bfloat16", (2, 3))
    (piece,) = entries["model.c"].pieces or ()
    assert (piece.begin, piece.shape, piece.file) == ((), (), "__0_0.distcp")
    assert set(Distributed(folder, folder).tensors) == {"a.b", "c"}
    assert not isinstance(Distributed(folder, folder), Checkpoint)
