"""A report as Markdown, to be pasted into an issue or a README."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fastmerge.bench.pagecache import HOW_COLD
from fastmerge.bench.rows import Row
from fastmerge.output.card import escaped

_MIB = 2**20
Cell = Callable[[Row], str]
Columns = dict[str, Cell]  # by heading; one that is empty in every row is left out


def markdown(report: dict[str, Any], title: str = "fastmerge bench") -> str:
    """Command, machine, ceilings, a table for each kind, notes."""
    parts = [f"# {title}", about(report["machine"]), _ceilings(report["ceilings"])]
    if "command" in report:
        parts.insert(1, f"```sh\n{report['command']}\n```")
    said: dict[str, None] = {}  # once, though several tables need it
    for kind, heading, columns, notes in _TABLES:
        rows = [row for row in report["jobs"] if row["kind"] == kind]
        if rows:
            parts += [f"## {heading}", table(columns | _of_peers(rows), rows)]
            said |= dict.fromkeys(notes)
    parts.append("## How it was measured")
    repeat = report["repeat"]
    runs = f"{repeat} run{'s'[: repeat != 1]}"
    threads = report["threads"]
    how = f"Medians with their quartiles of {runs} on {threads} thread{'s'[: threads != 1]}"
    less = f"of other programs {report['peer_repeat']}, of kernels and ops 5 at least"
    parts += [f"{how}; {less}. {_CHECKED}", *said]
    parts += [f"Note: {escaped(note)}." for note in report["notes"]]
    return "\n\n".join(parts) + "\n"


def as_json(report: dict[str, Any]) -> str:
    """Everything, every single run included."""
    return json.dumps(report, indent=1) + "\n"


def about(machine: dict[str, str]) -> str:
    """The machine in one line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items()) + "."


def table(columns: Columns, rows: Sequence[Row]) -> str:
    """Text flush left, numbers flush right."""
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    heads = list(cells)
    lines = [heads, ["---:" if _is_number(column) else "---" for column in cells.values()]]
    lines += [[cells[name][i] for name in heads] for i in range(len(rows))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_number(column: Sequence[str]) -> bool:
    return all(not text or text[0].isdigit() or text[0] in "-≤≥" for text in column)


def shown(found: dict[str, float], form: str = ".2f", scale: float = 1) -> str:
    """A median with its quartiles."""
    middle, low, high = (format(found[key] * scale, form) for key in ("median", "low", "high"))
    return f"{middle} ({low}-{high})"


def rate(found: float | dict[str, float], decimals: int) -> str:
    """GB/s with so many decimals, and with two figures at least: of a slow disk too."""
    middle = found["median"] if isinstance(found, dict) else found
    while decimals < 6 and round(middle, decimals) * 10**decimals < 10:
        decimals += 1
    return shown(found, f".{decimals}f") if isinstance(found, dict) else f"{found:.{decimals}f}"


def _ceilings(ceilings: Sequence[Row]) -> str:
    columns: Columns = {
        "ceiling": lambda row: row["name"],
        "GB/s": lambda row: "-" if "absent" in row else rate(row["gigabytes_per_second"], 1),
        "how": lambda row: row.get("how") or row["absent"],
    }
    return table(columns, ceilings)


def _share(row: Row) -> str:
    return shown(row["share_of_ceiling"], ".0%") if "share_of_ceiling" in row else ""


def _bar(row: Row, key: str, sense: str) -> str:
    """What a preset aims at, behind the figure that it judges."""
    bar = row.get("bars", {}).get(key)
    return "" if bar is None else f" ({sense} {bar:g})"


def _times_floor(row: Row) -> str:
    if "times_floor" not in row:
        return ""
    return f"{row['times_floor']['median']:.2f}{_bar(row, 'times_floor', '≤')}"


def _of_peers(rows: Sequence[Row]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row.get("peers", {}))
    columns: Columns = {}
    unit, form, scale = ("us", ".0f", 1e6) if rows[0]["kind"] == "ops" else ("s", ".2f", 1)
    for name in names:

        def seconds(row: Row, name: str = name) -> str:
            found = row["peers"].get(name)
            return "" if found is None else format(found["seconds"]["median"] * scale, form)

        def by(row: Row, name: str = name) -> str:
            return str(row["peers"].get(name, {}).get("by", ""))

        def times(row: Row, name: str = name) -> str:
            found = row["peers"].get(name)
            bar = _bar(row, f"times_{name}", "≥")
            return "" if found is None else f"{found['times']['median']:.2f}{bar}"

        def anonymous(row: Row, name: str = name) -> str:
            found = row["peers"].get(name, {}).get("peak_anonymous_bytes")
            return "" if found is None else f"{found / _MIB:.0f}"

        columns |= {
            f"{name} {unit}": seconds,
            f"{name}'s": by,
            f"{name} / fastmerge": times,
            f"{name}'s anonymous MiB": anonymous,
        }
    return columns


_WHOLE: Columns = {
    "job": lambda row: escaped(row["job"]),  # of a fold with the name of the adapter's folder
    "size": lambda row: row["size"] or "",
    "cache": lambda row: row["cache"],
    "s": lambda row: shown(row["seconds"]),
    "CPU s": lambda row: f"{row['cpu_seconds']['median']:.2f}",
    "GB/s": lambda row: rate(row["gigabytes_per_second"], 2),
    "of its ceiling": _share,
    "x serial floor": _times_floor,
    "anonymous MiB": lambda row: f"{row['peak_anonymous_bytes'] / _MIB:.0f}",
    "RSS MiB": lambda row: f"{row['peak_rss_bytes'] / _MIB:.0f}",
}
_KERNELS: Columns = {
    "kernel": lambda row: row["job"],
    "type": lambda row: row["dtype"],
    "instruction set": lambda row: row["isa"],
    "ns an entry": lambda row: f"{row['nanoseconds_per_entry']:.2f}",
    "GB/s": lambda row: rate(row["gigabytes_per_second"], 1),
    "of its ceiling": _share,
}
_OPS: Columns = {
    "op": lambda row: row["job"],
    "type": lambda row: row["dtype"],
    "a tensor": lambda row: f"{row['tensor'][:-1]} {row['tensor'][-1]}iB",
    "us": lambda row: shown(row["seconds"], ".0f", 1e6),
    "GB/s": lambda row: rate(row["gigabytes_per_second"], 1),
    "of its ceiling": _share,
}
_OF_WHOLES = (
    "Merges, walks and folds are whole processes, from start to exit, fsync included. The ceiling: "
    "reading every input byte once and writing every output byte once, at the same time, on the "
    "same files in the same repetition; the serial floor does one after the other, with one "
    f"thread. Cold: evicted before each run by {HOW_COLD}; what a disk or a host keeps is not. Of "
    "other programs the imports are left out, and what they leave to the system to write back."
)
_CHECKED = (
    "Nothing is shown unchecked: of a model every byte against the checksums of the merge and some "
    "tensors against NumPy, of kernels the bits, of ops each entry (of DARE the mean and share)."
)
_ONE_SHOT = "One-shot: one merge (multislerp) of the walk's models."
_IN_MEMORY = (
    "Of kernels and ops the ceiling is copying one tensor and reading the others, in the same "
    "rounds, on as many threads."
)
_KERNEL_SECONDS = "Kernels run on one thread; their seconds are the process's CPU seconds."
_TABLES = (
    ("merge", "Merges", _WHOLE, (_OF_WHOLES,)),
    ("walk", "Walks", _WHOLE, (_OF_WHOLES, _ONE_SHOT)),
    ("fold", "Folding an adapter", _WHOLE, (_OF_WHOLES,)),
    ("kernels", "Kernels", _KERNELS, (_IN_MEMORY, _KERNEL_SECONDS)),
    ("ops", "Tensors in memory", _OPS, (_IN_MEMORY,)),
)
