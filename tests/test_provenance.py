"""What an output says of its inputs: the truth to the Hub, and nothing of somebody's disk."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from safetensors import safe_open

import fastmerge
from fastmerge.integrations.mergekit import run_merge
from fastmerge.output import provenance
from fastmerge.output.card import escaped, model_card
from fastmerge.output.provenance import licence


def entry(*models: object) -> list[dict[str, object]]:
    return [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]


def merged(out: Path, *models: Path, **options: Any) -> dict[str, str]:
    """Merges the models; every text that was written, by file name."""
    text = yaml.safe_dump({"merge_method": "linear", "models": entry(*models)})
    text = f"# kept in {models[0].parent}/somewhere/else\n{text}"
    fastmerge.merge(text, out, **options)
    found = {file.name: file.read_text() for file in out.iterdir() if file.suffix != ".safetensors"}
    with safe_open(out / "model.safetensors", "np") as file:
        found["metadata"] = json.dumps(file.metadata())
    return found


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def cached(zoo, repository: str, seed: int, card: str = "") -> Path:
    """A model as huggingface_hub keeps it; its snapshot."""
    source = zoo.tune(zoo.base(f"b{seed}"), f"source{seed}", seed=seed)
    if card:
        (source / "README.md").write_text(card)
    home = zoo.root / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_base_model_holds_ids_of_the_hub_only(zoo) -> None:
    a = cached(zoo, "org/first", 1)
    b = zoo.tune(zoo.base("base"), "second", seed=2)
    (b / "README.md").write_text("---\nbase_model: [org/parent, ./local, final]\n---\n# second\n")
    c = zoo.tune(zoo.base("base"), "third", seed=3)
    (c / ".git").mkdir()
    (c / ".git" / "config").write_text(
        '[remote "origin"]\n\turl = https://huggingface.co/me/third\n'
    )
    d = zoo.tune(zoo.base("base"), "fourth", seed=4)
    card = merged(zoo.root / "out", a, b, c, d)["README.md"]
    assert front(card)["base_model"] == ["org/first", "org/parent", "me/third"]
    assert "| org/first |" in card and "0123456789abcdef" not in card
    (b / "README.md").unlink()
    assert "base_model" not in front(merged(zoo.root / "none", b, d)["README.md"])


def test_two_folders_of_one_name_stay_two(zoo) -> None:
    base = zoo.base()
    (zoo.root / "x").mkdir()
    a, b = zoo.tune(base, "final", seed=1), zoo.tune(base, "x/final", seed=2)
    texts = merged(zoo.root / "out", a, b)
    assert "| final |" in texts["README.md"] and "| final (2) |" in texts["README.md"]
    inputs = json.loads(texts["fastmerge.json"])["fastmerge_inputs"]
    assert set(inputs) == {"final", "final (2)"} and len(set(inputs.values())) == 2
    recipe = yaml.safe_load(texts["fastmerge_recipe.yml"])
    assert [m["model"] for m in recipe["models"]] == ["./final", "./final (2)"]


def test_no_local_path_is_written_unless_asked_for(zoo) -> None:
    base = zoo.base()
    tune = zoo.tune(base, "modèle 123", seed=1)
    (base / "tokenizer.json").write_text("{}")
    texts = merged(zoo.root / "out", base, tune)
    for name, text in texts.items():
        assert str(zoo.root) not in text and "/somewhere" not in text, name
    text = json.dumps({"merge_method": "linear", "models": entry(base, tune)})  # escaped
    fastmerge.merge(text + "\n", zoo.root / "json")
    assert str(zoo.root) not in (zoo.root / "json" / "fastmerge_recipe.yml").read_text()
    run_merge(text + "\n", zoo.root / "kit", config_source=text)
    assert str(zoo.root) not in (zoo.root / "kit" / "mergekit_config.yml").read_text()
    kept = merged(zoo.root / "kept", base, tune, keep_paths=True)
    for name in ("README.md", "fastmerge_recipe.yml", "fastmerge.json", "metadata"):
        assert str(base) in kept[name], name


def test_the_recipe_that_is_written_runs_where_the_models_lie(
    zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo.base("123")  # a name that YAML takes for a number
    merged(zoo.root / "out", base, zoo.tune(base, "yes", seed=1))
    monkeypatch.chdir(zoo.root)
    fastmerge.merge("out/fastmerge_recipe.yml", "again")
    weights = [zoo.root / name / "model.safetensors" for name in ("out", "again")]
    assert zoo.read(weights[0].parent).keys() == zoo.read(weights[1].parent).keys()
    assert weights[0].read_bytes()[-1000:] == weights[1].read_bytes()[-1000:]


CARD = """---
license: {licence}
language: [en, fr]
pipeline_tag: text-generation
tags: [chat, "base_model:x/y"]
---
# A model
"""


def test_what_the_inputs_cards_say_comes_along(zoo) -> None:
    base = zoo.base()
    one, two = zoo.tune(base, "one", seed=1), zoo.tune(base, "two", seed=2)
    (one / "README.md").write_text(CARD.format(licence="mit"))
    (two / "README.md").write_text(CARD.format(licence="apache-2.0").replace("chat", "maths"))
    card = merged(zoo.root / "out", one, two)["README.md"]
    said = front(card)
    assert said["license"] == "apache-2.0" and said["language"] == ["en", "fr"]
    assert said["pipeline_tag"] == "text-generation"
    assert said["tags"] == ["merge", "fastmerge", "chat", "maths"]
    assert "one: mit" in card and "two: apache-2.0" in card
    assert 'AutoModelForCausalLM.from_pretrained(folder, dtype="auto")' in card


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["mit", "mit"], {"license": "mit"}),
        (["mit", "apache-2.0"], {"license": "apache-2.0"}),
        (["apache-2.0", "cc-by-nc-4.0"], {"license": "cc-by-nc-4.0"}),
        (["llama3", "gemma"], {"license": "other", "license_name": "differing"}),
        ([None, "mit"], {"license": "mit"}),
        ([None], {}),
    ],
)
def test_the_strictest_licence(licences: list[str | None], expected: dict[str, str]) -> None:
    assert licence([{"license": name} for name in licences]) == expected


def test_a_licence_of_its_own_keeps_its_name() -> None:
    own = {"license": "other", "license_name": "yi", "license_link": "LICENSE"}
    assert licence([own, {"license": "mit"}]) == own
    assert licence([own, own]) == own
    assert licence([own, own | {"license_name": "qwen"}])["license_name"] == "differing"


@pytest.mark.parametrize(
    "card",
    [
        "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
        "---\nlicense: [1\n---\n",
        "---\nlicense: {a: b}\ntags: 3\nlanguage: [1, 2]\nbase_model: {x: y}\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: !!bool 7\n---\n",
        "---\nlicense: !!int ''\n---\n",
        "---\nlicense: !!timestamp x\n---\n",
        "---\nlicense: 2001-99-99\n---\n",
        "---\nlicense: " + "1:" * 300 + "1.0\n---\n",
        '---\nlicense: "\\UFFFFFFFF"\n---\n',
        "---\nlicense: !!binary x\n---\n",
        "---\n? [a]\n: b\n---\n",
        "no front matter\n---\nlicense: mit\n---\n",
        "\0\xff",
    ],
)
def test_a_strangers_card_is_only_read(zoo, card: str) -> None:
    base = zoo.base()
    (base / "README.md").write_text(card)
    said = front(merged(zoo.root / "out", base, zoo.tune(base, "t"))["README.md"])
    assert said.keys() == {"library_name", "pipeline_tag", "tags"}


def test_names_are_no_markup(zoo) -> None:
    name = "<img src=x> ![a](b) | `c` *d* www.e.org [f](https:g"
    base = zoo.base()
    odd = zoo.tune(base, name, seed=1)
    plan = fastmerge.api.plan({"merge_method": "linear", "models": entry(base, odd)})
    card = model_card(plan, f"<script>\n# {name}")
    for line in card.split("## Recipe")[0].splitlines():
        if not line.startswith("folder = "):
            assert "<img" not in line.replace("\\<", "") and "![a](" not in line
            assert "<script" not in line.replace("\\<", "") and "www.e" not in line
    assert escaped("a_b _c_ https://x.y") == r"a_b \_c\_ https:&#47;&#47;x.y"
    for name, shown in {
        "# x": r"\# x", "- x": r"\- x", "---": r"\---", "+": r"\+", "1. x": r"1\. x",
        "12)": r"12\)",
        "1.5B": "1.5B", "    x": "&#32;&#32;&#32;&#32;x", "__x__": r"\_\_x\_\_", "a_b": "a_b",
        "$$x$$": "&#36;&#36;x&#36;&#36;", "x ": "x&#32;", "x ##": r"x \#\#",
        # GitHub makes links of these whatever is escaped in them.
        "org/m@v1.0-beta": "org/m@&#8203;v1.0-beta", "a@b__c.de": r"a@&#8203;b\_\_c.de",
        "mailto:a@b.de": "mailto:a@&#8203;b.de", "org/m@main": "org/m@main",
        "x_www.e.org": "x_www&#46;e.org",
    }.items():  # fmt: skip
        assert escaped(name) == shown


# --- strangers' cards ---

_BOMBS = (
    "[" * 900_000,
    "- " * 450_000,
    "? " * 450_000,
    "{a: " * 220_000,
    'license: "' + "\\u0041" * 150_000,
)


@pytest.mark.parametrize("text", _BOMBS, ids=lambda text: text[:6])
def test_a_card_takes_bounded_time(zoo, text: str) -> None:
    """A megabyte of brackets took PyYAML a quarter of an hour."""
    base = zoo.base()
    tune = zoo.tune(base, "tune")
    (base / "README.md").write_text(f"---\n{text}\n---\n")
    begun = time.process_time()
    model_card(fastmerge.api.plan({"merge_method": "linear", "models": entry(base, tune)}), "x")
    assert time.process_time() - begun < 20


def test_what_a_leaderboard_wrote_hides_no_licence(zoo) -> None:
    base = zoo.base()
    results = "".join(f"  - {{name: task {i}, value: {i}}}\n" for i in range(20_000))
    languages = "".join(f"- l{i}\n" for i in range(1100))
    said = f'model-index:\n- results:\n{results}"license": cc-by-nc-4.0\nlanguage:\n{languages}'
    (base / "README.md").write_text(f"---\n{said}---\n")
    said = front(merged(zoo.root / "out", base, zoo.tune(base, "t"))["README.md"])
    assert said["license"] == "cc-by-nc-4.0" and len(said["language"]) == 50
    (base / "README.md").write_text("---\n{license: mit, tags: [x]}\n---\n")
    assert front(merged(zoo.root / "two", base)["README.md"])["license"] == "mit"


def test_a_git_configuration_takes_bounded_time(zoo) -> None:
    base = zoo.base()
    (base / ".git").mkdir()
    own = "\turl = git@hf.co:me/mine.git\n"
    (base / ".git" / "config").write_text("url=" * 200_000 + "\n" + own)
    begun = time.process_time()
    said = front(merged(zoo.root / "out", base)["README.md"])
    assert said["base_model"] == ["me/mine"] and time.process_time() - begun < 20


def test_no_card_and_no_repository_by_a_link(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    (tmp_path / "private").write_text(
        "---\nlicense: hunter2\n---\nurl = https://huggingface.co/me/secret\n"
    )
    (base / ".git").mkdir()
    (base / ".git" / "config").symlink_to(tmp_path / "private")
    assert "secret" not in merged(zoo.root / "out", base)["README.md"]
    (base / "README.md").symlink_to(tmp_path / "private")
    with pytest.raises(fastmerge.FastmergeError, match=r"README\.md: a link out of the model's"):
        merged(zoo.root / "two", base)
    (base / "README.md").unlink()
    (base / "CARD").write_text("---\nlicense: mit\n---\n")
    (base / "README.md").symlink_to("CARD")
    assert front(merged(zoo.root / "three", base)["README.md"])["license"] == "mit"


def test_a_card_that_a_disk_cannot_give_ends_the_merge(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output's licence was said without it."""
    base = zoo.base("base")
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")

    def failing(_: Path) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(provenance, "open_regular", failing)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(base)}]}
    with pytest.raises(
        fastmerge.FastmergeError, match=r"README\.md: cannot be read \(Input/output"
    ):
        fastmerge.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
