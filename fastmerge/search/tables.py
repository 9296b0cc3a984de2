"""Merges beside one another as tables of a report, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastmerge.evaluation.leaderboard import leaderboard_table
from fastmerge.evaluation.settings import Evaluate
from fastmerge.output.card import escaped
from fastmerge.search.rows import Line, figure, in_points, split_name, with_interval


def comparison(lines: Sequence[Line], first: str, *, counted: bool = False) -> str:
    """One row a line, and what each leaves of the lead of the first, which is called ``first``;
    ``counted``: with the candidates that it was chosen from.
    """
    split = split_name(lines)
    steered = split != "steering"  # else the same column twice
    perplexity = any(line.scores.perplexity is not None for line in lines)
    heads = [
        *("merge", "how"),
        *(["candidates"] if counted else []),
        *(["steering, %"] if steered else []),
        *(f"{split}, % [95 % interval]", f"{first} less this, points", "p (Holm)"),
        *(["perplexity"] if perplexity else []),
    ]
    table = [_row(heads), f"|---|---|{'---:|' * (len(heads) - 2)}"]
    for line in lines:
        value = with_interval(line)
        again = line.row.repeats
        if again:
            mean, spread = (float(x) for x in (np.mean(again), np.std(again, ddof=1)))
            value += f"; {len(again)} masks: {figure(mean)} ± {figure(spread)}"
        cells = [
            *(escaped(line.row.name), escaped(line.row.how)),
            *([str(line.row.evaluations)] if counted else []),
            *([figure(line.row.steer.value)] if steered else []),
            value,
            "-" if line.lead is None else in_points(line.lead),
            "-" if line.p is None else f"{line.p:.3f}",
            *([figure(line.scores.perplexity)] if perplexity else []),
        ]
        table.append(_row(cells))
    return "\n".join(table)


def by_task(lines: Sequence[Line]) -> list[str]:
    """A heading and the scores task by task, where there are several tasks."""
    tasks = sorted(lines[0].scores.tasks)
    if len(tasks) < 2:
        return []
    rows = [_row(["merge", *map(escaped, tasks)]), f"|---|{'---:|' * len(tasks)}"]
    for line in lines:
        cells = (line.scores.tasks.get(task) for task in tasks)
        values = [figure(None if cell is None else cell.value) for cell in cells]
        rows.append(_row([escaped(line.row.name), *values]))
    return [f"By {split_name(lines)} task, %:", "\n".join(rows)]


def leaderboard(lines: Sequence[Line], settings: Evaluate) -> str:
    """The six columns of the Open LLM Leaderboard v1 and their average, the source's row first; on
    the hold-out where the six are split.
    """
    is_split = settings.split is not None
    rows = [(escaped(x.row.name), x.scores if is_split else x.row.steer) for x in lines]
    return leaderboard_table(rows, settings.limit, is_split=is_split)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
