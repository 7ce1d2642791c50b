"""What differs between runs, and all of their settings."""

from __future__ import annotations

import json
from typing import Any

from featcache.drawing.page import table
from featcache.storage import identity
from student.reporting.contents import Contents
from student.reporting.differences import ABSENT, SETTING, TOLD

CELL = 200  # characters of a value


def section(contents: Contents) -> str:
    """Return what differs, by what it bears on, and the settings of all runs, folded away."""
    numbers = [run.name for run in contents.runs]
    parts = []
    if len(contents.runs) > 1:
        judged = contents.judged
        groups = {**judged["held"], SETTING: judged["settings"], TOLD: judged["told"]}
        rows = [
            (group, key, *map(_text, values))
            for group, keys in groups.items()
            for key, values in keys.items()
        ]
        parts.append(
            table(rows, ("bears on", "what differs", *numbers))
            if rows
            else "<p>Nothing that is recorded differs.</p>"
        )
    parts.append(
        f"<details><summary>All that config.json says</summary>\n{_all(contents, numbers)}\n"
        "</details>"
    )
    return "\n".join(parts)


def _all(contents: Contents, numbers: list[str]) -> str:
    flat = [dict(identity.flatten(run.record)) for run in contents.runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [(key, *(_text(each.get(key, ABSENT)) for each in flat)) for key in keys]
    return table(rows, ("", *numbers))


def _text(value: Any) -> str:
    if value is ABSENT:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= CELL else f"{text[: CELL - 4]} ..."
