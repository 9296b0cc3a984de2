"""mergekit's command lines, with fastmerge put in front."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fastmerge.cli import main

LINEAR = """\
merge_method: linear
models:
- {model: blur, parameters: {weight: 1}}
- {model: chat, parameters: {weight: 3}}
"""
CHAIN = """\
name: first
merge_method: linear
models:
- {model: blur, parameters: {weight: 1}}
- {model: chat, parameters: {weight: 1}}
---
name: aside
merge_method: passthrough
models: [{model: math}]
---
merge_method: linear
models:
- {model: first, parameters: {weight: 1}}
- {model: dolphin, parameters: {weight: 1}}
"""


@pytest.fixture(autouse=True)
def written(family) -> None:
    (family.root / "recipe.yml").write_text(LINEAR)
    (family.root / "chain.yml").write_text(CHAIN)
    (family.root / "blur" / "tokenizer_config.json").write_text("{}")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0), capsys.readouterr().err


def same(family, one: str, two: str) -> bool:
    left, right = family.read(Path(one)), family.read(Path(two))
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def test_mergekit_yaml_takes_mergekits_options(family, capsys) -> None:
    assert run(capsys, "merge", "recipe.yml", "plain")[0] == 0
    words = (
        "--no-cuda --device cpu --allow-crimes --lazy-unpickle -vv -j 2 --out-shard-size 5B "
        "--random-seed 3 --clone-tensors --lora-merge-cache /tmp/x --no-async-write"
    )
    code, told = run(capsys, "mergekit-yaml", "recipe.yml", "out", *words.split())
    assert code == 0 and same(family, "plain", "out")
    (note,) = [line for line in told.splitlines() if "without effect here" in line]
    for flag in ("--allow-crimes", "--lazy-unpickle", "-v", "--clone-tensors"):
        assert flag in note
    assert "--no" not in note and "--async-write" not in note
    assert Path("out/README.md").exists() and Path("out/mergekit_config.yml").exists()


def test_options_are_followed(capsys) -> None:
    words = "--no-copy-tokenizer --no-write-model-card --quiet --out-shard-size 1M"
    code, told = run(capsys, "mergekit-yaml", "recipe.yml", "out", *words.split())
    assert (code, told) == (0, "")
    assert not Path("out/README.md").exists()
    assert not Path("out/tokenizer_config.json").exists()
    assert run(capsys, "mergekit-yaml", "recipe.yml", "out", "--quiet")[0] == 0  # replaces it
    assert Path("out/tokenizer_config.json").exists()


def test_every_option_of_mergekit_is_there() -> None:
    from mergekit.options import MergeOptions

    from fastmerge.cli.mergekit import Options

    assert set(Options.__annotations__) == set(MergeOptions.model_fields)


def test_mergekit_multi(family, capsys) -> None:
    words = ("mergekit-multi", "chain.yml", "--out-path", "final", "-I", "between")
    code, told = run(capsys, *words)
    assert code == 0
    assert "first: computed within the merges that name them, and not stored in between" in told
    assert same(family, "between/aside", "math") and not Path("between/first").exists()
    blur, chat, dolphin, final = (
        family.read(Path(n)) for n in ("blur", "chat", "dolphin", "final")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    expected = (blur[name] + chat[name]) / 4 + dolphin[name] / 2
    np.testing.assert_allclose(final[name], expected, rtol=1e-2, atol=1e-4)
    stamp = Path("final/model.safetensors").stat().st_ino
    assert "final: is there, and skipped" in run(capsys, *words)[1]
    assert Path("final/model.safetensors").stat().st_ino == stamp
    assert run(capsys, *words, "--no-lazy")[0] == 0
    assert Path("final/model.safetensors").stat().st_ino != stamp


@pytest.mark.parametrize(
    "words, expected",
    [
        ("mergekit-multi chain.yml -I x", "--out-path is missing"),
        ("mergekit-multi chain.yml --out-path x", "required: --intermediate-dir/-I"),
        ("mergekit-moe recipe.yml out --device cuda", "it has no 'experts:'; run"),
        ("mergekit-extract-lora --model a", "required: --base-model, --out-path"),
        (
            "mergekit-yaml recipe.yml out --no-safe-serialization",
            "--no-safe-serialization: fastmerge writes safetensors only; leave it out",
        ),
        ("mergekit-yaml recipe.yml --output out", "--output: write the folder to write behind"),
        ("mergekit-moe --config recipe.yml out", "--config: write the recipe first"),
        ("mergekit-mega recipe.yml", "mergekit-mega: is called mergekit-multi"),
        ("mergekit-yaml recipe.yml out --lazy-unpickel", "unrecognized arguments"),
        ("merge recipe.yml out --cuda", "--cuda: write --device cuda"),
        ("merge recipe.yml out --out-shard-size 5B", "--out-shard-size: write --max-shard-size"),
        ("merge recipe.yml out --out-shard-size=5B", "--out-shard-size: write --max-shard-size"),
        ("merge recipe.yml out --copy-tokenizer", "--copy-tokenizer: has no use here"),
        ("merge recipe.yml out --lazy-unpickle", "--lazy-unpickle: has no use here"),
        ("merge recipe.yml out -j4", "-j: write --threads"),
        ("plan recipe.yml --random-seed 3", "--random-seed: write --seed"),
        ("merge recipe.yml out --unsafe-truncate-embeddings", "`fastmerge mergekit-yaml` follows"),
    ],
)
def test_what_is_not_there_names_what_is(capsys, words: str, expected: str) -> None:
    code, told = run(capsys, *words.split())
    assert code == 2 and expected in " ".join(told.split())
    assert not Path("out").exists()


def test_merge_knows_all_of_mergekits_flags() -> None:
    from fastmerge.cli.mergekit import ELSEWHERE, Options

    ours = {"device", "quiet", "verbosity"}
    names = {f"--{name.replace('_', '-')}" for name in set(Options.__annotations__) - ours}
    assert names <= set(ELSEWHERE["merge"])
    page = (Path(__file__).parents[1] / "docs" / "mergekit.md").read_text()
    table = page.split("## Options")[1].split("\n\n")[1]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    flags = {flag for cell in first for flag in re.findall(r"`(-[-a-z]+)", cell)}
    assert len(flags) > 20 and flags - {"--device"} <= set(ELSEWHERE["merge"])  # as it says
