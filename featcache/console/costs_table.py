"""What caches and runs cost is shown as a table, and as JSON."""

from __future__ import annotations

from typing import Any

from featcache.catalog.costs import Cost, Costs, payback
from featcache.console.text import format_bytes, format_seconds, format_table, join_lines
from featcache.errors import counted

_HEAD = (
    "cache",
    "command",
    "lines",
    "runs",
    "wall",
    "device",
    "read",
    "written",
    "teacher",
    "saved",
    "paid back after",
)
_ID = 32  # characters of a cache's id that are shown; ours have half as many


def as_json(costs: Costs) -> dict[str, Any]:
    """Return the sums of each command, of each cache, and of all."""
    return {
        "commands": [
            {"cache": cache or None, "command": command, **cost.as_json()}
            for (cache, command), cost in sorted(costs.by_command.items())
        ],
        "caches": [
            {"cache": cache, "path": costs.paths.get(cache), **payback(costs.of_cache(cache))}
            for cache in costs.caches
        ],
        "total": {**costs.total.as_json(), **payback(costs.of_caches())},
        "passed_over": costs.passed_over,
    }


def text(costs: Costs) -> str:
    """Return the table, and notes on what it does not know."""
    rows, told = list[tuple[str, ...]](), set[str]()
    for (cache, command), cost in sorted(costs.by_command.items()):
        after = "" if cache in told or not cache else _payback(costs.of_cache(cache))
        told.add(cache)  # in the first row of a cache
        shown = cache if len(cache) <= _ID else f"{cache[: _ID - 3]}..."
        rows.append((shown or "-", command, *_row(cost), after))
    rows.append(("total", "", *_row(costs.total), _payback(costs.of_caches())))
    return "\n".join([format_table([_HEAD, *rows], right=(*range(2, 11),)), *_notes(costs)])


def _row(cost: Cost) -> tuple[str, ...]:
    sums = cost.sums
    return (
        str(cost.lines),
        str(len(cost.runs) or ""),
        format_seconds(sums["wall_s"]),
        format_seconds(sums["device_s"]),
        format_bytes(sums["bytes_read"] + sums["picture_bytes"]),
        format_bytes(sums["bytes_written"]),
        format_seconds(sums["teacher_s"]),
        format_seconds(sums["teacher_saved_s"]),
    )


def _payback(costs: list[Cost]) -> str:
    after = payback(costs)["paid_back_after_runs"]
    return "" if after is None else f"{after:g} runs"


def _notes(costs: Costs) -> list[str]:
    total = costs.total
    notes = {
        "stopped or failed, with what they cost until then": total.stopped + total.failed,
        "of an older version, which say nothing of costs": total.unknown,
        "of training from a cache of which no ledger here says what a view took its teacher: "
        "what they saved is not known": total.saved_unknown,
        "none of ours, and passed over": costs.passed_over,
    }
    return [
        join_lines([f"{counted(count, 'line')} {what}"]) for what, count in notes.items() if count
    ]
