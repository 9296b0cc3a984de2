"""What a release must pass: `make release-check`.

    python .ci/release.py PYTHON...       # the interpreters that a wheel is made for

The sdist has every file of the repository that it should; a wheel is built from it for each
interpreter, of at most 3 MB; twine takes both; each wheel is installed, with binaries alone and no
compiler on PATH, in an empty environment, and the tests run against it there. Symbols that are
newer than manylinux_2_28's are named: the container of the release's wheels has none of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 3_000_000
# Not for a packager: what only the repository's host reads, and arrays that experiments left.
LEFT_OUT = re.compile(r"\.gitignore|\.github/.*|benchmarks/(retrograde|real)/results/.*")
# The newest versions that manylinux_2_28 allows.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
TOOLS = ("pytest>=8", "hypothesis>=6.100", "ml_dtypes>=0.4")


def run(*command: str | Path, **how: Any) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, **how)


def pip(python: str | Path) -> tuple[str | Path, ...]:
    """-I: what lies on a PYTHONPATH it would take for installed."""
    return (python, "-I", "-m", "pip", "--disable-pip-version-check")


def check_sdist(sdist: Path) -> None:
    """Every tracked file is in it."""
    with tarfile.open(sdist) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    if not (ROOT / ".git").exists():
        return
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")
    missing = [f for f in tracked if f and f not in there and not LEFT_OUT.fullmatch(f)]
    assert not missing, f"MANIFEST.in leaves out {missing}"
    print(f"{sdist.name}: {len(there)} names, {sdist.stat().st_size} bytes")


def check_symbols(wheel: Path) -> None:
    """Names what keeps the wheel from manylinux_2_28, if anything does."""
    run(sys.executable, "-m", "auditwheel", "show", wheel)
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(wheel, folder, "zip")
        (library,) = Path(folder, "fastmerge").glob("_C*.so")
        table = subprocess.check_output(["objdump", "-T", library], text=True)
    newer = []
    for kind, version, name in re.findall(r"\((GLIBCXX|GLIBC|CXXABI)_([\d.]+)\)\s+(\S+)", table):
        if tuple(map(int, version.split("."))) > NEWEST[kind]:
            newer.append(f"{name} ({kind}_{version})")
    print(f"newer than manylinux_2_28: {', '.join(newer) or 'nothing'}", flush=True)


def check_installed(python: str, wheel: Path, sdist: Path) -> None:
    """The tests against the wheel, in an empty environment without a compiler."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(python, "-m", "venv", folder / "venv")
        own = folder / "venv" / "bin"
        run(*pip(own / "python"), "install", "--quiet", "--only-binary", ":all:", wheel, *TOOLS)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / "sdist", filter="data")
        (source,) = (folder / "sdist").iterdir()
        bare = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
        (folder / "tools").mkdir()
        for tool in ("bash", "true"):  # which tests start
            (folder / "tools" / tool).symlink_to(str(shutil.which(tool)))
        bare["PATH"] = f"{own}:{folder / 'tools'}"
        assert not any(shutil.which(tool, path=bare["PATH"]) for tool in ("cc", "gcc", "c++"))
        run(own / "fastmerge", "--version", env=bare)
        run(own / "python", source / ".ci" / "installed.py", source, env=bare)


def main() -> None:
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", dist, ROOT)
    (sdist,) = dist.glob("*.tar.gz")
    check_sdist(sdist)
    wheels = []  # what takes seconds is said before the suites, which take minutes each
    for python in sys.argv[1:] or [sys.executable]:
        before = set(dist.glob("*.whl"))
        run(*pip(python), "wheel", "--quiet", "--no-deps", "--wheel-dir", dist, sdist)
        (wheel,) = set(dist.glob("*.whl")) - before
        size = wheel.stat().st_size
        assert size <= MOST_BYTES, f"{wheel.name}: {size} bytes, over {MOST_BYTES}"
        print(f"{wheel.name}: {size} bytes")
        check_symbols(wheel)
        wheels.append((python, wheel))
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    failed = []
    for python, wheel in wheels:
        try:
            check_installed(python, wheel, sdist)
        except subprocess.CalledProcessError as error:
            failed.append(f"{python}: {wheel.name} failed: {error}")
    if failed:
        sys.exit("\n".join(failed))
    print("ready for a release")


if __name__ == "__main__":
    main()
