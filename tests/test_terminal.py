"""Where a command runs: any encoding, streams that are closed or full, names that are hostile."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

import fastmerge
from fastmerge import FastmergeError
from fastmerge.cli import console, main
from fastmerge.units import parse_shard_size

HOSTILE = "a\x1b[31m\nnote: all is well [red]\u202e"
ENCODINGS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C"},
}


def recipe(*models: Path) -> str:
    entries = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    return json.dumps({"merge_method": "linear", "models": entries}, ensure_ascii=False)


@pytest.fixture
def folder(zoo, tmp_path: Path) -> Path:
    base = zoo.base("modèle 模型")
    found = tmp_path / "été"
    found.mkdir()
    (found / "r.yml").write_text(recipe(base, zoo.tune(base, "réglé")), encoding="utf-8")
    (found / "model").symlink_to(base)
    return found


def run(*words: object, shell: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastmerge", *map(str, words)]
    if shell:
        command = ["bash", "-c", f'exec "$@" {shell}', "x", *command]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=120, env=clean | env
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_encoding(folder: Path, encoding: str) -> None:
    env = ENCODINGS[encoding]
    model = folder / "model"
    for words in (
        ("merge", folder / "r.yml", folder / "out"),
        ("plan", folder / "r.yml"),
        ("plan", folder / "r.yml", "--json"),
        ("info", model),
        ("diff", model, model),
        ("methods",),
    ):
        answer = run(*words, **env)
        assert (answer.returncode, "Traceback" in answer.stderr) == (0, False), answer.stderr
        assert answer.stdout
    answer = run("merge", folder / "absent é.yml", folder / "x", **env)
    assert answer.returncode == 2 and answer.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("closed", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), ("2>/dev/full", 0)]
)
def test_closed_streams(folder: Path, closed: str, code: int) -> None:
    answer = run("merge", folder / "r.yml", folder / "out", shell=closed)
    assert (answer.returncode, answer.stderr.count("\n") < 20) == (code, True), answer.stderr
    assert "Traceback" not in answer.stderr
    plain = run("merge", folder / "r.yml", folder / "plain")
    assert plain.returncode == 0
    for name in ("model.safetensors", "config.json"):  # nothing was printed into a file
        assert (folder / "out" / name).read_bytes() == (folder / "plain" / name).read_bytes()


def test_a_full_stdout_is_an_error_and_a_reader_who_leaves_is_none(folder: Path) -> None:
    answer = run("plan", folder / "r.yml", shell=">/dev/full")
    assert answer.returncode == 2
    assert answer.stderr == (
        "error: standard output: cannot be written (No space left on device)\n"
    )
    answer = run("methods", shell="| true; exit ${PIPESTATUS[0]}")
    assert answer.stderr == "" and answer.returncode in (0, 1)


def test_no_threads_left(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(FastmergeError, match="the system refuses another thread"):
        fastmerge.merge(folder / "r.yml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- names ---


def test_names_are_shown_escaped(zoo, capsys: pytest.CaptureFixture[str]) -> None:
    base = zoo.base(dtype="F32")
    (base / f"{HOSTILE}.txt").write_text("x")
    odd = zoo.root / HOSTILE.replace("/", "")
    base.rename(odd)
    tune = zoo.tune(odd, "tune", dtype="F32")
    _rename_tensor(tune)
    _rename_tensor(odd)
    (zoo.root / "r.yml").write_text(json.dumps(json.loads(recipe(odd, tune))))
    for words in (
        ("info", odd),
        ("diff", odd, tune),
        ("plan", zoo.root / "r.yml"),
        ("merge", zoo.root / "r.yml", zoo.root / f"out{HOSTILE}"),
    ):
        with pytest.raises(SystemExit):
            fastmerge.cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\u202e" not in out + err, words
        assert not any(line.startswith("note: all") for line in (out + err).splitlines()), words
        assert "\\x1b[31m\\nnote" in out + err, words


def _rename_tensor(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        tensors[HOSTILE if name == "model.norm.weight" else name] = value
    save_file(tensors, file, {"format": "pt"})


def _rest(terminal: int) -> bytes:
    """What comes until the other side is closed, which a terminal says as EIO."""
    seen = b""
    with open(terminal, "rb", buffering=0) as file, suppress(OSError):
        while part := file.read(1 << 16):
            seen += part
    return seen


def test_a_bar_takes_names_for_what_they_are() -> None:
    """Markup in a name is no markup; on a terminal, where the bar is drawn."""
    main, other = pty.openpty()
    with (
        open(other, "w", encoding="utf-8") as stream,
        console.Progress(HOSTILE, stream=stream) as p,
    ):
        p(1, 2, "[/nothing] " + HOSTILE)
        p(2, 2, "x")
    seen = _rest(main).decode(errors="replace")
    assert "a\\x1b[31m\\nnote: all is well [red]\\u202e" in seen and "\u202e" not in seen


def test_a_bar_draws_the_ends_of_a_name_of_megabytes() -> None:
    """rich takes seconds for one, for each tensor."""
    main, other = pty.openpty()
    with open(other, "w", encoding="utf-8") as stream, console.Progress("x", stream=stream) as p:
        p(1, 2, "\u202e" * 3_000_000)
        assert p._bar is not None
        assert len(p._bar.tasks[0].fields["tensor"]) < 20_000
    os.close(main)


def test_progress_that_nobody_can_see_stops_no_merge() -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    progress = console.Progress("merging", stream=Full())
    for done in range(1, 11):
        progress(done, 10, "x")


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "nbytes"),
    {
        "5B": 5_000_000_000, "5b": 5_000_000_000, "500M": 500_000_000, "2K": None,
        "5GB": 5_000_000_000, "4.5GiB": 9 << 29, "1T": 10**12, "5000000000": 5_000_000_000,
        "5": None, "12KB": None, "0.5MB": None, "1MB": 1_000_000, "2 B": 2_000_000_000,
    }.items(),
)  # fmt: skip
def test_shard_sizes_as_people_write_them(text: str, nbytes: int | None) -> None:
    if nbytes is not None:
        assert parse_shard_size(text, "--max-shard-size") == nbytes
        return
    with pytest.raises(FastmergeError, match=r"less than the 1 MB .* did you mean .*GB\?"):
        parse_shard_size(text, "--max-shard-size")


def test_a_shard_size_reaches_the_engine(zoo) -> None:
    base = zoo.base(vocab=30_000)
    (zoo.root / "r.yml").write_text(recipe(base, zoo.tune(base, "tune")))
    with pytest.raises(SystemExit):
        fastmerge.cli.main(
            ["merge", str(zoo.root / "r.yml"), str(zoo.root / "out"), "--max-shard-size", "1M"]
        )
    assert len(list((zoo.root / "out").glob("model-0*-of-0*.safetensors"))) >= 2


def test_a_name_of_megabytes_is_shown_in_part(tmp_path: Path, capsys) -> None:
    for folder in ("a", "b"):
        name = folder * 3_000_000
        header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(SystemExit):
        main(["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 1700
    assert lines[0].endswith("only in A")


@pytest.mark.parametrize(
    "option", [("--memory-limit", "9" * 5000), ("--max-shard-size", "9" * 400 + "G")]
)
def test_a_size_beyond_all_numbers(folder: Path, option: tuple[str, str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(folder / "recipe.yml"), *option])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "more bytes than any file can have" in said
    assert len(said) < 1800


def test_a_long_word_is_shown_in_part(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["merge", "r.yml", "out", "--seed", "9" * 100_000])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err) < 4000


@pytest.mark.parametrize("command", ["info", "diff"])
def test_no_memory_is_one_line(
    zoo, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A header of 100 MB in a process that has 1 GB ended with a traceback."""

    def none(*_: object, **__: object) -> None:
        raise MemoryError

    folder = str(zoo.base())
    monkeypatch.setattr("fastmerge.models.header.parse_header", none)
    with pytest.raises(SystemExit) as ended:
        main([command, folder, folder][: 2 if command == "info" else 3])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no more memory" in said
