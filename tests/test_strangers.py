"""A stranger's model and recipe: nothing enters by a link, all is bounded, errors are ours."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import safetensors

import fastmerge
from fastmerge import limits
from fastmerge.errors import FastmergeError
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.folder import INDEX
from fastmerge.models.header import read_header, read_object


def refusal(work, *arguments) -> str:
    with pytest.raises(FastmergeError) as caught:
        work(*arguments)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1700
    return message


def header(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- links and what is no file ---


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["out", "up", "fifo", "zero", "socket", "folder"])
def test_only_regular_files_of_the_folder_are_opened(
    zoo, tmp_path: Path, name: str, kind: str
) -> None:
    base = zoo.base()
    elsewhere = tmp_path / "elsewhere"
    (base / name).rename(elsewhere)
    if kind == "out":
        (base / name).symlink_to(elsewhere)
    elif kind == "up":
        (base / name).symlink_to(os.path.relpath(elsewhere, base))
    elif kind == "fifo":
        os.mkfifo(base / name)
    elif kind == "zero":
        (base / name).symlink_to("/dev/zero")
    elif kind == "folder":
        (base / name).mkdir()
    else:
        import socket

        server = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(base)  # a socket's path has 108 bytes
        server.bind(name)
        server.close()  # its file stays
        os.chdir(here)
    assert name in refusal(Checkpoint.open, base)


def sharded(folder: Path) -> None:
    """The single file of ``folder`` as a shard with an index."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = [t.name for t in read_header(folder / "model-00001-of-00001.safetensors", 0)[0].tensors]
    text = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(text))


@pytest.mark.parametrize("what", ["index", "shard", "folder of shards"])
def test_an_index_and_shards_lie_in_the_folder(zoo, tmp_path: Path, what: str) -> None:
    base = zoo.base()
    sharded(base)
    shard = base / "model-00001-of-00001.safetensors"
    Checkpoint.open(base)
    if what == "folder of shards":
        (tmp_path / "elsewhere").mkdir()
        shard.rename(tmp_path / "elsewhere" / shard.name)
        (base / "sub").symlink_to(tmp_path / "elsewhere")
        text = json.loads((base / INDEX).read_text())
        places = dict.fromkeys(text["weight_map"], f"sub/{shard.name}")
        (base / INDEX).write_text(json.dumps({"weight_map": places}))
    else:
        place = shard if what == "shard" else base / INDEX
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    assert "a link out of the model's folder" in refusal(Checkpoint.open, base)


def test_links_inside_the_folder_and_the_hubs_own_are_followed(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    (base / "model.safetensors").rename(base / "weights")
    (base / "model.safetensors").symlink_to("weights")
    Checkpoint.open(base)
    (tmp_path / "alias").symlink_to(base)  # the user's own link
    Checkpoint.open(tmp_path / "alias")
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("weights", "config.json")):
        (base / name).rename(repository / "blobs" / str(number))
    (snapshot / "model.safetensors").symlink_to("../../blobs/0")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    assert Checkpoint.open(snapshot).config
    (snapshot / "config.json").unlink()
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "config.json").symlink_to(tmp_path / "secret.json")
    assert "a link out of the model's folder" in refusal(Checkpoint.open, snapshot)


# --- bounds ---


# What is no bound on a stranger's input: of numbers, of what we write, of what a command is given.
_OTHER_BOUNDS = {
    "_MAX_SCORE", "_MAX_PREFIXES", "_MAX_SAMPLES", "_MAX_NAME_BYTES",
    "_MAX_CHUNK_BYTES", "_MAX_URL_LETTERS", "MAX_SHARD_BYTES", "MAX_PARTS",
}  # fmt: skip


def test_limits_stand_in_one_place() -> None:
    """SECURITY.md says where: each is used, and no other module has one of its own."""
    package = Path(fastmerge.__file__).parent
    texts = {file.name: file.read_text() for file in package.rglob("*.py")}
    ours = texts.pop("limits.py")
    stated = re.findall(r"^(MAX_[A-Z_]+) = ", ours, re.MULTILINE)
    assert len(stated) > 30
    for name in stated:
        assert any(re.search(rf"\b{name}\b", text) for text in texts.values()), name
    own = {
        name
        for text in texts.values()
        for name in re.findall(r"^(_?MAX_[A-Z_]+)(?:: \w+)? = ", text, re.MULTILINE)
    }
    assert own <= _OTHER_BOUNDS


def test_a_million_dimensions_are_not_multiplied(tmp_path: Path) -> None:
    shape = ",".join(["4294967296"] * 1_000_000)
    text = f'{{"x":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}'.encode()
    message = refusal(read_header, header(tmp_path / "x.safetensors", text, b"0000"), 0)
    assert "1000000 dimensions; at most 64" in message


@pytest.mark.parametrize("value", ["[]", "{}"])
def test_lists_by_the_million_are_not_made(tmp_path: Path, value: str) -> None:
    """100 MB of them took 2.5 GiB, where each is no part of a tensor's entry."""
    many = f'{{"x": [{f"{value}," * 1_000_000}0]}}'.encode()
    index = tmp_path / "index.json"
    index.write_bytes(many)
    file = header(tmp_path / "x.safetensors", many)
    tracemalloc.start()
    try:
        for read in (lambda: read_header(file, 0), lambda: read_object(index, strict=True)):
            assert "more lists and mappings" in refusal(read)
        assert tracemalloc.get_traced_memory()[1] < 6 * len(many)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["[{" * 600_000, '\\\\\\"[' * 400_000, '{\\"[\\\\' * 200_000])
def test_brackets_in_names_are_no_lists(tmp_path: Path, name: str) -> None:
    text = f'{{"{name}":{{"dtype":"U8","shape":[],"data_offsets":[0,1]}}}}'.encode()
    file = header(tmp_path / "x.safetensors", text, b"0")
    (found,) = read_header(file, 0)[0].tensors
    with safetensors.safe_open(file, "numpy") as theirs:
        assert list(theirs.keys()) == [found.name]


def test_the_smallest_tensors_pass(tmp_path: Path) -> None:
    """As many brackets as entries can have in their bytes; the names make it a little less."""
    text = "".join(
        f'"{i:x}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{i + 1}]}},' for i in range(30_000)
    )
    file = header(tmp_path / "x.safetensors", f"{{{text[:-1]}}}".encode(), bytes(30_000))
    assert len(read_header(file, 0)[0].tensors) == 30_000


def test_limits_on_files_that_are_read_whole(tmp_path: Path) -> None:
    config, recipe = tmp_path / "config.json", tmp_path / "recipe.yml"
    with config.open("wb") as file:
        file.truncate(limits.MAX_CONFIG_BYTES + 1)
    assert "not a config" in refusal(read_object, config)
    with recipe.open("wb") as file:
        file.truncate(limits.MAX_RECIPE_BYTES + 1)
    assert "not a recipe" in refusal(fastmerge.api.plan, recipe)
    assert "not a recipe" in refusal(fastmerge.api.plan, Path("/dev/zero"))
    assert "not a recipe" in refusal(fastmerge.api.plan, "a: 1\n" * limits.MAX_RECIPE_BYTES)


_PLACES = (
    "models: *b", "models: [{model: *b}]", "models: [{model: m, parameters: {weight: *b}}]",
    "models: [{model: {path: m, revision: *b}}]", "models: [{model: {path: *b}}]",
    "base_model: *b", "base_model: {model: {path: m, revision: *b}}", "dtype: *b",
    "parameters: *b", "parameters: {t: [{value: *b}]}", "parameters: {t: [{filter: *b, value: 1}]}",
    "tokenizer: *b", "tokenizer: {source: *b}", "tokenizer: {tokens: {a: {source: *b}}}",
    "tokenizer: {tokens: {a: {source: {kind: *b}}}}", "tokenizer_source: *b", "chat_template: *b",
    "slices: *b", "slices: [{sources: *b}]", "slices: [{sources: [{model: m, layer_range: *b}]}]",
    "modules: *b", "modules: {default: *b}",
)  # fmt: skip


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("levels", [4, 11])
def test_alias_bombs_where_text_is_expected(place: str, levels: int) -> None:
    """10^5 values are within the bounds and 10^12 are not: neither is ever written out."""
    lines = ["x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*x{level - 1}"] * 10)
        lines.append(f"x{level}: &x{level} [{aliases}]")
    if "models" not in place and "slices" not in place and "modules" not in place:
        place += "\nmodels: [{model: m}]"
    # Under keys that mergekit ignores, for the aliases of what follows.
    text = "\n".join([*lines, "merge_method: linear", place.replace("*b", f"*x{levels}")])
    assert "x0" not in refusal(fastmerge.api.plan, text)


@pytest.mark.parametrize("more", [{}, {"block_configs": [{}]}])
def test_layers_are_not_counted_one_by_one(zoo, more) -> None:
    base = zoo.base()
    config = json.loads((base / "config.json").read_text())
    recipe = {"merge_method": "linear", "models": [{"model": str(base)}, {"model": str(base)}]}
    for count in (1 << 64, 9_999):
        written = config | {"num_hidden_layers": count} | more
        (base / "config.json").write_text(json.dumps(written))
        if count > limits.MAX_LAYERS or not more:
            assert "layer" in refusal(fastmerge.api.plan, recipe | {"parameters": {"weight": 1}})


# --- no foreign exception ---


@pytest.mark.parametrize(
    "value",
    [
        "!!bool 7", "!!timestamp x", "!!int ''", "!!int x", "!!float ''", "!!float x", "!!null x",
        "!!binary ?", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]",
        "!!python/object:os.system x", "!!str [a]", "!!map x", "!!seq x", '"\\ud800"', "2020-99-99",
        "2020-01-01", "0b", "0x", "1:99", "!x y", "!!merge x", "<<", "'" + "x" * 900_000 + "'",
        '"\\U00110000"', '"\\UFFFFFFFF"', "1:" * 300 + "1", "1:" * 300 + "1.0",
        "1:" * 150_000 + "1", "0x" + "f" * 5000, "0b" + "1" * 50_000, "9" * 5000, "!!set x",
        "!!omap x", "!!pairs x",
    ],
)  # fmt: skip
def test_tags_and_odd_scalars_are_one_line(value: str) -> None:
    for text in (
        f"merge_method: {value}\nmodels: [{{model: m}}]\n",
        f"merge_method: linear\nmodels: [{{model: {value}}}]\n",
        f"merge_method: linear\nmodels: [{{model: m, parameters: {{weight: {value}}}}}]\n",
        f"merge_method: linear\nmodels: [{{model: m}}]\ntokenizer: {{source: {value}}}\n",
        f"merge_method: linear\nmodels: [{{model: m}}]\n? {value}\n: 1\n",
        f"merge_method: linear\n<<: {value}\nmodels: [{{model: m}}]\n",
        f"{value}\n\n",
    ):
        refusal(fastmerge.api.plan, text)


def test_a_number_that_python_does_not_write_is_one_line() -> None:
    for number in (10**5000, -(10**5000)):
        for recipe in (
            {"merge_method": number},
            {number: 1},
            {
                "merge_method": "linear",
                "models": [{"model": "m", "parameters": {"weight": number}}],
            },
        ):
            assert "a number of 16610 bits" in refusal(fastmerge.api.plan, recipe)
        for chosen in ((number, number), (number, 2)):
            said = refusal(lambda chosen=chosen: fastmerge.merge("x.yml", "out", part=chosen))
            assert "a number of 16610 bits" in said


def test_half_a_surrogate_pair_is_no_text(zoo) -> None:
    half = "\ud800"
    for recipe in (
        {"merge_method": "linear", "models": [{"model": half}]},
        {"merge_method": "linear", half: 1, "models": [{"model": "m"}]},
        f"merge_method: linear\nmodels: [{{model: {half}}}]\n",
    ):
        refusal(fastmerge.api.plan, recipe)
    base = zoo.base()
    (base / "config.json").write_text('{"model_type": "\\ud800"}')
    assert "surrogate" in refusal(Checkpoint.open, base)
    (base / "config.json").write_text('{"model_type": "\\ud83d\\ude00"}')
    assert Checkpoint.open(base).config["model_type"] == "\U0001f600"


def test_minus_zero_is_no_size(tmp_path: Path) -> None:
    for text in ('"shape":[-0],"data_offsets":[0,0]', '"shape":[0],"data_offsets":[-0,0]'):
        path = header(tmp_path / "x", f'{{"x-0":{{"dtype":"F32",{text}}}}}'.encode())
        assert "-0 is no whole number" in refusal(read_header, path, 0)
    text = b'{"x-0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    assert read_header(header(tmp_path / "x", text), 0)[0].tensors[0].name == "x-0"


def test_loading_never_asks_for_a_models_code(zoo, tmp_path: Path) -> None:
    """As a user at a terminal, who would be asked, and answers yes."""
    pytest.importorskip("transformers")
    base = zoo.base()
    ran = tmp_path / "ran"
    (base / "configuration_x.py").write_text(f"open({str(ran)!r}, 'w')")
    (base / "modeling_x.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "strangers",
        "auto_map": {
            "AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M",
        },
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["modeling_x.T", None]}})
    )
    code = (
        "import sys; from fastmerge import llama, FastmergeError\n"
        "for load in (llama.load, llama.load_tokenizer):\n"
        "    try: load(sys.argv[1])\n"
        "    except FastmergeError as error: print('refused', error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(base)], input="y\ny\ny\ny\n", text=True,
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert found.stdout.count("refused") == 2, found.stdout + found.stderr
    assert "[y/N]" not in found.stdout + found.stderr
    assert not ran.exists()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_is_made_of_the_folders_own_files(zoo, tmp_path: Path, place: str) -> None:
    """transformers opens what `vocab` and `vocab_file` name, and the result is written."""
    pytest.importorskip("transformers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "secret").write_text("\n".join([*special, "hunter2"]))
    pair = [zoo.base("one", seed=1, vocab=8), zoo.base("two", seed=2, vocab=8)]
    for folder, last in zip(pair, "cd", strict=True):
        (folder / "vocab.txt").write_text("\n".join([*special, "a", "b", last]))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    said = {"tokenizer_class": "BertTokenizer"}
    said |= dict.fromkeys(("vocab", "vocab_file", "tokenizer_file"), str(tmp_path / "secret"))
    (pair[0] / place).write_text(json.dumps(said))
    recipe = {
        "merge_method": "linear",
        "tokenizer_source": "union",
        "base_model": str(pair[0]),
        "models": [{"model": str(folder)} for folder in pair],
        "parameters": {"weight": 1.0},
    }
    fastmerge.merge(recipe, tmp_path / "out")
    ids = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(ids) == {*special, "a", "b", "c", "d"}


def test_the_number_of_an_added_token_is_bounded(zoo) -> None:
    pair = [zoo.base("one", seed=1), zoo.base("two", seed=2)]
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
    for folder in pair:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}
    (pair[0] / "tokenizer_config.json").write_text(json.dumps(config))
    recipe = {"merge_method": "linear", "tokenizer_source": "union"}
    recipe |= {"models": [{"model": str(folder)} for folder in pair]}
    recipe |= {"parameters": {"weight": 1.0}}
    assert "added_tokens_decoder" in refusal(fastmerge.api.plan, recipe)


@pytest.mark.parametrize("number", [limits.MAX_TOKENS, 2**22, 2**31])
@pytest.mark.parametrize("place", ["vocab", "added"])
def test_a_hole_among_tokens_is_bounded(zoo, place: str, number: int) -> None:
    """A union fills it: one of 2^22 ids took 11 s, 2.1 GiB and a file of 300 MB."""
    pair = [zoo.base("one", seed=1), zoo.base("two", seed=2)]
    for folder, last in zip(pair, (number, 1), strict=True):
        vocab, added = {"a": 0}, [{"id": 1, "content": "b", "special": False}]
        if place == "vocab":
            vocab["c"] = last
        else:
            added.append({"id": last, "content": "c", "special": False})
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    recipe = {"merge_method": "linear", "tokenizer_source": "union"}
    recipe |= {"models": [{"model": str(folder)} for folder in pair]}
    recipe |= {"parameters": {"weight": 1.0}}
    said = refusal(fastmerge.api.plan, recipe)
    assert "tokenizer" in said and str(limits.MAX_TOKENS) in said


def test_a_suggested_command_quotes_its_arguments(tmp_path: Path) -> None:
    import shlex

    folder = tmp_path / 'x\'; touch pwned; "$(touch pwned)"'
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    message = refusal(Checkpoint.open, folder)
    words = shlex.split(message[message.index("python -c") :])
    assert words[:2] == ["python", "-c"] and len(words) == 3
    assert repr(str(folder)) in words[2]


def test_a_plan_names_code_that_an_output_would_bring(zoo) -> None:
    base = zoo.base()
    for name in ("modeling_x.py", "configuration_x.py"):
        (base / name).write_text("pass\n")
    config = json.loads((base / "config.json").read_text())
    config["text_config"] = {"attn_implementation": "somebody/kernel"}
    (base / "config.json").write_text(json.dumps(config))
    recipe = {"merge_method": "passthrough", "models": [{"model": str(base)}]}
    notes = fastmerge.plan(recipe).notes
    assert f"code of '{base}' is copied, not run: 'configuration_x.py' and 1 more" in notes
    hub = [note for note in notes if "'attn_implementation' names code on the Hub" in note]
    assert len(hub) == 1 and "'somebody/kernel', which transformers would fetch" in hub[0]


@pytest.mark.parametrize("opening", ['{"text_config":', '{"x":', '{"quantization_config":', "["])
def test_what_is_nested_deeply_is_refused_before_somebody_walks_it(zoo, opening: str) -> None:
    """Between what the parser takes and what a walk one call further in does lay a few levels."""
    base = zoo.base()
    asked = {
        "merge_method": "linear",
        "models": [{"model": str(base)}],
        "parameters": {"weight": 1},
    }
    for depth in (limits.MAX_NESTING, 500, *range(960, 981), 100_000):
        closing = ("}" if ":" in opening else "]") * depth
        (base / "config.json").write_text(f'{{"a":{opening * depth}1{closing}}}')
        assert "nested too deeply" in refusal(fastmerge.api.plan, asked)
    (base / "config.json").write_text(f'{{"a":{"[" * 98}{"]" * 98}}}')
    fastmerge.api.plan(asked)
    shape = "[" * 973 + "]" * 973
    text = f'{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    refusal(read_header, header(base / "x.safetensors", text), 0)
