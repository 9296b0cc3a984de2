"""What plans, cards and refusals say is what was done, and where the fault lies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import fastmerge
from fastmerge import api, errors
from fastmerge.cli import main
from fastmerge.errors import FastmergeError, ModelError, RecipeError, UnsupportedError
from fastmerge.models.adapter import Adapter
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.summary import summarise
from fastmerge.output.card import model_card
from fastmerge.planning.by_layer import by_layer
from fastmerge.planning.planner import make_plan
from fastmerge.retrograde import schedule
from tests.test_low_precision import Formats


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def copy_of(*models: Path | str) -> dict:
    if len(models) == 1:
        return {"merge_method": "passthrough", "models": [{"model": str(models[0])}]}
    each = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": each}


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


# --- code on the Hub ---


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "named", ["evil/repo--x.M", ["evil/repo--x.M", None], [None, "evil/repo--x.M"]]
)
def test_an_auto_map_to_the_hub_is_noted(zoo, file: str, named) -> None:
    base = zoo.base()
    if not (base / file).exists():
        (base / file).write_text("{}")
    edit(base / file, auto_map={"AutoModel": named, "AutoConfig": "evil/repo--y.C"})
    said = f"{file}: 'auto_map' names code on the Hub, 'evil/repo', which"
    assert sum(note.startswith(said) for note in api.plan(copy_of(base)).notes) == 1
    assert [line.startswith(said) for line in summarise(base).code] == [True]


def test_info_shows_what_would_be_fetched(zoo, capsys) -> None:
    base = zoo.base()
    edit(base / "config.json", attn_implementation="a/kernel", auto_map={"AutoModel": "x.M"})
    assert command("info", base) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "'attn_implementation' names code on the Hub, 'a/kernel'" in said
    assert "auto_map" not in said  # which is code of the folder's own


def test_a_config_that_is_not_read_is_not_passed_over(zoo) -> None:
    base = zoo.base()
    (base / "tokenizer_config.json").write_text('{"a":' + "[" * 200 + "]" * 200 + "}")
    notes = [note for note in api.plan(copy_of(base)).notes if "not looked through" in note]
    assert len(notes) == 1 and notes[0].startswith("tokenizer_config.json: ")


# --- what cards and plans say of methods ---


def test_the_card_says_what_has_an_adapter_folded_in(zoo) -> None:
    base = zoo.base()
    lora = zoo.adapter("lora", base)
    for recipe in (copy_of(f"{base}+{lora}"), api.fold_recipe(str(base), str(lora))):
        plan = api.plan(recipe)
        count = plan.methods["adapter"]
        card = model_card(plan, "x")
        assert f"(https://arxiv.org/abs/2106.09685)): {count} tensors\n" in card
        assert f"copied as they are: {len(plan.tensors) - count} tensors\n" in card
    other = zoo.tune(base, "other")
    plan = api.plan(copy_of(f"{base}+{lora}", other))
    card = model_card(plan, "x")
    assert f"(https://arxiv.org/abs/2106.09685)): {count} tensors\n" in card
    assert "copied as they are" not in card


def test_noise_that_is_scaled_too_is_in_the_plan(zoo) -> None:
    base = zoo.base()
    experts = [
        {"source_model": str(base), "residual_scale": 0.9, "noise_scale": 0.001},
        {"source_model": str(zoo.tune(base, "b"))},
    ]
    plan = make_plan({"base_model": str(base), "gate_mode": "random", "experts": experts})
    assert plan.methods["noise"] == 6 and plan.methods["passthrough"] == 2
    card = model_card(plan, "x")
    assert "): 6 tensors" in card and "): 2 tensors" in card
    rows = [row for row in by_layer(plan.tensors, plan.references) if ".0.w2" in str(row.kinds)]
    values = {name.partition(" of ")[0]: value for name, value in rows[0].values.items()}
    assert values == {"scale": 0.9, "noise_scale": 0.001}


def test_a_card_shortens_a_note_of_a_megabyte(zoo) -> None:
    base, other = zoo.base(), zoo.base("other", seed=1)
    for number, folder in enumerate((base, other)):
        edit(folder / "config.json", **{"k" * 3_000_000: number})
    plan = api.plan(copy_of(base, other))
    assert any("kkk" in note for note in plan.notes) and max(map(len, plan.notes)) < 1700
    assert len(model_card(plan, "x")) < 20_000


def test_a_card_has_no_class_and_no_base_of_a_megabyte(zoo, tmp_path) -> None:
    base = zoo.base()
    edit(base / "config.json", architectures=["A" * 3_000_000], model_type="bert")
    card = model_card(api.plan(copy_of(base)), "x")
    assert len(card) < 20_000 and "AutoModel.from_pretrained" in card
    lora = zoo.adapter("lora", base, base_model_name_or_path="b" * 3_000_000)
    each = {"model": str(lora), "parameters": {"weight": 1}}
    recipe = {"merge_method": "svd", "models": [each]}
    fastmerge.merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").stat().st_size < 20_000


# --- the model's own card ---


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_plan_finds_a_card_that_merge_would_not_take(zoo, tmp_path, kind: str) -> None:
    base = zoo.base()
    lora = zoo.adapter("lora", base)
    card = lora / "README.md"
    if kind == "link":
        card.symlink_to("/etc/hostname")
    else:
        os.mkfifo(card)
    said = "a link out of the model's folder" if kind == "link" else "not a regular file but"
    with pytest.raises(ModelError, match=said):
        api.plan(copy_of(f"{base}+{lora}"))
    svd = {"merge_method": "svd", "models": [{"model": str(lora)}]}
    with pytest.raises(ModelError, match=said):
        api.decide(svd)
    card.rename(base / "README.md")
    with pytest.raises(ModelError, match=said):
        api.plan(copy_of(zoo.tune(base, "other"), base))
    with pytest.raises(ModelError, match=said):
        fastmerge.extract_lora(zoo.root / "other", base, tmp_path / "x", rank=1)
    assert not (tmp_path / "x").exists()


# --- an adapter's base ---


@pytest.mark.parametrize(
    ("named", "noted"),
    [
        ("nope/other", True),
        ("/nowhere/runs/other/", True),
        ("nope/BASE", False),
        ("nope/base@main", False),
        ("a link to it", False),
        ("org/original", False),
        (None, False),
    ],
)
def test_an_adapter_for_a_base_of_another_name_is_noted(zoo, named, noted: bool) -> None:
    base = zoo.base()
    edit(base / "config.json", _name_or_path="org/original")
    if named == "a link to it":
        named = str(zoo.root / "elsewhere")
        os.symlink(base, named)
    lora = zoo.adapter("lora", base, base_model_name_or_path=named)
    said = f"'{lora}' names '{named}' as its base, and is put on '{base}'"
    for recipe in (copy_of(f"{base}+{lora}"), api.fold_recipe(str(base), str(lora))):
        assert any(note.startswith(said) for note in api.plan(recipe).notes) == noted


# --- refusals ---


def test_no_evaluate_is_named_where_it_is_the_cause(monkeypatch) -> None:
    asked = {
        "baseline": "a", "pool": ["b"], "accept": "improve",
        "schedule": {"steps": [{"degrade": {"partner": "b", "method": "slerp", "t": 0.1}}]},
        "evaluate": {"tasks": ["arc_easy"]},
    }  # fmt: skip
    for commanded, said in ((False, "evaluate=False"), (True, "--no-evaluate")):
        monkeypatch.setattr(errors, "_commanded", commanded)
        with pytest.raises(RecipeError, match=f"needs scores: leave out {said}$"):
            schedule.load(asked).without_evaluation()


@pytest.mark.parametrize("name", ["a<b", ""])
def test_a_name_that_breaks_tables_is_told_what_it_may_not_have(name: str) -> None:
    asked = {
        "baseline": {"model": "a", "name": name or "a|b"}, "pool": ["b"],
        "schedule": {"steps": [{"degrade": {"partner": "b", "method": "slerp", "t": 0.1}}]},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"a 'name' that is not empty, without \| ` < > and"):
        schedule.load(asked)


def test_a_whole_model_in_an_adapters_place(zoo) -> None:
    base = zoo.base()
    for work in (
        lambda: Adapter.open(base),
        lambda: api.plan(copy_of(f"{base}+{base}")),
        lambda: api.decide({"merge_method": "cat", "models": [{"model": str(base)}]}),
    ):
        with pytest.raises(ModelError, match="is a whole model, no adapter of PEFT's"):
            work()


def test_extract_lora_of_a_base_with_an_adapter(zoo, tmp_path) -> None:
    base = zoo.base()
    lora = zoo.adapter("lora", base)
    with pytest.raises(UnsupportedError, match="`fastmerge fold` writes it"):
        fastmerge.extract_lora(f"{base}+{lora}", base, tmp_path / "x", rank=1)


def test_extract_lora_notes_embeddings_that_no_pattern_includes(zoo, tmp_path) -> None:
    base = zoo.base()
    tuned = zoo.tune(base, "tuned")
    options = {"rank": 1, "include": ["q_proj"], "skip_undecomposable": True}
    notes = fastmerge.extract_lora(tuned, base, tmp_path / "x", **options).report.notes
    said = next(note for note in notes if note.startswith("no pattern includes "))
    assert "model.embed_tokens" in said and "lm_head" in said
    options["exclude"] = ["embed_tokens", "lm_head"]
    notes = fastmerge.extract_lora(tuned, base, tmp_path / "y", **options).report.notes
    assert not any("no pattern includes" in note or "saved whole" in note for note in notes)


def test_extract_lora_of_codes_names_a_way_to_numbers(zoo, tmp_path) -> None:
    base = zoo.base()
    coded = Formats(zoo).fp8("coded", base)
    with pytest.raises(UnsupportedError, match=r"quantised .*passthrough` and `dtype: bfloat16`"):
        fastmerge.extract_lora(coded, base, tmp_path / "x", rank=1)


def test_a_mixtures_architectures_are_named_as_they_are_written(zoo) -> None:
    experts = [{"source_model": str(zoo.base())}] * 2
    asked = {"base_model": str(zoo.base()), "gate_mode": "random", "experts": experts}
    with pytest.raises(RecipeError, match="deepseek, mixtral, qwen, qwen3"):
        make_plan({**asked, "architecture": "foo"})


def test_moe_of_a_recipe_of_adapters(zoo, tmp_path, capsys) -> None:
    lora = zoo.adapter("lora", zoo.base())
    recipe = tmp_path / "loras.yml"
    recipe.write_text(f"merge_method: svd\nmodels:\n- {{model: {lora}}}\n")
    assert command("moe", recipe, tmp_path / "x") == 2
    assert "it merges adapters; run `fastmerge merge`" in capsys.readouterr().err


def test_what_is_no_file_or_too_large_says_what_to_do(zoo) -> None:
    base = zoo.base()
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(ModelError, match="delete it, or put the file itself there"):
        Checkpoint.open(base)
    (base / "config.json").unlink()
    with open(base / "config.json", "wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ModelError, match="not a config: download it again"):
        Checkpoint.open(base)


def test_pickles_are_converted_where_nothing_can_be_lost(zoo) -> None:
    lora = zoo.adapter("lora", zoo.base())
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="on a machine that you can lose"):
        Adapter.open(lora)
    folder = zoo.root / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="on a machine that you can lose: python -c"):
        Checkpoint.open(folder)


# --- small things ---


def test_as_base_of_a_model_without_codes_is_noted(zoo) -> None:
    base = zoo.base()
    notes = api.plan({**copy_of(base), "out_dtype": "as_base", "base_model": str(base)}).notes
    assert any(note.startswith(f"as_base: '{base}', the model that leads") for note in notes)


def test_a_layer_from_elsewhere_is_no_layer_of_a_negative_number(zoo, tmp_path, capsys) -> None:
    base = zoo.base(layers=2)
    recipe = tmp_path / "r.yml"
    source = f"- sources: [{{model: {base}, layer_range: [%s]}}]\n"
    slices = "".join(source % span for span in ("0, 2", "1, 2"))
    recipe.write_text(f"merge_method: passthrough\nslices:\n{slices}")
    assert command("plan", recipe) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "its layer N-1" in said and ", layer -1" not in said


def test_a_merge_with_nothing_left_to_do_tells_its_memory(zoo, tmp_path, monkeypatch) -> None:
    from fastmerge.output import sink

    recipe = copy_of(zoo.base())

    def stopped(*_: object) -> None:
        raise FastmergeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(sink, "lineage_file", stopped)  # when all tensors are on the disk
        with pytest.raises(FastmergeError, match="stopped"):
            fastmerge.merge(recipe, tmp_path / "x")
    report = fastmerge.merge(recipe, tmp_path / "x")
    assert report.resumed == report.tensors and report.peak_anonymous_bytes > 0
