"""`fastmerge verify`: what of a written folder is not as it was written, or not what its recipe
makes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge.cli import main
from fastmerge.compute import reference
from fastmerge.errors import FastmergeError
from fastmerge.models.folder import INDEX
from fastmerge.models.side_files import LINEAGE_FILE
from fastmerge.output.whole import Difference

SHARD_BYTES = 12_000
LAST = "model.layers.2.mlp.up_proj.weight"


def recipe_of(base: Path, *tunes: Path, **more: Any) -> dict[str, Any]:
    each = {"parameters": {"weight": 0.5, "density": 0.5}}
    return {
        "merge_method": "dare_ties",
        "base_model": str(base),
        "models": [{"model": str(tune), **each} for tune in tunes],
        "dtype": "bfloat16",
        **more,
    }


@pytest.fixture(scope="module")
def merged(shared_zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recipe, and what it makes: several shards, side files in folders."""
    # A folder of its own: a worker may begin this file twice.
    zoo = type(shared_zoo)(tmp_path_factory.mktemp("verify"))
    base = zoo.base("base", layers=3)
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    recipe = recipe_of(base, zoo.tune(base, "tune", seed=1, shards=2))
    out = zoo.root / "out"
    fastmerge.merge(recipe, out, max_shard_bytes=SHARD_BYTES)
    assert (out / INDEX).exists()
    return recipe, out


@pytest.fixture
def copy(merged: tuple[dict[str, Any], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged[1], tmp_path / "out"))


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def places(folder: Path, **options: Any) -> list[tuple[str, str]]:
    found = fastmerge.verify(folder, **options)
    assert all(str(difference).isprintable() for difference in found.differences)
    return [(difference.file, difference.tensor) for difference in found.differences]


def place_of(folder: Path, tensor: str) -> tuple[Path, int, int]:
    """The file, first byte and bytes of a tensor, by the safetensors format alone."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    return file, 8 + length + begin, end - begin


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- whole ---


def test_a_written_folder_is_whole(merged, capsys) -> None:
    recipe, out = merged
    for against in (None, recipe):
        found = fastmerge.verify(out, against, sample=None)
        assert found.whole and not found.differences and not found.unchecked
        assert found.checked == found.tensors == 3 * 9 + 3
        assert len(found.recomputed) == (found.tensors if against else 0)
    assert command("verify", out) == 0
    assert "as written (30 of 30 tensors by their checksums" in capsys.readouterr().out


def test_checksums_are_those_of_the_reference(merged) -> None:
    _, out = merged
    tensors = json.loads((out / LINEAGE_FILE).read_text())["tensors"]
    for name, entry in tensors.items():
        path, begin, nbytes = place_of(out, name)
        data = path.read_bytes()[begin : begin + nbytes]
        assert entry["checksum"] == reference.checksum(data)


def test_every_file_is_in_the_lineage(merged) -> None:
    _, out = merged
    lineage = json.loads((out / LINEAGE_FILE).read_text())
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(lineage["files"]) == files
    assert set(lineage["written"]) == files - {LINEAGE_FILE}
    for name, entry in lineage["written"].items():
        data = (out / name).read_bytes()
        assert entry["bytes"] == len(data)
        if "sha256" in entry:
            assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        else:
            length = int.from_bytes(data[:8], "little")
            assert entry["header_sha256"] == hashlib.sha256(data[8 : 8 + length]).hexdigest()


def test_what_tools_leave_in_a_folder_is_no_difference(copy: Path) -> None:
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "x.metadata").write_text("x")
    assert places(copy) == []


# --- damage ---


def test_a_flipped_bit_in_every_tensor_is_seen(copy: Path) -> None:
    names = json.loads((copy / INDEX).read_text())["weight_map"]
    for name in names:
        path, begin, nbytes = place_of(copy, name)
        change_byte(path, begin + nbytes - 1)
    assert sorted(places(copy)) == sorted((file, name) for name, file in names.items())


def test_each_kind_of_damage_names_its_place(copy: Path, capsys) -> None:
    path, begin, nbytes = place_of(copy, LAST)
    with path.open("r+b") as file:  # a page of zeros, where a disk lost a write
        file.seek(begin)
        file.write(bytes(min(nbytes, 4096)))
    (copy / "tokenizer.json").write_text('{"version": "1.1"}')
    (copy / "additional_chat_templates" / "tool.jinja").unlink()
    (copy / "adapter_config.json").write_text("{}")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert set(places(copy)) == {
        (path.name, LAST),
        ("tokenizer.json", ""),
        ("additional_chat_templates/tool.jinja", ""),
        ("adapter_config.json", ""),
        ("config.json", ""),
    }
    assert command("verify", copy) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"{path.name}: tensor '{LAST}': has other bytes than were written" in said
    assert "additional_chat_templates/tool.jinja: is missing" in said
    assert "adapter_config.json: was not written by the merge" in said
    assert said[-1].startswith(f"{copy}: 5 differences")


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(copy: Path) -> None:
    shard = next(copy.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    assert command("verify", copy) == 1


def test_a_cut_a_missing_and_a_foreign_shard(copy: Path) -> None:
    shards = sorted(copy.glob("*.safetensors"))
    os.truncate(shards[0], shards[0].stat().st_size - 1)
    assert places(copy) == [(shards[0].name, "")]
    shards[1].unlink()
    assert shards[1].name in {file for file, _ in places(copy)}
    shards[2].write_bytes(b"not safetensors")
    assert shards[2].name in {file for file, _ in places(copy)}


def test_a_changed_header_is_seen_though_the_weights_are_the_same(copy: Path) -> None:
    """Its __metadata__ says what the model was made of."""
    path = min(copy.glob("*.safetensors"))
    data = path.read_bytes().replace(b"dare_ties", b"dare_tied", 1)
    path.write_bytes(data)
    said = [str(difference) for difference in fastmerge.verify(copy).differences]
    assert f"{path.name}: has another header" in said
    assert any("'fastmerge_recipe' is not the one in" in line for line in said)


def test_a_tensor_taken_from_another_place(copy: Path) -> None:
    """Two tensors of one shape exchanged: the files' own sizes and headers stay."""
    a, b = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    (path_a, at_a, nbytes), (path_b, at_b, _) = place_of(copy, a), place_of(copy, b)
    bytes_a = path_a.read_bytes()[at_a : at_a + nbytes]
    bytes_b = path_b.read_bytes()[at_b : at_b + nbytes]
    assert bytes_a != bytes_b
    for path, at, data in ((path_a, at_a, bytes_b), (path_b, at_b, bytes_a)):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)
    assert sorted(tensor for _, tensor in places(copy)) == [a, b]


def test_json(copy: Path, capsys) -> None:
    path, begin, _ = place_of(copy, LAST)
    change_byte(path, begin)
    assert command("verify", copy, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] is False and found["tensors"] == found["checked"] == 30
    assert found["differences"] == [
        {"file": path.name, "tensor": LAST, "what": "has other bytes than were written"}
    ]


def test_a_file_that_loses_its_end_while_it_is_read(copy: Path, monkeypatch) -> None:
    """A page that is not there is a difference, and no SIGBUS."""
    from fastmerge.output import checksum

    path = max(copy.glob("*.safetensors"))
    before = checksum.checksum_of_view

    def cut(pool: Any, view: Any) -> str:
        os.truncate(path, 4096)
        return before(pool, view)

    monkeypatch.setattr(checksum, "checksum_of_view", cut)
    found = fastmerge.verify(copy)
    assert any("could not be read to its end" in str(d) for d in found.differences)


# --- against the recipe ---


def rewrite_lineage(folder: Path, tensor: str) -> None:
    """What somebody does who changes weights and knows of the checksums."""
    path, begin, nbytes = place_of(folder, tensor)
    lineage = json.loads((folder / LINEAGE_FILE).read_text())
    data = path.read_bytes()[begin : begin + nbytes]
    lineage["tensors"][tensor]["checksum"] = reference.checksum(data)
    (folder / LINEAGE_FILE).write_text(json.dumps(lineage))


def test_changed_weights_with_changed_checksums(merged, copy: Path, tmp_path, capsys) -> None:
    path, begin, _ = place_of(copy, LAST)
    change_byte(path, begin)
    rewrite_lineage(copy, LAST)
    assert places(copy) == []
    assert places(copy, against=merged[0], sample=None) == [(path.name, LAST)]
    recipe = tmp_path / "r.yml"
    recipe.write_text(json.dumps(merged[0]))
    assert command("verify", copy, "--against", recipe, "--all") == 1
    assert f"{path.name}: tensor '{LAST}': has other bytes than the recipe makes" in (
        capsys.readouterr().out
    )


def test_a_sample_finds_a_change_as_often_as_it_should(merged, copy: Path) -> None:
    path, begin, _ = place_of(copy, LAST)
    change_byte(path, begin)
    rewrite_lineage(copy, LAST)
    seen = set()
    for _ in range(40):
        found = fastmerge.verify(copy, merged[0], sample=3)
        assert len(found.recomputed) == 3
        assert found.whole == (LAST not in found.recomputed)
        seen |= set(found.recomputed)
    assert len(seen) > 20  # drawn anew each time


def test_another_recipe_other_models_and_files(merged, copy: Path, shared_zoo) -> None:
    recipe, _ = merged
    other = shared_zoo.tune(Path(recipe["base_model"]), "verify-other", seed=9)
    found = fastmerge.verify(copy, recipe_of(Path(recipe["base_model"]), other), sample=1)
    assert found.differences[0].file == LINEAGE_FILE
    assert "verify-other" in str(found.differences[0])
    found = fastmerge.verify(copy, {**recipe, "dtype": "float32"}, sample=1)
    assert any("is BF16 [" in str(d) and "makes F32" in str(d) for d in found.differences)
    (copy / "tokenizer.json").write_text("{}")
    assert ("tokenizer.json", "") in places(copy, against=recipe, sample=0)


def test_the_seed_that_was_given_is_used(merged, tmp_path) -> None:
    recipe, _ = merged
    fastmerge.merge(recipe, tmp_path / "out", seed=77)
    assert fastmerge.verify(tmp_path / "out", recipe, sample=None).whole


def test_a_folder_without_lineage_is_compared_with_its_recipe(merged, copy: Path) -> None:
    (copy / LINEAGE_FILE).unlink()
    with pytest.raises(FastmergeError, match="has no fastmerge"):
        fastmerge.verify(copy)
    found = fastmerge.verify(copy, merged[0])
    assert found.whole and found.checked == 0 and "own lineage" in found.unchecked[0]


# --- older versions, strangers ---


def of_version(folder: Path, lineage: dict[str, Any], version: str) -> None:
    """As if that version had written the folder: its headers say so too."""
    for path in (folder / LINEAGE_FILE, *folder.glob("*.safetensors")):
        data = json.dumps(lineage).encode() if path.suffix == ".json" else path.read_bytes()
        data = re.sub(rb'(fastmerge_version": ?")[\d.]{5}"', rf'\g<1>{version}"'.encode(), data)
        path.write_bytes(data)


def test_what_an_older_version_did_not_keep_is_said(copy: Path, capsys) -> None:
    path = copy / LINEAGE_FILE
    lineage = json.loads(path.read_text())
    for key in ("written", "checksum"):
        del lineage[key]
    for entry in lineage["tensors"].values():
        del entry["checksum"]
    of_version(copy, lineage, "0.0.9")
    found = fastmerge.verify(copy)
    assert found.whole and found.checked == 0
    assert found.unchecked == (
        "fastmerge 0.0.9 kept no digests of configs, side files and headers ('written')",
        "fastmerge 0.0.9 kept no checksums of 30 of 30 tensors",
    )
    assert command("verify", copy) == 0
    assert capsys.readouterr().err.count("note: not checked: ") == 2
    lineage["checksum"] = "of the future"
    of_version(copy, lineage, "9.9.9")
    assert "of a kind that this version does not know" in fastmerge.verify(copy).unchecked[-1]


@pytest.mark.parametrize(
    "said",
    [
        {"files": 7},
        {"files": [7]},
        {"written": []},
        {"written": {"config.json": 7}},
        {"tensors": {"x": 7}},
        {"tensors": []},
    ],
)
def test_a_lineage_that_no_merge_writes(copy: Path, said: dict[str, Any]) -> None:
    (copy / LINEAGE_FILE).write_text(json.dumps(said))
    with pytest.raises(FastmergeError, match="not what a merge writes there"):
        fastmerge.verify(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\0b", ""])
def test_a_lineage_reads_nothing_outside_the_folder(copy: Path, name: str) -> None:
    (copy.parent / "secret").write_text("x")
    path = copy / LINEAGE_FILE
    lineage = json.loads(path.read_text())
    lineage["written"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    path.write_text(json.dumps(lineage))
    (difference,) = fastmerge.verify(copy).differences
    assert "outside the folder" in str(difference)


def test_links_pipes_and_odd_values(copy: Path) -> None:
    (copy.parent / "secret").write_text("x")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to(copy.parent / "secret")
    (copy / "README.md").unlink()
    os.mkfifo(copy / "README.md")
    path = copy / LINEAGE_FILE
    lineage = json.loads(path.read_text())
    lineage["written"]["config.json"] = {"bytes": {"x": "y" * 10**6}, "sha256": [1]}
    lineage["tensors"][LAST]["checksum"] = {"a": 1}
    lineage["fastmerge_seed"] = "9" * 10_000
    path.write_text(json.dumps(lineage))
    found = fastmerge.verify(copy)
    said = {d.file: str(d) for d in found.differences}
    assert "a link out of the model's folder" in said["tokenizer.json"]
    assert "not a regular file" in said["README.md"]
    assert all(len(line) < 1700 for line in said.values())
    assert "checksums of 1 of 30 tensors" in said[LINEAGE_FILE]


def test_more_differences_than_anybody_reads_are_counted(copy: Path, monkeypatch) -> None:
    from fastmerge.output import whole

    monkeypatch.setattr(whole, "MAX_DIFFERENCES", 3)
    path = copy / LINEAGE_FILE
    lineage = json.loads(path.read_text())
    lineage["files"] += [f"gone-{number}" for number in range(10)]
    path.write_text(json.dumps(lineage))
    found = fastmerge.verify(copy)
    assert len(found.differences) == 3 and found.more_differences == 7 and not found.whole


def test_a_difference_is_one_bounded_line() -> None:
    text = str(Difference("a\x1b[31m" + "b" * 10**6, "c\n" * 10**6, "d" * 10**6))
    assert text.isprintable() and len(text) < 1700


def test_bad_arguments(merged, tmp_path: Path, capsys) -> None:
    recipe, out = merged
    for arguments, words in (
        ((tmp_path / "none",), "not a folder"),
        ((tmp_path,), "has no fastmerge.json"),
        ((7,), "must be a path"),
        ((out, recipe, -1), "not a number of tensors"),
        ((out, recipe, True), "not a number of tensors"),
        ((out, {"merge_method": 7}), "merge_method"),
    ):
        folder, against, sample = (*arguments, None, None)[:3]
        with pytest.raises(FastmergeError, match=words):
            fastmerge.verify(folder, against, sample=sample)
    assert command("verify", tmp_path / "none") == 2
    assert command("verify", out, "--all") == 2
    assert command("verify", out, "--against", "r.yml", "--all", "--sample", 3) == 2
    assert "give one of the two" in capsys.readouterr().err


def interrupt(recipe: dict[str, Any], out: Path, after: int) -> None:
    told: list[str] = []

    def stop(*progress: Any) -> None:
        told.append(progress[2])
        if len(told) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge(recipe, out, max_shard_bytes=SHARD_BYTES, progress=stop, threads=1)


def test_a_resumed_merge_has_the_checksums_of_a_whole_one(merged, tmp_path: Path) -> None:
    recipe, out = merged
    interrupt(recipe, tmp_path / "out", 25)
    report = fastmerge.merge(recipe, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    assert report.resumed and not report.notes
    assert (tmp_path / "out" / LINEAGE_FILE).read_bytes() == (out / LINEAGE_FILE).read_bytes()
    assert fastmerge.verify(tmp_path / "out", recipe, sample=None).whole


def test_a_damaged_unfinished_merge_is_told(merged, tmp_path: Path) -> None:
    """The weights that were changed are merged again, and the report says so."""
    recipe, out = merged
    interrupt(recipe, tmp_path / "out", 29)
    for path in (tmp_path / ".out.fastmerge-partial").glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:4096] + bytes(byte ^ 1 for byte in data[4096:]))
    report = fastmerge.merge(recipe, tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    assert "had changed on the disk and are merged again" in report.notes[-1]
    assert report.resumed == 0
    for path in out.iterdir():
        if path.is_file():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


# --- what was added, and what was taken out of fastmerge.json ---

ADDED = {
    "modeling_evil.py": "raise SystemExit",
    "adapter_config.json": "{}",
    "pytorch_model.bin": "x",
    "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": "modeling_evil.Evil"}}',
}


def add(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def change_lineage(folder: Path, **changed: Any) -> dict[str, Any]:
    lineage = json.loads((folder / LINEAGE_FILE).read_text())
    lineage |= {name: change(lineage[name]) for name, change in changed.items()}
    (folder / LINEAGE_FILE).write_text(json.dumps(lineage))
    return lineage


def test_added_files_that_the_lineage_lists_are_not_of_the_recipe(merged, copy: Path) -> None:
    add(copy, ADDED)
    facts = {
        name: {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in ADDED.items()
    }
    change_lineage(copy, files=lambda own: own + list(ADDED), written=lambda own: own | facts)
    assert places(copy) == []
    found = fastmerge.verify(copy, merged[0], sample=0)
    assert {str(d) for d in found.differences} == {
        f"{name}: is not in what the recipe makes" for name in ADDED
    }
    (copy / LINEAGE_FILE).unlink()
    assert dict(places(copy, against=merged[0], sample=0)).keys() == ADDED.keys()


@pytest.mark.parametrize(
    "name",
    [
        ".git", ".gitignore", ".cache/evil.py", ".cache/huggingface/evil.py",
        "__pycache__/modeling.cpython-312.pyc", "x.pyc", ".x.fastmerge-partial/evil.py",
        "deep/.git/evil.py", ".svn/evil.py", "deep/.gitattributes",
    ],
)  # fmt: skip
def test_files_in_caches_are_seen(merged, copy: Path, name: str) -> None:
    add(copy, {name: "x"})
    assert places(copy) == [(name, "")]
    assert places(copy, against=merged[0], sample=0) == [(name, "")]


def test_what_the_hub_and_git_leave_is_no_difference(merged, copy: Path) -> None:
    own = ".cache/huggingface"
    left = (".gitignore", "CACHEDIR.TAG", "download/config.json.lock", "download/a/b.metadata")
    add(copy, {f"{own}/{name}": "x" for name in left} | {".DS_Store": "x"})
    assert fastmerge.verify(copy, merged[0], sample=0).unchecked == ()
    add(copy, {".git/config": "x"})
    found = fastmerge.verify(copy, merged[0], sample=0)
    assert found.whole
    assert found.unchecked == ("what lies in .git/: version control, of which no loader reads",)


@pytest.mark.parametrize("name", ["tensors", "written", "files", "checksum"])
def test_a_lineage_of_this_version_has_all(copy: Path, capsys, name: str) -> None:
    """Emptied, nothing was compared: as written."""
    (copy / "README.md").write_text("changed")
    change_byte(*place_of(copy, LAST)[:2])
    change_lineage(copy, **{name: lambda own: "x" if isinstance(own, str) else type(own)()})
    assert command("verify", copy) == 1
    said = capsys.readouterr()
    assert said.out.count(f"{LINEAGE_FILE}: ") == 1 and "not checked" not in said.err
    change_lineage(copy, tensors=lambda _: {}, written=lambda _: {}, files=lambda _: [])
    assert {file for file, _ in places(copy)} == {LINEAGE_FILE}


@pytest.mark.parametrize("kind", ["cut", "link", "missing", "dangling"])
@pytest.mark.parametrize("shards", [True, False])
def test_a_weight_file_that_cannot_be_read_is_one_line(
    merged, tmp_path: Path, kind: str, shards: bool
) -> None:
    out = tmp_path / "out"
    fastmerge.merge(merged[0], out, **({"max_shard_bytes": SHARD_BYTES} if shards else {}))
    path = min(out.glob("*.safetensors"))
    if kind == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.rename(tmp_path / "moved")
        if kind != "missing":
            path.symlink_to(tmp_path / ("moved" if kind == "link" else "nothing"))
    assert places(out) == [(path.name, "")]


def test_a_missing_file_of_the_recipe_is_said_to_be_missing(merged, copy: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (copy / name).unlink()
    found = fastmerge.verify(copy, merged[0], sample=0)
    assert sorted(map(str, found.differences)) == [
        "config.json: is missing", "tokenizer.json: is missing",
    ]  # fmt: skip
    (copy / LINEAGE_FILE).unlink()
    found = fastmerge.verify(copy, merged[0], sample=0)
    assert sorted(map(str, found.differences)) == [
        "config.json: is missing; the recipe makes it",
        "tokenizer.json: is missing; the recipe makes it",
    ]
    (copy / "tokenizer.json").symlink_to("/etc/passwd")
    (said,) = [
        d for d in fastmerge.verify(copy, merged[0], sample=0).differences if "tok" in str(d)
    ]
    assert "a link out of the model's folder" in str(said)
