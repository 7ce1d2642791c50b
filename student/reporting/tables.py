"""Runs, and comparisons of runs, are laid out as text."""

from __future__ import annotations

import calendar
import json
import time
from collections.abc import Sequence
from typing import Any

from featcache.console.text import format_bytes, format_table, join_lines
from featcache.errors import printable
from student.reporting.differences import ABSENT, SETTING, TOLD

Facts = dict[str, Any]
CELL = 60  # characters of a cell that somebody else wrote


def of_runs(found: Sequence[Facts], label: str | None = None) -> str:
    """Lay out runs, a line each, and then the damaged ones. `label` names the one score shown;
    all
    newest ones else."""
    good = [facts for facts in found if "damaged" not in facts]
    head = ("run", "recipe", "state", "step", "loss", "lr", "scores", "size", "last row")
    rows = [_run(facts, label) for facts in good]
    table = format_table([head, *rows], right=(3, 4, 5, 7)) if good else ""
    lines = [
        f"{facts['path']}: damaged: {facts['damaged']}" for facts in found if "damaged" in facts
    ]
    return "\n".join(filter(None, [table, join_lines(lines)]))


def _run(facts: Facts, only: str | None) -> tuple[str, ...]:
    scores = [
        f"{_cut(label)} {each['score']:.2f}"
        for label, each in facts["scores"].items()
        if only in (None, label)
    ]
    return (
        facts["path"],
        _recipe(facts),
        facts["state"],
        f"{facts['step']}/{facts['steps']}",
        _number(facts["loss"], ".4f"),
        _number(facts["lr"], ".2e"),
        ", ".join(scores) or "-",
        format_bytes(facts["bytes"]),
        age(facts["last_written"]),
    )


def _recipe(facts: Facts) -> str:
    return _cut(facts["recipe"]) + (f" of {_cut(facts['begun'])}" if facts["begun"] else "")


def age(written: str, now: float | None = None) -> str:
    """Say how long ago a time was.

    >>> age("1970-01-01T00:00:00Z", now=7260.0), age("1970-01-01T00:00:00Z", now=59.0)
    ('2 h ago', '59 s ago')
    """
    then = calendar.timegm(time.strptime(written, "%Y-%m-%dT%H:%M:%SZ"))
    seconds = max((time.time() if now is None else now) - then, 0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _number(value: float | str | None, form: str) -> str:
    return "-" if value is None else value if isinstance(value, str) else format(value, form)


def _cut(text: str) -> str:
    """Return a text as one cell may hold it."""
    text = printable(text, keep="")
    return text if len(text) <= CELL else f"{text[: CELL - 4]} ..."


def of_comparison(facts: Facts) -> str:
    """Lay out a comparison: the verdict, the runs by number, and a row for each thing compared."""
    runs = facts["runs"]
    numbers = [str(i) for i in range(1, len(runs) + 1)]
    names = [
        (number, each["path"], _recipe(each), each["state"], f"{each['step']}/{each['steps']}")
        for number, each in zip(numbers, runs, strict=True)
    ]
    rows = [
        *_differences(facts["held"]),
        *_differences({SETTING: facts["settings"], TOLD: facts["told"]}),
        *(
            ("loss", f"step {each['step']}", *(_number(value, ".4f") for value in each["values"]))
            for each in facts["losses"]
        ),
        *(("score", _cut(each["label"]), *map(_score, each["values"])) for each in facts["scores"]),
    ]
    parts = [join_lines([facts["verdict"]]), format_table([("", "run", "recipe", "", ""), *names])]
    if rows:
        parts.append(format_table([("", "", *numbers), *rows]))
    if len({each["recipe"] for each in runs}) > 1:
        parts.append("losses of different recipes have different scales")
    return "\n\n".join(parts)


def _differences(groups: dict[str, dict[str, list[Any]]]) -> list[tuple[str, ...]]:
    return [
        (group, _cut(key), *map(_value, values))
        for group, keys in groups.items()
        for key, values in keys.items()
    ]


def _value(value: Any) -> str:
    if value is ABSENT:
        return "-"
    return _cut(value if isinstance(value, str) else json.dumps(value))


def _score(value: Facts | None) -> str:
    if value is None:
        return "-"
    low, high = value["interval"][:2]
    return f"{value['score']:.2f} [{low:.2f}, {high:.2f}]"
