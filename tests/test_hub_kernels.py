"""kernels/ as a repository of Hugging Face's `kernels` package: it runs without fastmerge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "fastmerge-kernels"
    subprocess.run([sys.executable, ROOT / ".ci" / "hub_kernels.py", folder], check=True)
    return folder


def test_it_is_laid_out_as_the_package_loads_it(repository: Path) -> None:
    build = repository / "build" / "torch-universal"
    metadata = json.loads((build / "metadata.json").read_text())
    assert metadata["name"] == "fastmerge-kernels" and metadata["python-depends"] == []
    own = {path.name for path in build.glob("*.py")}
    assert {"__init__.py", "gram.py", "combine.py", "select.py", "consensus.py"} <= own
    sources = {p.name: p.read_text() for p in (repository / "torch-ext").rglob("*.py")}
    assert {name: (build / name).read_text() for name in sources} == sources
    assert not any(
        "import fastmerge" in text or "from fastmerge" in text for text in sources.values()
    )
    assert 'name = "fastmerge-kernels"' in (repository / "build.toml").read_text()
    for name in ("README.md", "LICENSE", "benchmarks/benchmark.py"):
        assert (repository / name).is_file()


def test_its_tests_pass_where_there_is_no_fastmerge(repository: Path) -> None:
    pytest.importorskip("triton")
    (repository / "tests" / "conftest.py").write_text(
        "import sys\nsys.modules['fastmerge'] = None  # an import of it fails\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=repository, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout


# `get_local_kernel` as of kernels 0.17, which takes a Path and no text.
_PACKAGE = """
import importlib.util, sys
def get_local_kernel(repo_path):
    place = repo_path / "build" / "torch-universal"
    spec = importlib.util.spec_from_file_location(
        "merging", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    module = sys.modules["merging"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def test_its_readme_runs_by_copy_and_paste(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    text = (repository / "README.md").read_text()
    assert "](../" not in text  # which leads nowhere on the Hub
    # On the interpreter, and of 4 Ki entries instead of a million.
    code = text.split("```python\n")[1].split("```")[0]
    for there, here in (('device="cuda"', 'device="cpu"'), ("<< 20", "<< 12"), ("<< 19", "<< 11")):
        assert there in code
        code = code.replace(there, here)
    (tmp_path / "hub").mkdir()
    repository.rename(tmp_path / "hub" / "fastmerge-kernels")
    (tmp_path / "kernels.py").write_text(_PACKAGE)
    head = "import sys\nsys.modules['fastmerge'] = None\n"
    (tmp_path / "example.py").write_text(f"{head}{code}\nprint(float((out - base).abs().max()))\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < float(done.stdout) < 100
