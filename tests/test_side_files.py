"""What comes along beside the weights: everything that belongs to a model, and nothing else."""

from __future__ import annotations

import os
import threading
import types
from pathlib import Path

import pytest

import fastmerge
from fastmerge import FastmergeError
from fastmerge.models import side_files as module
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.hub import _HUB_IGNORED, _HUB_PATTERNS
from fastmerge.models.side_files import side_files
from fastmerge.output.disk import facts_of, write_file

MODULES = '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]'
BELONGS = (
    "tekken.json", "SYSTEM_PROMPT.txt", "qwen.tiktoken", "bpe.codes", "LICENSE", "USE_POLICY.md",
    "modeling_x.py", "attention.py", "ops/kernels.py", "processing_x.py", "modules.json",
    "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json",
    "2_Dense/model.safetensors", "chat_template.jinja", "additional_chat_templates/tool.jinja",
    "preprocessor_config.json", "assets/a/b.png",
)  # fmt: skip
STAYS = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "adapter_config.json",
    "README.md", "fastmerge.json", "fastmerge_recipe.yml", "mergekit_config.yml",
    ".git/HEAD", ".gitattributes", ".cache/huggingface/x.lock", "__pycache__/modeling_x.pyc",
    ".env", "onnx/model.onnx", "onnx/config.json", "original/params.json",
    "checkpoint-5/model.safetensors", "checkpoint-5/config.json",
)  # fmt: skip


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(MODULES if name == "modules.json" else f"the text of {name}")


def recipe(*models: Path, **more: object) -> dict[str, object]:
    entries = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    return {"merge_method": "linear", "models": entries, **more}


def test_what_belongs_comes_along(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    tune = zoo.tune(base, "tune")
    fill(base, BELONGS + STAYS)
    plan = fastmerge.api.plan(recipe(base, tune))
    fastmerge.merge(plan, tmp_path / "out")
    for name in BELONGS:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    ours = {"README.md", "fastmerge.json", "fastmerge_recipe.yml"}
    for name in set(STAYS) - ours:
        assert not (tmp_path / "out" / name).exists(), name
    for name in ours:
        assert (tmp_path / "out" / name).read_bytes() != (base / name).read_bytes(), name
    said = "\n".join(plan.notes)
    for name in (".env", "onnx/", "original/", "checkpoint-5/", "pytorch_model.bin"):
        assert name in said, name
    assert "the weights in 2_Dense/ are copied as they are, not merged" in said
    assert ".git" not in said and "__pycache__" not in said and "README" not in said


def test_the_hub_is_asked_for_the_same_files() -> None:
    filter_names = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
    asked = set(
        filter_names(
            [*BELONGS, *STAYS, "model-00001-of-00002.safetensors", "config.json"],
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=list(_HUB_IGNORED),
        )
    )
    assert set(BELONGS) | {"model-00001-of-00002.safetensors", "config.json"} <= asked
    for name in ("pytorch_model.bin", "onnx/model.onnx", "original/params.json", ".gitattributes"):
        assert name not in asked, name
    assert "checkpoint-5/model.safetensors" not in asked and "optimizer.pt" not in asked


def test_an_adapters_config_that_is_left_out_is_named(zoo) -> None:
    base = zoo.base()
    fill(base, ("adapter_config.json", "model.safetensors.index.fp32.json"))
    (note,) = fastmerge.api.plan(recipe(base)).notes
    assert note.endswith("(weights in another form): adapter_config.json")


def test_a_tokenizer_is_said_to_be_copied_only_where_one_is(zoo) -> None:
    base = zoo.base()
    asked = recipe(base, zoo.tune(base, "tune"), base_model=str(base), tokenizer_source="base")
    assert "nothing beside the weights of" in "\n".join(fastmerge.api.plan(asked).notes)
    (base / "tekken.json").write_text("{}")
    notes = "\n".join(fastmerge.api.plan(asked).notes)
    assert "nothing beside" not in notes and "tune' has no tokenizer files" in notes


def test_sizes_are_bounded_and_what_is_left_out_is_named(
    zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo.base()
    (base / "small.txt").write_text("x")
    with (base / "huge.dat").open("wb") as file:
        file.truncate(module.MAX_FILE_BYTES + 1)
    found = side_files(base)
    assert "small.txt" in found and "huge.dat" not in found
    assert "huge.dat" in found.notes[0] and "256 MiB" in found.notes[0]
    monkeypatch.setattr(module, "MAX_TOTAL_BYTES", 2000)
    for number in range(9):
        (base / f"data{number}").write_bytes(bytes(1000))
    found = side_files(base)
    assert module.bytes_of(found) <= 2000 and "small.txt" in found
    assert "and 3 more" in "\n".join(found.notes)  # five names, then a count


def test_space_for_side_files_is_asked_for_before_the_merge(
    zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo.base()
    (base / "notes.bin.txt").write_bytes(bytes(100 << 20))
    plan = fastmerge.api.plan(recipe(base, zoo.tune(base, "tune")))
    status = types.SimpleNamespace(f_bavail=50 << 20, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    with pytest.raises(FastmergeError, match=r"no space left: needs 0\.1"):
        fastmerge.merge(plan, tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_no_link_leads_out_of_the_folder(zoo, tmp_path: Path) -> None:
    base, secret = zoo.base(), tmp_path / "secret"
    secret.write_text("key")
    asked = recipe(base, zoo.tune(base, "tune"))
    link = base / "vocab.json"
    for target in ("/proc/self/environ", str(secret), f"../../{secret.name}", "/etc"):
        link.symlink_to(target)
        with pytest.raises(FastmergeError, match=r"vocab\.json: a link (out of|to nothing)"):
            fastmerge.merge(asked, tmp_path / "out")
        link.unlink()
    (base / "real.json").write_text("{}")
    link.symlink_to("real.json")  # one that stays inside is its file
    fastmerge.merge(asked, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_text() == "{}"
    assert not (tmp_path / "out" / "vocab.json").is_symlink()


def test_a_dangling_link_is_an_error(zoo) -> None:
    base = zoo.base()
    (base / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(FastmergeError, match=r"tokenizer\.json: a link to nothing \(.*gone\)"):
        fastmerge.api.plan(recipe(base, zoo.tune(base, "tune")))


def test_only_regular_files_are_opened(zoo) -> None:
    base = zoo.base()
    os.mkfifo(base / "chat_template.jinja")
    with pytest.raises(FastmergeError, match=r"chat_template\.jinja: not a regular file"):
        fastmerge.api.plan(recipe(base, zoo.tune(base, "tune")))
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(FastmergeError, match=r"config\.json: not a regular file"):
        fastmerge.api.plan(recipe(base))


def test_the_hubs_cache_is_followed_into_its_own_blobs_only(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (blobs / "t").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/t")
    assert side_files(snapshot)["tokenizer.json"] == blobs / "t"
    other = tmp_path / "hub" / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "t").write_text("secret")
    (snapshot / "vocab.json").symlink_to(other / "t")
    with pytest.raises(FastmergeError, match="a link out of the model's folder"):
        side_files(snapshot)


def test_a_file_in_a_folder_of_downloads_brings_no_strangers(zoo, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    one = downloads / "a.safetensors"
    one.write_bytes((zoo.base() / "model.safetensors").read_bytes())
    fill(downloads, ("tax.pdf", "tokenizer.json", "photos/me.jpg"))
    assert set(side_files(one)) == {"tokenizer.json"}
    (downloads / "config.json").write_text("{}")  # a model's folder
    assert "tax.pdf" in side_files(one)


def test_a_folder_of_everything_is_no_model(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 20)
    base = zoo.base()
    fill(base, tuple(f"data/{number}" for number in range(30)))
    with pytest.raises(FastmergeError, match="more than 20 files"):
        side_files(base)


def test_many_shards_are_no_folder_of_everything(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmerge.output import whole

    for of in (module, whole):
        monkeypatch.setattr(of, "MAX_ENTRIES", 10)
    base = zoo.base(shards=21)
    out = zoo.root / "out"
    fastmerge.average([base], out, max_shard_bytes=100)
    assert len(list(out.glob("*.safetensors"))) == 21
    assert not fastmerge.verify(out).differences
    fastmerge.average([out], zoo.root / "again")
    fill(out, tuple(f"data/{number}" for number in range(12)))
    with pytest.raises(FastmergeError, match="more than 10 other files"):
        fastmerge.verify(out)


def test_a_file_that_grows_is_not_copied_without_end(
    zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmerge.output import disk

    base = zoo.base()
    (base / "tokenizer.json").write_text("{}")
    plan = fastmerge.api.plan(recipe(base, zoo.tune(base, "tune")))
    monkeypatch.setattr(disk, "MAX_FILE_BYTES", 1000)
    (base / "tokenizer.json").write_bytes(bytes(2000))
    with pytest.raises(FastmergeError, match=r"tokenizer\.json: grew to more than"):
        fastmerge.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what --overwrite replaces ---


def test_overwrite_keeps_off_what_no_merge_wrote(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    tune = zoo.tune(base, "tune")
    fill(base, ("tekken.json", "1_Pooling/config.json"))
    out = tmp_path / "out"
    fastmerge.merge(recipe(base, tune), out)
    fastmerge.merge(recipe(base, tune), out, overwrite=True)  # all that it wrote itself
    for name, word in {
        "notes.md": "notes.md",
        ".git/HEAD": ".git/",
        "1_Pooling/mine.txt": "1_Pooling/",
        "data/rows.csv": "data/",
    }.items():
        fill(out, (name,))
        with pytest.raises(FastmergeError) as caught:
            fastmerge.merge(recipe(base, tune), out, overwrite=True)
        assert f"holds {word}, which no merge wrote" in str(caught.value)
        assert (out / name).exists()
        (out / name).unlink()
        if name != "1_Pooling/mine.txt" and "/" in name:
            (out / name).parent.rmdir()
    (out / "fastmerge.json").unlink()  # then names alone are known
    with pytest.raises(FastmergeError, match="1_Pooling/"):
        fastmerge.merge(recipe(base, tune), out, overwrite=True)


def test_a_folder_that_is_no_models_is_kept_by_the_name_of_what_it_holds(
    zoo, tmp_path: Path
) -> None:
    base = zoo.base()
    fill(tmp_path / "out", (".git/HEAD", "notes.txt"))
    with pytest.raises(FastmergeError, match=r"it holds \.git, notes\.txt; choose another output"):
        fastmerge.merge(recipe(base, zoo.tune(base, "tune")), tmp_path / "out", overwrite=True)


def test_overwrite_takes_a_model_folder_as_it_is_downloaded(zoo) -> None:
    base = zoo.base()
    old = zoo.tune(base, "old")
    fill(old, ("tokenizer.json", "LICENSE", "README.md", ".gitattributes", "pytorch_model.bin"))
    fill(old, (".cache/huggingface/download/x.lock",))
    fastmerge.merge(recipe(base, zoo.tune(base, "tune", seed=3)), old, overwrite=True)
    assert not (old / "LICENSE").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "model.safetensors"])
def test_a_module_is_a_folder(zoo, name: str) -> None:
    """modules.json brought in what sends transformers to another base, or a pickle, or the donor's
    own weights in the merged ones' place.
    """
    base = zoo.base()
    (base / "modules.json").write_text(f'[{{"path": "{name}"}}]')
    if not (base / name).exists():
        (base / name).write_text("{}")
    assert name not in side_files(base) and "modules.json" in side_files(base)


def test_folders_that_are_called_as_weights_stay(zoo) -> None:
    base = zoo.base()
    fill(base, ("model-00001-of-00002.safetensors/x.txt", "a/pytorch_model.bin/x.txt"))
    found = side_files(base)
    assert not any(name.endswith("x.txt") for name in found)
    assert "model-00001-of-00002.safetensors/" in "".join(found.notes)


def test_folders_in_folders_are_followed_so_far(zoo, tmp_path: Path) -> None:
    """700 of them ended in a RecursionError, of os.walk's and rmtree's too."""
    base = zoo.base()
    plan = fastmerge.api.plan(recipe(base, zoo.tune(base, "tune")))
    out = tmp_path / "out"
    fastmerge.merge(plan, out)
    for folder in (base, out):
        (folder / ("d/" * 700)).mkdir(parents=True)
        (folder / ("d/" * 3) / "x.txt").write_text("x")
    found = side_files(base)
    assert "d/d/d/x.txt" in found and "more than 16 deep" in found.notes[0]
    with pytest.raises(FastmergeError, match="folders more than 16 deep"):
        fastmerge.verify(out)
    with pytest.raises(FastmergeError, match="which no merge wrote"):
        fastmerge.merge(plan, out, overwrite=True)


@pytest.mark.parametrize(
    "name", [b"vocab\xff.json", b"a\nb.txt", b"\x1b]52;c;QQ==\x07", b"a\r.txt"]
)
def test_names_that_cannot_be_shown_stay(zoo, tmp_path: Path, name: bytes) -> None:
    """They go to terminals and into fastmerge.json, which `verify` then could not read."""
    base = zoo.base()
    (base / os.fsdecode(name)).write_text("x")
    plan = fastmerge.api.plan(recipe(base, zoo.tune(base, "tune")))
    assert "names that cannot be shown" in "".join(plan.notes)
    assert all(note.isprintable() for note in plan.notes)
    fastmerge.merge(plan, tmp_path / "out")
    assert os.fsdecode(name) not in os.listdir(tmp_path / "out")
    assert fastmerge.verify(tmp_path / "out").whole


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_exchanged_for_a_link_after_the_check_is_not_read(
    zoo, tmp_path: Path, what: str
) -> None:
    base = zoo.base()
    fill(base, ("assets/key", "tokenizer.json"))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("hunter2")
    found = side_files(base)
    taken = base / "assets" if what == "folder" else base / "assets" / "key"
    taken.rename(tmp_path / "old")
    taken.symlink_to(tmp_path / "secrets" / ("" if what == "folder" else "key"))
    for read in (lambda file: write_file(tmp_path / "copy", file), facts_of):
        with pytest.raises(FastmergeError, match=r"assets/key: was exchanged for a link"):
            read(found["assets/key"])
    assert facts_of(found["tokenizer.json"])["bytes"]
    assert (tmp_path / "copy").read_bytes() == b""


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_exchanged_for_a_link_all_the_time_is_never_read(zoo, name: str) -> None:
    base, secret = zoo.base(), zoo.base("secret", seed=9, hidden=64)
    own, link = base / "own", base / "link"
    (base / name).rename(own)
    link.symlink_to(secret / name)
    os.link(own, base / name)
    ends = threading.Event()

    def swap() -> None:
        while not ends.is_set():
            for source in (link, own):
                spare = base / "spare"
                spare.unlink(missing_ok=True)
                os.link(source, spare, follow_symlinks=False)
                spare.rename(base / name)

    thread = threading.Thread(target=swap)
    thread.start()
    refused = 0
    try:
        for _ in range(200):
            try:
                model = Checkpoint.open(base)
                shape = model.tensors["model.norm.weight"].shape
                assert shape == (32,) and model.config["hidden_size"] == 32
            except FastmergeError:
                refused += 1
    finally:
        ends.set()
        thread.join()
    assert refused
