"""The table of the quick start: its rows and columns, its margins, and whether they are enough."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

from featcache.console.text import format_table
from featcache.errors import UserError
from pipelines import digits
from pipelines.seeds import spread

ROWS = {
    "teacher": "teacher (trained with labels)",
    "untrained": "untrained student",
    "mralign": "mralign student",
    "control": "mralign student of an untrained teacher",
}
COLUMNS = {
    "knn": "k-NN [CLS] %",
    "knn_mean": "k-NN mean %",
    "linear": "linear [CLS] %",
    "linear_mean": "linear mean %",
    "extract_s": "extract s",
    "train_s": "train s",
    "cache_bytes": "cache bytes",
}
# column: protocol and pool
EVALS = {
    "knn": ("knn", "cls"),
    "knn_mean": ("knn", "mean"),
    "linear": ("linear", "cls"),
    "linear_mean": ("linear", "mean"),
}
JUDGED = ("knn", "linear")  # by [CLS]
DEVIATIONS = 2.0
Row = dict[str, float]  # by column


def margins(found: dict[int, dict[str, Row]]) -> dict[str, dict[str, list[float]]]:
    """Return the points by which mralign is above each other student, one number a seed."""
    return {
        other: {
            kind: [round(rows["mralign"][kind] - rows[other][kind], 2) for rows in found.values()]
            for kind in EVALS
        }
        for other in ("untrained", "control")
        if all(other in rows for rows in found.values())
    }


def report(
    found: dict[int, dict[str, Row]], environment: dict[str, Any], length: str, seconds: float
) -> str:
    """Format the table as Markdown that is legible as text, with the length of the students and the
    machine it was measured on."""
    cells = [["", *COLUMNS.values()]]
    for name in next(iter(found.values())):
        title = ROWS[name]
        cells.append(
            [
                title,
                *(_cell([rows[name].get(key) for rows in found.values()], key) for key in COLUMNS),
            ]
        )
    table = format_table(cells, right=range(1, len(cells[0])), markdown=True)
    lines = [f"# Quickstart: what students know of {digits.TEST} held-out digits", "", table, ""]
    for other, points in margins(found).items():
        told = ", ".join(
            f"{spread(points[kind], '+.1f')} {COLUMNS[kind].removesuffix(' %')}" for kind in points
        )
        lines.append(f"- {ROWS['mralign']} less {ROWS[other]}, in points: {told}")
    lines += [
        "",
        f"Seeds {', '.join(map(str, found))} ({length}); {seconds:.0f} s in all on "
        f"{os.cpu_count()} cores ({environment['device']}), torch {environment['torch']}, commit "
        f"{environment['commit'] or 'unknown'}.",
    ]
    if len(found) > 1:
        lines.append("Numbers are means over the seeds, with the standard deviation of one seed.")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None], key: str) -> str:
    given = [value for value in values if value is not None]
    if not given:
        return "-"
    return spread(given, ".1f") if key in EVALS else f"{statistics.mean(given):,.0f}"


def judge(found: dict[int, dict[str, Row]]) -> None:
    """Raise UserError unless mralign is DEVIATIONS standard deviations above the untrained student
    by [CLS], in the mean of the seeds: the reason for this program."""
    for kind in JUDGED:
        pairs = [(rows["mralign"][kind], rows["untrained"][kind]) for rows in found.values()]
        mean = statistics.mean(one - other for one, other in pairs)
        least = DEVIATIONS * statistics.mean(deviation(*pair, digits.TEST) for pair in pairs)
        if mean < least:
            raise UserError(
                f"mralign is {mean:+.1f} points of {COLUMNS[kind].removesuffix(' %')} above the "
                f"untrained student, at least {least:+.1f} are expected, {DEVIATIONS:g} standard "
                "deviations; this is a defect somewhere between teacher and student: see "
                "overview.png, then `featcache verify CACHE --recompute 64`"
            )


def deviation(one: float, other: float, pictures: int) -> float:
    """Return the standard deviation, in points, of the difference of two scores in per cent, each
    of so many pictures of its own. Of the same pictures it is smaller.

    >>> deviation(50.0, 50.0, 200)
    5.0
    """
    return math.sqrt((one * (100 - one) + other * (100 - other)) / pictures)
