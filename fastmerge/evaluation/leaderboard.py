"""The Open LLM Leaderboard v1: its six tasks and its table."""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.evaluation.scores import Scores

# Open LLM Leaderboard v1: task, shots, metric (evaluation protocol of the leaderboard's own page).
LEADERBOARD_V1 = (
    ("ARC", "arc_challenge", 25, "acc_norm,none"),
    ("HellaSwag", "hellaswag", 10, "acc_norm,none"),
    ("MMLU", "mmlu", 5, "acc,none"),
    ("TruthfulQA", "truthfulqa_mc2", 0, "acc,none"),
    ("Winogrande", "winogrande", 5, "acc,none"),
    ("GSM8K", "gsm8k", 5, "exact_match,strict-match"),
)
# The row of the model card that the idea comes from.
LEADERBOARD_V1_SOURCE = ("blur-7b merge", (44.80, 70.41, 50.90, 43.20, 66.22, 43.82))


def leaderboard_table(
    rows: Sequence[tuple[str, Scores]], limit: int | None = None, *, is_split: bool = False
) -> str:
    """The six columns and their average as Markdown, the source's row first. ``limit``: items a
    task at most; ``is_split``: the rows are of a part of the items.
    """
    titles = [title for title, _, _, _ in LEADERBOARD_V1]
    lines = [
        f"| model | {' | '.join(titles)} | average |",
        f"|---|{'---:|' * (len(titles) + 1)}",
    ]
    label, published = LEADERBOARD_V1_SOURCE
    numbers = [(f"{label} (published)", list(published))]
    numbers += [(name, [scores.tasks[title].value for title in titles]) for name, scores in rows]
    for name, values in numbers:
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {name} | {cells} | {sum(values) / len(values):.2f} |")
    part = "part of the items" if limit is None else f"{limit} items a task"
    if limit is not None or is_split:
        lines += ["", f"From {part}: not to be compared with the published row."]
    return "\n".join(lines)
