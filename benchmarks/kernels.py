"""Each CPU kernel on one thread, for every instruction set: `fastmerge bench kernels`, saved.

python benchmarks/kernels.py [--elements N] [--isa NAME] [--dtype BF16|F16|F32]
"""

from __future__ import annotations

import argparse

from record import HERE, commit, save, tell

from fastmerge import _C
from fastmerge.bench.kernels import DTYPES, ENTRIES
from fastmerge.bench.report import markdown
from fastmerge.bench.request import Request
from fastmerge.bench.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=ENTRIES)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--isa", choices=_C.isas(), action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    options = parser.parse_args()
    report = run(
        Request(
            kinds=("kernels",), entries=options.elements, repeat=options.repeats,
            isas=tuple(options.isa or _C.isas()), dtypes=tuple(options.dtype or DTYPES[:1]),
            folder=HERE,
        ),
        tell,
    )  # fmt: skip
    report["commit"] = commit()
    text = f"{markdown(report, 'CPU kernels')}\nCommit {report['commit']}.\n"
    save(HERE / "results" / "kernels.json", report, text)
    print(text)


if __name__ == "__main__":
    main()
