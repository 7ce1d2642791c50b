"""Results are kept in DIR/results.json, and shown in DIR/results.md.

They are written anew after every row, so that what was measured is there whenever the machine is
taken away. Rows of several runs are merged: of one measurement the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from featcache.console.text import format_table
from featcache.errors import UserError, printable
from featcache.runtime import strict_json
from featcache.storage import json_file

JSON, MARKDOWN = "results.json", "results.md"
FORMAT = 1
MAX_BYTES = 16 << 20
DONE, FAILED, ENDED, NOT_RUN = "done", "failed", "ended by its time box", "not run"
Status = Literal["done", "failed", "ended by its time box", "not run"]
Text = Annotated[str, Field(max_length=10_000)]
_STRICT = ConfigDict(extra="forbid", strict=True)


class Row(BaseModel):
    """A row holds one number with its unit, or a reason why there is none, and what is asked of
    it."""

    model_config = _STRICT

    label: Text
    value: float | None
    unit: Text = ""
    at_least: float | None = None
    at_most: float | None = None
    note: Text = ""
    facts: dict[str, Any] = Field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return whether the goal is reached; empty without one."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return ""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return "ok" if low <= self.value <= high else "MISSED"

    @property
    def goal(self) -> str:
        """Return the goal in words."""
        asked = {"at least": self.at_least, "at most": self.at_most}
        return ", ".join(f"{word} {bound:g}" for word, bound in asked.items() if bound is not None)


class Entry(BaseModel):
    """An entry holds how one measurement went, and its rows."""

    model_config = _STRICT

    title: Text
    status: Status = NOT_RUN
    reason: Text = ""
    seconds: float = 0.0
    commit: Text = ""
    rows: list[Row] = Field(default_factory=list)


class Results(BaseModel):
    """Results of one machine at one size; `machine` and `versions` are of the last run."""

    model_config = _STRICT

    format: Literal[1] = FORMAT
    sizes: Literal["real", "trial"]
    machine: dict[str, Text | int | float | None] = Field(default_factory=dict)
    versions: dict[str, Text] = Field(default_factory=dict)
    commit: Text = ""
    settings: Text = ""
    measurements: dict[str, Entry] = Field(default_factory=dict)


def load(folder: Path, sizes: Literal["real", "trial"]) -> Results:
    """Read the results of earlier runs, or begin new ones; what is no such file, or of the other
    size, is a UserError."""
    path = folder / JSON
    if not path.exists():
        return Results(sizes=sizes)
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError("it is no file, or a very large one")
        found = Results.model_validate(strict_json.parse_object(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(_no_results(path, f"{where}: {first['msg']}")) from error
    except (OSError, ValueError) as error:
        raise UserError(_no_results(path, str(error))) from error
    if found.sizes != sizes:
        raise UserError(
            f"{str(path)!r} holds {found.sizes} sizes, and these are {sizes}: give another --out"
        )
    return found


def _no_results(path: Path, why: str) -> str:
    return (
        f"cannot add to {str(path)!r}: {printable(why)[:200]}; it must be what this program wrote: "
        "give another --out"
    )


def check_machine(results: Results, machine: dict[str, Any]) -> None:
    """Raise UserError where earlier rows are of another device: ratios may be merged, machines may
    not."""
    before = results.machine.get("device")
    if results.measurements and before not in (None, machine["device"]):
        raise UserError(
            f"these results are of {before}, and this machine has {machine['device']}: give "
            "another --out"
        )


def save(folder: Path, results: Results) -> None:
    """Write both files, each whole or not at all."""
    json_file.write_file(
        folder / JSON, (results.model_dump_json(indent=1, exclude_defaults=True) + "\n").encode()
    )
    json_file.write_file(folder / MARKDOWN, markdown(results).encode())


# ------------------------------------------------------------ for people


def markdown(results: Results) -> str:
    """Format all rows as a page: the machine, a table, and what was not measured."""
    lines = [
        "# What a GPU shows",
        "",
        f"{machine_line(results)}. {results.settings}",
        "",
        *_trial_note(results),
        _table(results),
        "",
        *_details(results),
    ]
    # rows of an earlier run are a file's, and this goes to a terminal
    return "\n".join(map(printable, "\n".join(lines).split("\n")))


def machine_line(results: Results) -> str:
    """Format the hardware, the versions and the commit as one paragraph."""
    about = {**results.machine, **results.versions}
    parts = [f"{name} {_shown(value)}" for name, value in about.items() if value is not None]
    return f"{', '.join(parts)}; commit {results.commit or 'unknown'}"


def _shown(value: str | int | float | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _trial_note(results: Results) -> list[str]:
    if results.sizes == "real":
        return []
    return ["**A trial on tiny models: it shows that the program works, and no speed.**", ""]


def _table(results: Results) -> str:
    head = ("measurement", "of it", "value", "goal", "verdict")
    return format_table([head, *_table_rows(results)], right=(2,), markdown=True)


def _table_rows(results: Results) -> Iterator[tuple[str, ...]]:
    for name, entry in results.measurements.items():
        for row in entry.rows:
            value = "-" if row.value is None else f"{_number(row.value)} {row.unit}".strip()
            verdict = row.verdict if results.sizes == "real" else ""
            yield name, _cell(row.label), value, row.goal, verdict
        if entry.status != DONE:
            reason = f": {entry.reason}" if entry.reason else ""
            yield name, _cell(f"{entry.status}{reason}"), "", "", ""


def _cell(text: str) -> str:
    """Return text that does not end its cell, nor is markup."""
    return text.replace("|", "/").replace("<", "&lt;")


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _details(results: Results) -> Iterator[str]:
    """Yield what each measurement is, and the notes of its rows."""
    for name, entry in results.measurements.items():
        other = entry.commit and entry.commit != results.commit
        commit = f", commit {entry.commit}" if other else ""
        spent = f" ({entry.seconds:.0f} s{commit})" if entry.seconds else ""
        yield f"- **{name}**: {entry.title}{spent}"
        for row in entry.rows:
            if row.note:
                yield f"  - {_cell(row.label)}: {_cell(row.note)}"
    yield ""
