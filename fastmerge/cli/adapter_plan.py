"""What ``fastmerge plan`` says of a merge of adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.cli.console import pairs, print_json, seed_of
from fastmerge.units import format_bytes

if TYPE_CHECKING:
    from fastmerge.planning.adapters import AdapterMerge


def show_adapter_plan(plan: AdapterMerge, out: Path | None, *, overwrite: bool, json: bool) -> None:
    """Checks the place, where there is one, and says what would be written there."""
    from fastmerge.output.place import check_output

    found = plan.describe()
    if out is not None:
        check_output(out, plan.places, found["bytes_out"], overwrite=overwrite)
    if json:
        print_json(found)
        return
    rows = [
        ("adapter", f"{own['reference']}: {own['modules']} modules, ranks {_listed(own['ranks'])}")
        for own in found["adapters"]
    ]
    rows += [
        ("method", found["method"]),
        ("base", found["base"] or "not said"),
        ("modules", f"{found['modules']}, ranks {_listed(found['ranks'])}"),
        ("type", _listed(found["dtypes"])),
        ("read", format_bytes(found["bytes_in"])),
        ("write", format_bytes(found["bytes_out"])),
    ]
    pairs([*rows, *seed_of(found), *(("note", note) for note in found["notes"])])


def _listed(values: list[object]) -> str:
    return ", ".join(map(str, values))
