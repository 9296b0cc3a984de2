"""Runs the tests that need nothing but fastmerge's own dependencies against the installed package.

    python .ci/installed.py FOLDER      # a checkout or an unpacked sdist, whose tests/ it takes

For a wheel in an environment of its own: pytest, hypothesis and (for some) ml_dtypes are all that
is there besides. The tests are copied to an empty folder, so that the package beside them is not
found.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# What a test file must not name to be run here: the packages of the extras, what needs them, a
# compiler, and the sources.
ELSEWHERE = (
    "torch", "transformers", "peft", "mergekit", "triton", "lm_eval", "obstore", "moto",
    "matplotlib", "tokenizers", "huggingface_hub", "mkdocs", "datasets", "llama.",
    "'cma'", "'tpe'", "retrograde", "sweep", "'faults", "kills.py", "ROOT",
)  # fmt: skip
BESIDE = ("tests", "docs", "benchmarks", "pyproject.toml", "README.md")


def code(text: str) -> str:
    """Without comments and docstrings: one word in them kept test_kernels.py out of every wheel's
    tests."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def chosen(tests: Path) -> list[str]:
    """The test files that run without the extras."""
    absent = [name for name in ("ml_dtypes",) if find_spec(name) is None]
    words = re.compile(rf"(?<![a-z])(?:{'|'.join(map(re.escape, [*ELSEWHERE, *absent]))})")
    return [
        p.name for p in sorted(tests.glob("test_*.py")) if not words.search(code(p.read_text()))
    ]


def main() -> int:
    (source,) = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for item in BESIDE:
            whole = source / item
            (shutil.copytree if whole.is_dir() else shutil.copy)(whole, folder / item)
        files = chosen(folder / "tests")
        assert len(files) >= 15, files
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        where = [sys.executable, "-c", "import fastmerge; print(fastmerge.__file__)"]
        found = subprocess.check_output(where, cwd=folder, env=environment, text=True).strip()
        assert "site-packages" in found, f"not the installed package: {found}"
        print(f"{len(files)} files of tests against {found}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/{file}" for file in files]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
