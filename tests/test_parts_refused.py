"""A merge in parts: what is refused, in one line, and what the environment and the commands say."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import fastmerge
from fastmerge import FastmergeError
from fastmerge.cli import main
from fastmerge.output import parts
from fastmerge.output.share import Part, a_part
from tests.test_parts import SHARD_BYTES, in_parts, left, of_kind

# --- what is refused, in one line ---


def refused(call, *words: str) -> None:
    with pytest.raises(FastmergeError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "part", ["0/3", "4/3", "x", "1/0", "1/3/4", "", "-1/2", "1.5/3", "1/100000", (1,), (1.0, 2), 3]
)
def test_what_is_no_part(zoo, part) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    refused(lambda: fastmerge.merge(recipe, out, part=part), "part: ")
    assert not left(out)


def test_parts_of_other_plans(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    fastmerge.merge(recipe, out, part=(1, 3))

    def other(recipe=recipe, part=(2, 3), **options):
        return lambda: fastmerge.merge(recipe, out, part=part, **options)

    refused(other(part=(2, 4)), "in 3 parts, and this is one of 4")
    refused(other(recipe={**recipe, "dtype": "bfloat16"}), "another recipe, seed or size of shards")
    refused(other(max_shard_bytes=SHARD_BYTES), "another recipe, seed or size of shards")
    refused(lambda: fastmerge.merge(recipe, out), "is being merged in parts", "fastmerge finish")
    refused(lambda: fastmerge.finish(out), "2 of 3 parts are missing: 2/3 (not begun), 3/3")
    (zoo.root / "first" / "tokenizer_config.json").write_text("{}")
    refused(other(), "with other files beside the weights")
    (zoo.root / "first" / "tokenizer_config.json").unlink()
    os.utime(zoo.root / "one" / "model.safetensors", (1e9, 1e9))
    refused(other(), "of other inputs")
    assert not out.exists()


def test_a_part_of_another_version(zoo, monkeypatch) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    fastmerge.merge(recipe, out, part=(1, 2))
    monkeypatch.setattr("fastmerge.output.part.__version__", "9.9")
    refused(lambda: fastmerge.merge(recipe, out, part=(2, 2)), "and this is 9.9")


def test_a_merge_without_parts_stands_in_the_way(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"

    def stop(done: int, total: int, _name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge(recipe, out, progress=stop, max_shard_bytes=SHARD_BYTES)
    refused(lambda: fastmerge.merge(recipe, out, part=(1, 2)), "a merge without parts was begun")


def test_adapters_alone_have_no_parts(zoo) -> None:
    of_kind("an adapter", zoo)
    lora = {"model": str(zoo.root / "lora"), "parameters": {"weight": 1.0}}
    recipe = {"merge_method": "linear", "models": [lora]}
    refused(lambda: fastmerge.merge(recipe, zoo.root / "out", part=(1, 2)), "one small file")


def test_files_that_changed_after_their_part(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    folder = zoo.root / ".out.fastmerge-parts"
    in_parts(recipe, out, 2, max_shard_bytes=SHARD_BYTES)
    shard = next(folder.glob("part-00002.0001/*"))
    with shard.open("r+b") as file:
        file.truncate(100)
    refused(lambda: fastmerge.finish(out), shard.name, "part 2/2", "has 100 bytes")
    assert not out.exists()


@pytest.mark.parametrize("kind", ["link", "loose", "hard link"])
def test_strangers_put_nothing_into_the_folder(zoo, kind: str) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    folder = zoo.root / ".out.fastmerge-parts"
    if kind == "link":
        (zoo.root / "theirs").mkdir()
        folder.symlink_to(zoo.root / "theirs")
        refused(lambda: fastmerge.merge(recipe, out, part=(1, 1)), "a link")
        return
    in_parts(recipe, out, 2, max_shard_bytes=SHARD_BYTES)
    assert folder.stat().st_mode & 0o777 == 0o700
    if kind == "loose":
        folder.chmod(0o777)
        refused(lambda: fastmerge.finish(out), "other users could write to it")
        return
    shard = next(folder.glob("part-00001.0001/*"))
    os.link(shard, zoo.root / "another name")
    refused(lambda: fastmerge.finish(out), "hard links")


@pytest.mark.parametrize("fault", ["O_EXCL", "rename"])
def test_a_file_system_without_what_parts_need(zoo, monkeypatch, fault: str) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    opened, renamed = os.open, os.rename
    with monkeypatch.context() as patch:
        if fault == "O_EXCL":
            patch.setattr(
                parts.os, "open", lambda p, f, *m, **d: opened(p, f & ~os.O_EXCL, *m, **d)
            )
        else:
            patch.setattr(
                parts.os, "rename", lambda a, b: shutil.copy(a, b) if a.is_file() else renamed(a, b)
            )
        refused(lambda: fastmerge.merge(recipe, out, part=(1, 1)), "parts cannot meet", fault)


# --- the environment and the command line ---


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (1, 1)),
        ({"ID": "3", "COUNT": "8", "MIN": "0", "MAX": "7"}, (4, 8)),
        ({"ID": "3", "COUNT": "8", "MIN": "1", "MAX": "8"}, (3, 8)),
        ({"ID": "14", "COUNT": "4", "MIN": "10", "MAX": "16", "STEP": "2"}, (3, 4)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (3, 3)),
        ({"ID": "3", "COUNT": "8", "MIN": "1", "MAX": "8", "RANK": "0", "WORLD_SIZE": "1"}, (3, 8)),
        ({"ID": "1", "COUNT": "3", "MIN": "1", "MAX": "9"}, "has gaps"),
        ({"ID": "1", "COUNT": "4", "MIN": "1", "RANK": "1", "WORLD_SIZE": "2"}, "disagree"),
        ({"ID": "1", "MIN": "1"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first', no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "3/2"),
    ],
)  # fmt: skip
def test_the_part_that_the_environment_says(monkeypatch, environment, wanted) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_ARRAY") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        whole = name if name in ("RANK", "WORLD_SIZE") else f"SLURM_ARRAY_TASK_{name}"
        monkeypatch.setenv(whole, value)
    if isinstance(wanted, str):
        refused(lambda: a_part("auto"), wanted)
        return
    part, note = a_part("auto")
    assert part == Part(*wanted) and str(part) in note


def test_the_commands(zoo, capsys) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    file = zoo.root / "recipe.yml"
    file.write_text(json.dumps({**recipe, "dtype": "float32"}))

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*words])
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    code, said, _ = run("plan", str(file), "--part", "1/2", "--json")
    assert code == 0 and json.loads(said)["part"]["files"] == ["model.safetensors"]
    code, said, _ = run("plan", str(file), "--part", "2/2")
    assert code == 0 and "part 2/2    0 of 1 files (none): 0 tensors" in said
    code, _, said = run("merge", str(file), str(out), "--part", "3/2")
    assert (code, said) == (2, "error: --part: 3/2: the parts are 1/2 to 2/2\n")
    code, said, _ = run("merge", str(file), str(out), "--part", "1/2")
    assert code == 0 and f"part 1/2 is done; `fastmerge finish {out}` joins all parts" in said
    code, _, said = run("finish", str(out))
    assert code == 2 and said.startswith(f"error: {out}: 1 of 2 parts are missing: 2/2 (not begun)")
    code, said, _ = run("merge", str(file), str(out), "--part", "2/2", "--json")
    assert code == 0 and json.loads(said)["part"] == "2/2"
    code, said, _ = run("finish", str(out))
    assert code == 0 and said.startswith(f"{out}: 48 tensors of 2 parts, ")
    assert fastmerge.verify(out, recipe).whole


@pytest.mark.parametrize("kind", ["gone", "cut", "zeroed", "all gone"])
def test_a_part_whose_files_are_lost_is_run_again_alone(zoo, kind: str) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    folder = zoo.root / ".out.fastmerge-parts"
    fastmerge.merge(recipe, zoo.root / "whole", max_shard_bytes=SHARD_BYTES)
    in_parts(recipe, out, 2, max_shard_bytes=SHARD_BYTES)
    shard = max(folder.glob("part-00002.0001/*"))
    size = shard.stat().st_size
    if kind == "all gone":
        shutil.rmtree(shard.parent)
    else:
        shard.unlink()
        if kind != "gone":
            shard.write_bytes(bytes(size - 5 if kind == "cut" else size))
    refused(lambda: fastmerge.finish(out), "part 2/2 had written it; run that part again")
    again = fastmerge.merge(recipe, out, part=(2, 2), max_shard_bytes=SHARD_BYTES)
    assert again.resumed < again.tensors
    fastmerge.finish(out)
    for file in (zoo.root / "whole").glob("model*"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_files_of_parts_have_one_mode(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    for number, umask in ((1, 0o077), (2, 0o022)):
        before = os.umask(umask)
        try:
            fastmerge.merge(recipe, out, part=(number, 2), max_shard_bytes=SHARD_BYTES)
        finally:
            os.umask(before)
    before = os.umask(0o027)
    try:
        fastmerge.finish(out)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_damage_in_what_parts_share_is_one_line(zoo) -> None:
    recipe, out = of_kind("ties of the whole model", zoo), zoo.root / "out"
    folder = zoo.root / ".out.fastmerge-parts"
    fastmerge.merge(recipe, out, part=(1, 2), max_shard_bytes=SHARD_BYTES)
    for file in folder.glob("shared-*"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    refused(
        lambda: fastmerge.merge(recipe, out, part=(2, 2), max_shard_bytes=SHARD_BYTES),
        "/.out.fastmerge-parts/shared-", "is damaged",
    )  # fmt: skip
    manifest = folder / "plan" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    refused(lambda: fastmerge.finish(out), str(manifest), "it is damaged: remove the folder")


def test_no_link_leads_finish_to_the_user_s_own_weights(zoo) -> None:
    """Of parts out of an archive: a file of the planned size and header was moved from there."""
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    folder = zoo.root / ".out.fastmerge-parts"
    in_parts(recipe, out, 2, max_shard_bytes=SHARD_BYTES)
    for own in (folder / "part-00002.0001", folder / "plan"):
        own.rename(zoo.root / "own")
        own.symlink_to(zoo.root / "own")
        before = sorted(path.name for path in (zoo.root / "own").rglob("*"))
        refused(lambda: fastmerge.finish(out), f"{own.name}: a link")
        if own.name.startswith("part"):
            again = (2, len(list(folder.glob("part-*.run"))))
            refused(
                lambda again=again: fastmerge.merge(
                    recipe, out, part=again, max_shard_bytes=SHARD_BYTES
                ),
                f"{own.name}: a link",
            )
        assert sorted(path.name for path in (zoo.root / "own").rglob("*")) == before
        own.unlink()
        (zoo.root / "own").rename(own)
    fastmerge.finish(out)


@pytest.mark.parametrize(
    "result",
    [
        {"nonfinite": "x"}, {"nonfinite": None}, {"nonfinite": 1e999}, {"rounding": 0.5},
        {"rounding": "x", "size": 1.0}, {"size": 1.0}, {"checksum": 7},
    ],
)  # fmt: skip
def test_what_a_tensor_came_to_is_checked(zoo, result: dict) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    in_parts(recipe, out, 2, max_shard_bytes=SHARD_BYTES)
    (file,) = (zoo.root / ".out.fastmerge-parts").glob("part-00001.0001.run")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    entry = next(line for line in lines if isinstance(line, list))
    entry[1] |= result
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(lambda: fastmerge.finish(out), "parts")
    assert not out.exists()


def test_a_run_that_no_part_wrote(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    in_parts(recipe, out, 2, max_shard_bytes=SHARD_BYTES)
    (file,) = (zoo.root / ".out.fastmerge-parts").glob("part-00001.0001.run")
    head = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(head | {"pid": 1e999}) + "\n")
    refused(lambda: fastmerge.finish(out), "1/2 (stopped, 0 tensors done)")
    os.truncate(file, 20 << 30)
    refused(lambda: fastmerge.finish(out), file.name, "no part's")
