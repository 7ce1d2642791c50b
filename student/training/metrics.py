"""metrics.jsonl gets one JSON object a step; values may still be on their way from the device when
a row is added."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.runtime import strict_json
from featcache.storage import json_file

NAME = "metrics.jsonl"
# columns that a clock gives; all others are the same whenever and wherever a run is made. `time` is
# in seconds since 1970, UTC: pandas.to_datetime(rows.time, unit="s")
CLOCKS = ("images_per_s", "data_wait", "time")
_NUMBERS = {int, float}
_HUGE = 1e18  # rows of larger numbers are looked at one by one


class Metrics:
    """Appends rows; what has an `item` (tensors, shares of a step) is turned into a number `lag`
    steps later, so that a device is not waited for.

    Without a run nothing is written. `log` is given every row as it is written.
    """

    def __init__(
        self, run: Path | None, lag: int = 0, log: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.file = (run / NAME).open("a", buffering=1) if run is not None else None
        self.lag = lag
        self.log = log
        self.waiting: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Add a row; return the rows that have become numbers by now, oldest first."""
        self.waiting.append(row)
        return self.flush(self.lag)

    def flush_with(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Add a row; return all rows, this one as well, waiting for the device where it must."""
        self.waiting.append(row)
        return self.flush()

    def flush(self, keep: int = 0) -> list[dict[str, Any]]:
        done = self.waiting[: len(self.waiting) - keep]
        self.waiting = self.waiting[len(done) :]
        rows = [
            {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
            for row in done
        ]
        if self.file is not None:
            for row in rows:
                plain = {key: _plain(value) for key, value in row.items()}
                self.file.write(json.dumps(plain) + "\n")
                if self.log is not None:
                    self.log(plain)
        return rows

    def close(self) -> None:
        self.flush()
        if self.file is not None:
            self.file.close()


def _plain(value: Any) -> Any:
    """Return NaN and infinities, which JSON does not have, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def cut(run: Path, step: int) -> None:
    """Drop rows beyond `step`, written between the last checkpoint and the end of a process, and
    what a process left that was killed in the middle of this."""
    json_file.sweep(run)
    path = run / NAME
    if not path.is_file():
        return
    rows = [(line, row) for line, row in _rows(path) if row["step"] <= step]
    json_file.write_file(path, "".join(f"{line}\n" for line, _ in rows).encode())


def read(run: Path) -> list[dict[str, Any]]:
    """Return all whole rows of a run; the last may still be being written."""
    path = run / NAME
    return [row for _, row in _rows(path)] if path.is_file() else []


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the text and the values of each row. What follows the last line end is the row that a
    process was writing; any other line that is no row is a UserError, which names it."""
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = parse_row(line)
        except ValueError as error:
            raise UserError(
                f"{str(path)!r}, line {number}: no row of a run's metrics ({error}); remove this "
                "line"
            ) from error
        yield line.decode(), row


def parse_row(line: bytes) -> dict[str, Any]:
    """Parse the line of a row; ValueError where it is none, with a reason in one line."""
    if (plain := plain_row(line)) is not None:
        return plain
    row = strict_json.parse_object(line)
    if not _is_row(row):
        raise ValueError("it lacks a step, or holds more than numbers and texts")
    return row


def plain_row(line: bytes) -> dict[str, Any] | None:
    """Parse a row of finite numbers alone, as nearly all are, in a third of the time; None where
    the line holds anything else, which is for `strict_json` to judge."""
    try:
        row = json.loads(line.decode())
        if type(row) is not dict or line.count(b'":') != len(row) or b"\\" in line:
            return None  # perhaps a name given twice
        values = row.values()
        if not set(map(type, values)) <= _NUMBERS:
            return None
        if not sum(map(abs, values)) < _HUGE:  # NaN is not
            return None
    except (ValueError, OverflowError, RecursionError):
        return None
    return row if type(row.get("step")) is int and row["step"] >= 0 else None


def _is_row(row: dict[str, Any]) -> bool:
    step, computed = row.get("step"), row.get("fallback", 0)
    return (
        type(step) is int
        and step >= 0
        and type(computed) in (int, float)
        and isinstance(row.get("loss", 0), int | float | str)
        and all(value is None or isinstance(value, int | float | str) for value in row.values())
    )
