"""`fastmerge.ops` beside the best expression in plain torch, in one process, tensor by tensor:
`fastmerge bench ops --against torch`, for results/.

    python benchmarks/ops.py --seconds 1                    # all sizes, bf16 and fp32
    python benchmarks/ops.py --sizes 64K 1M --ops linear    # some

Of 1 GiB linear and SLERP alone: torch's TIES and DARE need more than 16 GiB there. All take about
20 GiB at most, and five rounds where a call is longer than the seconds of a row.

The last table is what a call costs besides its kernels: the time of a call for tensors of 4 Ki
entries less that of the bare calls into ``_C``.
"""

from __future__ import annotations

import argparse
from typing import Any

from record import HERE, commit, save, tell

from fastmerge.bench.report import markdown, shown, table
from fastmerge.bench.request import Request
from fastmerge.bench.run import run
from fastmerge.bench.tensors import OPS, SIZES, own_costs

THREADS = 2
LARGE, OF_LARGE = ("1G",), ("linear", "slerp")
DTYPES = {"bf16": "BF16", "fp32": "F32"}


def page(report: dict[str, Any]) -> str:
    """The report for people."""
    columns = {
        "call, 4 Ki entries": lambda row: f"{row['op']}, {row['of']}",
        "us": lambda row: shown(row["call"], ".1f", 1e6),
        "its kernels": lambda row: shown(row["kernels"], ".1f", 1e6),
        "its own": lambda row: shown(row["own"], ".1f", 1e6),
        "least": lambda row: f"{1e6 * (row['call']['best'] - row['kernels']['best']):.1f}",
    }
    title = "Tensors in memory: `fastmerge.ops` beside plain torch"
    last = f"Rounds of {report['seconds']} s a row; commit {report['commit']}.\n"
    return f"{markdown(report, title)}\n{table(columns, report['own'])}\n\n{last}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=[*OPS])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    dtypes = tuple(DTYPES[name] for name in options.dtypes)
    small = tuple(size for size in options.sizes if size not in LARGE)
    large = tuple(size for size in options.sizes if size in LARGE)
    reports = [
        run(
            Request(
                kinds=("ops",), against=("torch",), tensors=sizes, ops=ops, dtypes=dtypes,
                seconds=options.seconds, threads=THREADS, folder=HERE,
            ),
            tell,
        )
        for sizes, ops in (
            (small, tuple(options.ops)),
            (large, tuple(op for op in options.ops if op in OF_LARGE)),
        )
        if sizes and ops
    ]  # fmt: skip
    if not reports:
        parser.error(f"nothing to measure: of tensors that large there are {', '.join(OF_LARGE)}")
    report = reports[0] | {"jobs": [row for own in reports for row in own["jobs"]]}
    report |= {
        "seconds": options.seconds,
        "commit": commit(),
        "own": [
            row
            for torch in (True, False)
            for row in own_costs(options.seconds, THREADS, torch=torch)
        ],
    }
    text = page(report)
    if not options.no_save:
        save(HERE / "results" / "ops.json", report, text)
    print(text)


if __name__ == "__main__":
    main()
