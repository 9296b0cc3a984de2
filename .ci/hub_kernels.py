"""Writes kernels/ as a repository for Hugging Face's `kernels` package.

    python .ci/hub_kernels.py hub/fastmerge-kernels      # a new folder

    README.md build.toml               for the Hub, and for its kernel-builder
    torch-ext/fastmerge_kernels/       the sources, importable without fastmerge and its extension
    build/torch-universal/             the same: pure Triton is its own build
    tests/ benchmarks/                 run on a GPU, or in Triton's interpreter

The sources are those of kernels/ and the modules of fastmerge that they import, with relative
imports: a kernel may be loaded from anywhere, in several versions at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME, MODULE, VERSION = "fastmerge-kernels", "fastmerge_kernels", 1
SHARED = ("errors", "primitives", "selection")  # what kernels/ imports of fastmerge
LEFT_OUT = ("backend", "README")  # the protocol of fastmerge's engine
FACE = f'''
from .combine import combine, combine_many
from .consensus import consensus, consensus_many
from .errors import FastmergeError, UnsupportedError
from .gram import gram, gram_many
from .select import select, select_many
from .selection import ALL, EVERY, INDEX, MAGNITUDE, MIXED, RANDOM, RANKED, Selection, Sparsify

__version__ = "{VERSION}"
'''
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
license = "Apache-2.0"
backends = ["cuda", "rocm"]

[torch-noarch]
"""
METADATA = {
    "name": NAME,
    "id": f"{MODULE}_{VERSION}",
    "version": VERSION,
    "license": "Apache-2.0",
    "python-depends": [],
    "backend": {"type": "cuda"},
}


def relative(text: str) -> str:
    """The source with its imports of fastmerge made relative."""
    text = re.sub(r"^(\s*from )fastmerge\.kernels(?=\.\w)", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*from )fastmerge\.kernels(?= import)", r"\1.", text, flags=re.MULTILINE)
    names = "|".join(SHARED)
    text = re.sub(rf"^(\s*from )fastmerge(?=\.(?:{names})\b)", r"\1", text, flags=re.MULTILINE)
    left = re.findall(r"^\s*(?:from|import) fastmerge.*$", text, re.MULTILINE)
    assert not left, f"an import of fastmerge that is not in SHARED: {left}"
    return text


def write(folder: Path) -> None:
    """Writes the repository to the new ``folder``."""
    folder.mkdir(parents=True)
    sources = {path.stem: path for path in sorted((ROOT / "kernels").glob("*.py"))}
    sources |= {name: ROOT / "fastmerge" / f"{name}.py" for name in SHARED}
    for place in (folder / "torch-ext" / MODULE, folder / "build" / "torch-universal"):
        place.mkdir(parents=True)
        for name, path in sources.items():
            if name not in LEFT_OUT:
                text = relative(path.read_text())
                (place / f"{name}.py").write_text(text + FACE * (name == "__init__"))
    (folder / "build" / "torch-universal" / "metadata.json").write_text(json.dumps(METADATA))
    (folder / "build.toml").write_text(BUILD)
    readme = (ROOT / "kernels" / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("[fastmerge](../README.md)", "fastmerge"))
    shutil.copy(ROOT / "LICENSE", folder)
    for part in ("tests", "benchmarks"):
        (folder / part).mkdir()
        shutil.copy(ROOT / ".ci" / "hub" / f"{part}.py", folder / part / _FILES[part])


_FILES = {"tests": f"test_{MODULE}.py", "benchmarks": "benchmark.py"}

if __name__ == "__main__":
    write(Path(sys.argv[1]))
