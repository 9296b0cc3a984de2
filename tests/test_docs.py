"""The documentation: every example runs, every link leads somewhere, nothing is left out."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fastmerge import errors
from fastmerge.methods import METHODS
from fastmerge.recipe.document import Document, ModelEntry, Module, Slice, SliceSource
from fastmerge.recipe.tokenizer import TokenEntry, TokenizerSection
from tests.test_merge_adapters import write_adapter
from tests.test_moe import write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
CONTINUED = ("callers.md", "plugins.md")  # whose examples go on from one another


def script(path: Path) -> ModuleType:
    """A Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


examples = script(DOCS / "examples.py")


# ---------------------------------------------------------------- examples

RECIPE = """\
merge_method: slerp
base_model: ./base
models: [{model: ./base}, {model: ./chat}]
parameters: {t: 0.5}
dtype: bfloat16
"""


@pytest.fixture
def models(zoo, monkeypatch):
    """A folder with what the pages name: a base and fine-tunes of it, adapters, checkpoints."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # a page's callable adds its folder
    base = zoo.base("base")
    names = ("chat", "code", "math", "stories", "blur", "dolphin", "owl", "mistral")
    checkpoints = [f"runs/7b/checkpoint-{step}" for step in (200, 400, 1000)]
    tunes = [zoo.tune(base, name, seed=i) for i, name in enumerate((*names, *checkpoints))]
    for folder in (base, *tunes[:4]):
        write_tokenizer(folder)
    for seed, name in enumerate(("code-lora", "math-lora")):
        write_adapter(zoo.root / name, seed=seed)
    tower = [f"vision_tower.layers.{number}.weight" for number in range(3)]
    for name in ("see", "look"):
        tensors = {tensor: np.ones((1, 1)) for tensor in ("lm_head.weight", *tower)}
        zoo.write(name, tensors, {"vision_config": {"num_hidden_layers": 3}})
    for name in ("recipe.yml", "slerp.yml"):
        (zoo.root / name).write_text(RECIPE)
    monkeypatch.chdir(zoo.root)
    return zoo


@pytest.fixture
def table():
    """The method table as it was: pages register methods of their own."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("models", "table")
@pytest.mark.parametrize("page", [f"docs/{page}" for page in PAGES] + ["README.md"])
def test_every_example_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package)
    examples.run(ROOT / page)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("page", [page for page in PAGES if page not in CONTINUED])
def test_an_example_imports_what_it_uses(page: str) -> None:
    """A reader who copies one alone has a script of its own."""
    imported: set[str] = set()
    for block in re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        nodes = list(ast.walk(ast.parse(block)))
        names = [
            alias.asname or alias.name.partition(".")[0]
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not (used & imported) - set(names), block
        imported.update(names)


def test_examples_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (fence, fault) in enumerate(
        [
            ("```bash\nfastmerge plan gone.yml\n```\n", "exit code 2"),
            ("```sh\nfastmerge plan --no-such-option\n```\n", "exit code 2"),
            ("```bash\nmake nothing\n```\n", "no such target"),
            ("```bash\npython benchmarks/gone.py\n```\n", "no such file"),
            ("```bash\nrm -rf .\n```\n", "no command that examples have"),
            ("```python\nassert 1 == 2\n```\n", "AssertionError"),
            ("```yaml\na: [\n```\n", "ParserError"),
        ]
    ):
        page = tmp_path / f"{number}.md"
        page.write_text(f"# A page\n\n{fence}")
        with pytest.raises(AssertionError, match=fault) as caught:
            examples.run(page)
        assert f"{number}.md:3" in str(caught.value)


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_of_known_languages(page: str) -> None:
    text = (DOCS / page).read_text()
    assert text.count("```") == 2 * len(list(examples.fences(text))), "a fence without a language?"
    assert {fence.language for fence in examples.fences(text)} <= set(examples.KNOWN)
    assert not re.search(r"^    (?:fastmerge|pip|python|make) ", text, re.MULTILINE)


# ---------------------------------------------------------------- links


def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    methods = (tmp_path / "methods.html").read_text()
    assert all(f'id="{name}"' in methods for name in METHODS)
    assert "fraction of delta entries kept" in methods
    assert "MergeReport" in (tmp_path / "api.html").read_text()


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
)
def test_links_of_what_lies_beside_the_pages(name: str) -> None:
    page = ROOT / name
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_a_link_out_of_the_pages_is_checked(caplog: pytest.LogCaptureFixture) -> None:
    hooks = script(DOCS / "hooks.py")
    assert hooks.linked("[a](../tests/conftest.py) [b](gpu.md#how-fast)", "x.md") in (
        "a [b](gpu.md#how-fast)",
        f"[a]({hooks.repository()}/blob/main/tests/conftest.py) [b](gpu.md#how-fast)",
    )
    hooks.linked("[a](../tests/gone.py)", "x.md")
    assert "links to tests/gone.py, which is not there" in caplog.text


def test_a_page_that_fetches_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    hooks = script(DOCS / "hooks.py")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    hooks.on_post_page('<a href="https://arxiv.org/abs/1">read</a><img src="a.svg">', page)
    assert not caplog.records
    hooks.on_post_page('<script src="//cdn.example/x.js"></script>', page)
    assert "fetches from elsewhere" in caplog.text


# ---------------------------------------------------------------- completeness


def test_every_key_of_a_recipe_is_on_its_page() -> None:
    text = (DOCS / "recipes.md").read_text()
    sections = (Document, ModelEntry, Module, Slice, SliceSource, TokenEntry, TokenizerSection)
    missing = {
        key for section in sections for key in section.fields if not re.search(rf"\b{key}\b", text)
    }
    assert not missing


def test_every_key_of_an_evaluate_section_is_in_its_table_with_its_default() -> None:
    from fastmerge.evaluation.settings import Evaluate

    text = (DOCS / "evaluation.md").read_text().split("## Keys")[1].split("##")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    said = {key: row[2] for row in rows for key in re.findall(r"`(\w+)`", row[1])}
    assert said.keys() == Evaluate.fields.keys() - {"registered"}  # which no file says
    plain = Evaluate({"callable": "a:b"})
    for key, default in said.items():
        written = re.findall(r"`(\w+)`", default)
        assert written == [str(getattr(plain, key))] * len(written), key
        assert written or not getattr(plain, key) or key == "callable", key


def test_every_method_has_a_heading_and_every_heading_a_method() -> None:
    headings = re.findall(r"^### (\w+)$", (DOCS / "methods.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(METHODS)


def test_the_facts_of_the_methods_are_the_table_s() -> None:
    hooks = script(DOCS / "hooks.py")
    text = (DOCS / "methods.md").read_text()
    assert text == hooks.with_facts(text), "run python docs/hooks.py"
    assert text.count("* **Cost:** reads the weights ") == len(METHODS)
    assert text.count("| parameter | given |") > 15
    changed = text.replace("reads the weights once", "reads the weights twice", 1)
    assert hooks.with_facts(changed) == text


def test_the_command_prints_each_method_s_cost(capsys: pytest.CaptureFixture[str]) -> None:
    from fastmerge.cli import main

    for name in METHODS:
        with pytest.raises(SystemExit):
            main(["methods", name])
        assert "reads the weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["methods", "--json"])
    assert all("cost" in row for row in json.loads(capsys.readouterr().out))


def test_every_error_class_has_its_remedy() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    classes = [name for name in vars(errors) if name.endswith("Error")]
    assert len(classes) == 6
    assert all(f"`{name}` |" in text for name in classes if name != "FastmergeError")


def test_the_messages_that_the_pages_quote_are_said() -> None:
    sources = " ".join(path.read_text() for path in (ROOT / "fastmerge").rglob("*.py"))
    sources = re.sub(r'"\s*f?"', "", sources)
    text = (DOCS / "troubleshooting.md").read_text().split("## What people meet")[1]
    quoted = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) >= 7
    assert not [message for message in quoted if message not in sources]


def test_every_command_is_documented() -> None:
    from fastmerge.cli.app import COMMANDS

    examples.fastmerge(["--version"])
    text = " ".join(path.read_text() for path in DOCS.glob("*.md"))
    assert not [name for name in COMMANDS if f"fastmerge {name}" not in text and name not in text]


# ---------------------------------------------------------------- pictures


def test_the_picture_of_the_speed_is_of_the_committed_figures() -> None:
    picture = script(ROOT / "benchmarks" / "picture.py")
    results = json.loads(picture.RESULTS.read_text())
    assert picture.PICTURE.read_text() == picture.drawn(results), "run benchmarks/picture.py"


@pytest.mark.parametrize("name", ["speed.svg", "design.svg"])
def test_pictures_are_small_and_whole(name: str) -> None:
    from xml.etree import ElementTree as ET

    text = (DOCS / name).read_text()
    assert len(text) < 10_000
    assert ET.fromstring(text).tag.endswith("svg")
    assert not re.search(r"href=|url\(h|@import", text)


def scaled(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "scale.py"), *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_of_large_merges_says_what_its_script_computes() -> None:
    page = (DOCS / "scale.md").read_text()
    rows = [line for line in scaled().stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 25 and [row for row in rows if row not in page] == []
    script = (ROOT / "benchmarks" / "scale.py").read_text()
    said = ast.literal_eval(re.findall(r"CPU_SECONDS_PER_GB = ({.*?})", script, re.DOTALL)[0])
    assert ", ".join(f"{said[m]:.2f}" for m in said) + " s" in page
    measured = json.loads((ROOT / "benchmarks" / "results" / "merge_model-1.1b.json").read_text())
    for job in measured["jobs"]:
        method = job["job"].split(",")[0]
        cpu_seconds = job["cpu_seconds"]["median"] - measured["start_up_seconds"]["cpu"]
        assert cpu_seconds / (job["bytes"] / 1e9) == pytest.approx(said[method], abs=0.006)
    for name, unit, scale in (
        ("start", "s", 1), ("plan_tensor", "us", 1e6), ("merge_tensor", "us", 1e6),
        ("finish_tensor", "us", 1e6), ("network", "GB/s", 1),
    ):  # fmt: skip
        (figure,) = re.findall(rf"{name}: float = (\S+)", script)
        assert f"| {float(figure) * scale:.2g} {unit} |" in page


@pytest.mark.parametrize(
    "words",
    [
        ["--bytes", "-3", "--nodes", "2"], ["--model", "70b", "--nodes", "0"], ["--nodes", "8"],
        ["--model", "70b", "--storage", "0"], ["--model", "70b", "--tensors", "9"],
        ["--storage", "10"], ["--model", "70b", "--bytes", "1e9"], ["--network", "inf"],
    ],
)  # fmt: skip
def test_figures_that_no_machine_has_are_one_line(words: list[str]) -> None:
    done = scaled(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("scale.py: error: ")


def test_ones_own_figures_count() -> None:
    known = ["--bytes", "1e12", "--nodes", "4", "--method", "ties", "--models", "3"]
    assert scaled(*known).stdout != scaled(*known, "--out", "2").stdout
    own = ["--network", "1", "--cores", "2", "--storage", "100"]
    # 1 TB in 200 files, 50 a node, each of 3 models and the output: 1000 GB at 1 GB/s.
    assert scaled(*known, *own).stdout == "17 min; limit: network; a part moves 1000 GB\n"
    assert "limit: processor; " in scaled(*known, *own, "--network", "100").stdout
