"""Every committed number again: runs every preset in turn and rewrites results/.

    python benchmarks/all.py                # hours, on a machine that has nothing else to do
    python benchmarks/all.py walk ops       # those whose files have these names
    python benchmarks/all.py --list

One that fails does not end the others; the exit code is 1 then. The experiments of real/ and
retrograde/ have commands, and results, of their own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Preset:
    """A script's words, and the files below results/ that it writes; ``printed``: one, which it
    prints.
    """

    command: str
    writes: tuple[str, ...]
    printed: bool = False


def _both(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}{suffix}" for name in names for suffix in (".json", ".md"))


def _only(names: str) -> str:
    return "".join(f" --only {name}" for name in names.split())


# Of these a thousand tries take a minute, of a header a second: each has its own run.
KINDS = (
    "config index recipe schedule adapter tokenizer pieces tokenizer_config space mixture "
    "evaluated lineage manifest part journal"
)
ROOMS = "parts average fold mixture"  # what is merged in other ways than a recipe's in one go

PRESETS = (
    Preset("merge_model.py --size 1.1b --repeat 5", _both("merge_model-1.1b")),
    Preset(
        "merge_model.py --size 1.1b --repeat 5 --cache both --isa avx2",
        _both("merge_model-1.1b-avx2"),
    ),
    Preset("picture.py", ()),  # of merge_model-1.1b
    Preset(
        "merge_model.py --size 7b --sparse --skip-mergekit --jobs linear,ties --repeat 1",
        _both("merge_model-7b-sparse"),
    ),
    Preset("memory.py --record", (*_both("memory", "memory-models", "memory-parts"), "memory.png")),
    Preset("scaling.py", (*_both("scaling"), "scaling.png")),  # 56 GB of disk
    Preset("scaling.py --sizes 7b", (*_both("scaling-7b"), "scaling-7b.png")),
    Preset("walk.py --size 0.2b --repeat 7", _both("walk-0.2b")),
    Preset("walk.py --size 1.1b --repeat 5", _both("walk-1.1b")),
    Preset("fold.py --size 1.1b --rank 16 --repeat 5", _both("fold-1.1b")),
    Preset("adapters.py --rounds 5 --record", _both("adapters")),
    Preset("kernels.py", _both("kernels")),
    Preset("ops.py --seconds 2", _both("ops")),
    Preset("exactness.py", _both("exactness")),
    Preset("startup.py --pairs 25", _both("startup")),
    Preset("average.py --size 0.5b --models 8 --repeat 4 --torch", ("average.json",), True),
    Preset("parts.py --size 1.1b --parts 3 --repeat 3", ("parts.json",), True),
    Preset("remote.py --size 0.2b --repeat 3", ("remote.json",), True),
    # With address and keys of an S3 server in the environment; it fails where there is none.
    Preset("large_object.py s3://fastmerge/large --record", _both("large_object")),
    Preset("many_tensors.py --rounds 3 --record", _both("many_tensors")),
    Preset("scale.py", ("scale.txt",), True),
    Preset("mergekit_tests/run.py", ("mergekit_tests.txt",), True),
    Preset("mergekit_tests/run.py --peft", ("peft_tests.txt",), True),
    Preset("fuzz.py --only header --headers 1000000 --save", _both("fuzz")),
    Preset("fuzz.py --seconds 600 --save" + _only(KINDS), _both("fuzz-kinds")),
    Preset("faults.py --sample 22 --save", _both("faults")),
    Preset("faults.py --sample 4 --interrupts 1 --save" + _only(ROOMS), _both("faults-rooms")),
    Preset("kills.py --record", _both("kills")),
    Preset(
        "sanitize.py --save",
        _both("sanitize", "sanitize-address", "sanitize-undefined", "sanitize-thread"),
    ),
    # After real/run.py, whose folder and data it wants by these names; it fails where they are not.
    Preset("optimisers.py real --models real/models --data data --record", _both("optimisers")),
    Preset("gpu.py", ("gpu.json", "gpu.svg", "gpu-tests.txt")),  # says so where there is no GPU
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of scripts' or files' names")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    options = parser.parse_args()
    chosen = [preset for preset in PRESETS if _is_meant(preset, options.names)]
    if not chosen:
        parser.error(f"nothing is called {', '.join(options.names)}")
    failed = []
    for preset in chosen:
        print(f"$ python benchmarks/{preset.command}", flush=True)
        if not options.list and not _run(preset):
            failed.append(preset.command)
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


def _is_meant(preset: Preset, names: list[str]) -> bool:
    words = (preset.command.split()[0], *preset.writes)
    return not names or any(name in word for name in names for word in words)


def _run(preset: Preset) -> bool:
    """Whether it ended well."""
    script, *words = preset.command.split()
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(
        command, stdout=subprocess.PIPE if preset.printed else None, text=True, check=False
    )
    if preset.printed and not done.returncode:
        print(done.stdout)
        (RESULTS / preset.writes[0]).write_text(done.stdout)
    return not done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
