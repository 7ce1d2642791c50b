"""Single rows of metrics.jsonl are found without reading the file: a run has up to millions.

Rows stand in the order of their steps, each once, since a resumed run cuts what lies beyond its
checkpoint. So the last one is in the file's tail, and any other is found by bisection over bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from featcache.errors import UserError
from featcache.pictures.regular_file import open_regular
from student.training.metrics import NAME, parse_row

TAIL = 1 << 16  # bytes that are looked at first
ROW = 1 << 20  # no row of ours has so many bytes
Row = dict[str, Any]


def last_row(run: Path) -> Row | None:
    """Return the last whole row of a run; None where it made no step."""
    with _open(run) as file:
        end = _end(run, file)
        if not end:
            return None
        # the newline before the last one; a file of one row has none
        first = _tail(file, end).rpartition(b"\n")[2]
        return _parse(run, first)


def rows_at(run: Path, steps: Iterable[int]) -> list[Row | None]:
    """Return the rows of `steps`; None in the place of one that is not there."""
    with _open(run) as file:
        end = _end(run, file)
        return [_bisect(run, file, end, step) for step in steps]


def number(value: object) -> float | str | None:
    """Return a value of a row as a number, or as the text of one that JSON does not have.

    >>> number(1.5), number("nan"), number("a stranger's"), number(None)
    (1.5, 'nan', None, None)
    """
    if isinstance(value, str):
        return value if value in ("nan", "inf", "-inf") else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def _open(run: Path) -> BinaryIO:
    path = run / NAME
    if path.is_symlink():
        raise UserError(f"{str(path)!r} is a link; put the file itself there")
    return os.fdopen(open_regular(path), "rb")


def _end(run: Path, file: BinaryIO) -> int:
    """Return where the last whole row ends, its newline included; 0 where there is none. What
    follows is being written."""
    size = os.fstat(file.fileno()).st_size
    for reach in (TAIL, ROW):
        start = max(size - reach, 0)
        data = os.pread(file.fileno(), size - start, start)
        if (found := data.rfind(b"\n")) >= 0:
            return start + found + 1
    if size > ROW:
        path = str(run / NAME)
        raise UserError(f"{path!r} ends with no row of metrics; remove what follows the last one")
    return 0


def _tail(file: BinaryIO, end: int) -> bytes:
    """Return the bytes before the last newline: a whole row and what comes before it."""
    for reach in (TAIL, ROW):
        start = max(end - 1 - reach, 0)
        data = os.pread(file.fileno(), end - 1 - start, start)
        if b"\n" in data or not start:
            break
    return data


def _bisect(run: Path, file: BinaryIO, end: int, step: int) -> Row | None:
    low, high = 0, end  # where the row begins, if it is there: low is the begin of a row
    while low < high:
        start = _row_from(file, low, (low + high) // 2)
        if start >= high:
            high = (low + high) // 2
            continue
        file.seek(start)
        line = file.readline(ROW)
        row = _parse(run, line.rstrip(b"\n"))
        if row["step"] == step:
            return row
        low, high = (start + len(line), high) if row["step"] < step else (low, start)
    return None


def _row_from(file: BinaryIO, low: int, place: int) -> int:
    """Return where the first row begins that does not begin before `place`."""
    if place == low:
        return low
    file.seek(place - 1)
    return place - 1 + len(file.readline(ROW))


def _parse(run: Path, line: bytes) -> Row:
    try:
        return parse_row(line)
    except ValueError as error:
        raise UserError(f"{str(run / NAME)!r} holds what is no row of metrics: {error}") from error
