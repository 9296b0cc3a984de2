"""What packagers and the repository's host read agrees with itself."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = ROOT / ".github" / "workflows"
hosted = pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="not in an sdist")


def job(file: str, name: str) -> dict[str, Any]:
    found = yaml.safe_load((WORKFLOWS / file).read_text())["jobs"][name]
    assert isinstance(found, dict)
    return found


def pythons() -> list[str]:
    """That the package is for."""
    found = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert PROJECT["project"]["requires-python"] == f">={found[0]}"
    return found


def makes_oldest() -> str:
    """What the Makefile asks for."""
    (minor,) = re.findall(r"sys\.version_info >= \(3, (\d+)\)", (ROOT / "Makefile").read_text())
    return f"3.{minor}"


@hosted
def test_every_python_is_tested_and_gets_wheels() -> None:
    whole = job("ci.yml", "tests")["strategy"]["matrix"]["python"]
    bare = [row["python"] for row in job("ci.yml", "versions")["strategy"]["matrix"]["include"]]
    assert whole[0] == makes_oldest() and set(whole) | set(bare) == set(pythons())
    tags = [f"cp{python.replace('.', '')}-*linux*" for python in pythons()]
    assert PROJECT["tool"]["cibuildwheel"]["build"] == tags


def test_pins_can_be_had_for_every_python_that_make_takes() -> None:
    """3.10 was in the matrix of `make test`, while eight pins needed 3.11."""
    specifiers = pytest.importorskip("packaging.specifiers")
    looked_at = 0
    for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, version = line.split("==")
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        needs = found.get("Requires-Python")
        if found["Version"].partition("+")[0] == version and needs:
            looked_at += 1
            assert f"{makes_oldest()}.0" in specifiers.SpecifierSet(needs), (line, needs)
    assert looked_at > 10


def test_make_tells_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\nshift\necho "ran: $1"\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "-f", ROOT / "Makefile", f"PYTHON={old}", ".venv/.demo", "-o", "x"]
    for file in ("pyproject.toml", "tests/constraints.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not (tmp_path / ".venv").exists()
    (code,) = re.findall("ran: (.*)", done.stdout)
    assert re.search("needs 3.11 or newer", code)
    subprocess.run([sys.executable, "-c", code], check=True)
    aged = code.replace("import sys;", "import sys; sys.version_info = (3, 10, 13);")
    told = subprocess.run([sys.executable, "-c", aged], capture_output=True, text=True, check=False)
    assert told.returncode == 1 and told.stderr.startswith("Python 3.10: ")


@hosted
def test_workflows_install_no_tool_that_is_not_pinned() -> None:
    pins = (ROOT / "tests" / "constraints.txt").read_text()
    for tool in ("auditwheel", "build", "cibuildwheel", "twine"):
        assert re.search(f"^{tool}==", pins, re.MULTILINE), tool
    for step in job("release.yml", "sdist")["steps"] + job("release.yml", "wheels")["steps"]:
        for line in step.get("run", "").splitlines():
            assert "pip install" not in line or "-c tests/constraints.txt" in line, line


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "check_symbols", lambda _: None)
    return module


def test_one_failed_suite_hides_neither_the_others_nor_what_twine_says(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.12's failure kept 3.13, 3.14 and twine from being run at all."""
    said: list[str] = []

    def run(*command: Any, **_: Any) -> None:
        words = [str(word) for word in command]
        if "--sdist" in words:
            (tmp_path / "dist").mkdir()
            (tmp_path / "dist" / "x-1.tar.gz").touch()
        elif "wheel" in words:
            (tmp_path / "dist" / f"x-{words[0]}.whl").touch()
        elif "twine" in words:
            said.append("twine " + " ".join(sorted(word for word in words if "dist" in word)))

    def installed(python: str, wheel: Path, sdist: Path) -> None:
        assert sdist.name == "x-1.tar.gz" and wheel.name == f"x-{python}.whl"
        said.append(python)
        if python == "one":
            raise subprocess.CalledProcessError(1, ["pytest"])

    monkeypatch.setattr(release, "run", run)
    monkeypatch.setattr(release, "check_sdist", lambda _: None)
    monkeypatch.setattr(release, "check_installed", installed)
    monkeypatch.setattr(sys, "argv", ["release.py", "one", "two"])
    with pytest.raises(SystemExit, match=r"one: x-one\.whl failed"):
        release.main()
    assert said[0].count(str(tmp_path)) == 3 and said[1:] == ["one", "two"]


@pytest.mark.parametrize("published", [True, False])
def test_an_index_page_has_no_link_that_leads_nowhere(
    published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setup.py's README.md, with the address that whoever publishes fills in and without it."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    text = (ROOT / "pyproject.toml").read_text()
    if "urls" in PROJECT["project"] and not published:
        pytest.skip("the address is there")
    if "urls" not in PROJECT["project"] and published:
        blank = '# [project.urls]\n# Repository = "https://..."\n'
        assert blank in text
        text = text.replace(blank, '[project.urls]\nRepository = "https://host.test/a/b/"\n')
    (tmp_path / "pyproject.toml").write_text(text)
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    page = given["long_description"]
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert all(link.startswith("https://") for link in links)
    if not published:
        assert "![" not in page and "Start here" in page
        return
    address = tomllib.loads(text)["project"]["urls"]["Repository"].rstrip("/")
    inside = [link for link in links if link.startswith(address)]
    assert f"{address}/raw/main/docs/speed.svg" in inside and len(inside) > 10
    for link in inside:
        path = link.removeprefix(address).split("/main/")[1]
        assert (ROOT / path.partition("#")[0]).exists(), link


def test_a_word_in_a_comment_keeps_no_file_from_the_wheels() -> None:
    """The kernels' own tests were left out for a comment that names mergekit."""
    spec = importlib.util.spec_from_file_location("installed", ROOT / ".ci" / "installed.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chosen = set(module.chosen(ROOT / "tests"))
    assert {"test_kernels.py", "test_methods.py", "test_torn.py", "test_verify.py"} <= chosen
    needs = {"test_ops.py", "test_faults.py", "test_kills.py", "test_remote.py", "test_house.py"}
    assert not chosen & needs
