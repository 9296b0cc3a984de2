"""mergekit 0.1.5's own tests, with its ``run_merge`` and with fastmerge's in its place.

    python benchmarks/mergekit_tests/run.py [--only test_tokenizer.py] [--skip-peer] [--methods]
    python benchmarks/mergekit_tests/run.py --peft

Fetches mergekit's source distribution from the package index into a temporary folder, where it and
its tests (LGPL) stay; its ``tests/common.py`` is not in there, and `common.py` beside this file
takes its place: it loads every result with transformers. Prints a table, and every test that passes
with mergekit's function and not with fastmerge's. Exit code 1 where there are such. ``--methods``:
mergekit's own program, with fastmerge's kernels under its methods (integrations.mergekit_methods).
``--peft``: PEFT 0.21.2's tests of weighted adapters, with integrations.peft; `peft_models.py` has
the models that they would download.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

HERE = Path(__file__).parent
CONFTEST = """\
import mergekit.merge
from fastmerge.integrations.mergekit import run_merge

mergekit.merge.run_merge = run_merge
"""
METHODS = """\
from fastmerge.integrations import mergekit_methods

mergekit_methods.install()
"""
PEFT = """\
from fastmerge.integrations import peft

peft.install()
"""
PEFT_FILES = [
    f"tests/test_{name}.py"
    for name in ("custom_models", "decoder_models", "feature_extraction_models")
]


def fetch(folder: Path, pinned: str) -> Path:
    """The unpacked source distribution, tests made a package, in ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-binary", ":all:", "-d", str(folder), pinned], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (root,) = (path for path in folder.iterdir() if path.is_dir())
    for package in ("mergekit", "src"):  # the installed one is what is tested
        shutil.rmtree(root / package, ignore_errors=True)
    (root / "tests" / "__init__.py").touch()
    shutil.copy(HERE / "common.py", root / "tests")
    return root


def results(root: Path, *only: str) -> dict[str, tuple[str, str]]:
    """Of each test: 'passed', 'failed' or 'skipped', and the first line of why."""
    report = root / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    subprocess.run(
        [*command, "--junitxml", report, *only], cwd=root, check=False, stdout=subprocess.DEVNULL
    )
    found = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').split('.')[1]}::{case.get('name')}"
        bad = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        why = "" if bad is None else (bad.get("message") or "").strip()
        found[name] = kind, (why.splitlines() or [""])[0][:160]
    return found


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", default="", metavar="FILE", help="one of its files")
    arguments.add_argument("--skip-peer", action="store_true", help="do not run mergekit's own")
    arguments.add_argument("--methods", action="store_true", help="only its methods are ours")
    arguments.add_argument("--peft", action="store_true", help="PEFT's, of weighted adapters")
    given = arguments.parse_args()
    only, models = [f"tests/{given.only}"], ""
    if given.peft:
        # Its settings make errors of warnings, and transformers warns it of a name's end.
        only = [
            *(only if given.only else PEFT_FILES),
            "-k",
            "weighted",
            "-W",
            "ignore::FutureWarning",
        ]
        models = (HERE / "peft_models.py").read_text()
    with tempfile.TemporaryDirectory() as folder:
        root = fetch(Path(folder), "peft==0.21.2" if given.peft else "mergekit==0.1.5")
        conftest = root / "tests" / "conftest.py"
        conftest.write_text(models)
        peer = {} if given.skip_peer else results(root, *only)
        ours_in = PEFT if given.peft else METHODS if given.methods else CONFTEST
        conftest.write_text(models + ours_in)
        ours = results(root, *only)
    files = sorted({name.split("::")[0] for name in ours})
    print("| file | tests | pass without fastmerge | pass with it |\n|---|---|---|---|")
    for file in [*files, "all"]:
        counts = [
            Counter(v[0] for k, v in of.items() if file in ("all", k.split("::")[0]))
            for of in (ours, peer)
        ]
        total = sum(counts[0].values())
        theirs = "-" if given.skip_peer else counts[1]["passed"]
        print(f"| {file} | {total} | {theirs} | {counts[0]['passed']} |")
    lost = [
        name for name, (kind, _) in ours.items()
        if kind == "failed" and peer.get(name, ("passed",))[0] == "passed"
    ]  # fmt: skip
    for name in lost:
        print(f"{name}: {ours[name][1]}")
    both = sum(v[0] == "failed" and k not in lost for k, v in ours.items())
    print(f"{len(lost)} pass without fastmerge only; {both} fail with either")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
