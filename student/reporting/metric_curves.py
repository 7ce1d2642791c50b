"""The curves of a run are read from metrics.jsonl in one pass, and thinned as they are read.

A run has up to millions of rows, and a screen some hundred columns of pixels. Of every 2^k steps a
curve keeps four rows: the first, the least, the greatest and the last one (M4; Jugel et al., "M4: A
Visualization-Oriented Time Series Data Aggregation", VLDB 2014), so that a line through them covers
the pixels that a line through all rows would, and a spike of one step stays. One row of those that
are not finite is kept as well. A curve of up to `POINTS` rows is kept whole.

Memory does not grow with the file: rows are held `CHUNK_BYTES` at a time. A step that was written
twice has the later row. Lines that are no rows are counted, and the first is told.

n rows of a chunk, p points of a curve.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.pictures.regular_file import open_regular
from student.reporting.metric_rows import ROW, number
from student.training.metrics import NAME, parse_row, plain_row

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Row = dict[str, Any]

POINTS = 1000  # of a curve that is kept whole
BUCKETS = 250  # of steps, with four points each, of one that is not
CHUNK_BYTES = 2 << 20
COLUMNS = 256  # of a file; a recipe with 24 levels has 60
MOST_STEPS = 10**15
SLOWEST = 1e-6  # pictures a second: a step of eleven days; below are rows that nobody measured
NO_CURVE = ("step", "epoch", "probe_s", "time")


@dataclass
class Curve:
    """Holds points of a curve in the order of their steps: values (p,) at steps (p,), NaN and
    infinities among them. `nonfinite` counts the rows that were one of these."""

    steps: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    values: F64 = field(default_factory=lambda: np.zeros(0))
    nonfinite: int = 0
    bucket: int = 1  # steps that four points stand for

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Say which points (p,) are finite."""
        return np.isfinite(self.values)

    def drop(self, steps: I64) -> None:
        """Leave out the points of steps that are written again."""
        stays = ~np.isin(self.steps, steps)
        self.nonfinite -= int((~stays & ~self.finite).sum())
        self.steps, self.values = self.steps[stays], self.values[stays]

    def add(self, steps: I64, values: F64) -> None:
        """Take rows (n,) of steps that the curve does not have, and thin it."""
        self.nonfinite += int((~np.isfinite(values)).sum())
        steps, values = np.concatenate([self.steps, steps]), np.concatenate([self.values, values])
        order = np.argsort(steps, kind="stable")
        self.steps, self.values = steps[order], values[order]
        if len(self.steps) > POINTS or self.bucket > 1:
            self._thin()

    def _thin(self) -> None:
        shift = self.bucket.bit_length() - 1
        while _distinct(self.steps >> shift) > BUCKETS:
            shift += 1
        kept = thin(self.steps, self.values, shift)
        self.steps, self.values, self.bucket = self.steps[kept], self.values[kept], 1 << shift


def _distinct(ascending: I64) -> int:
    return int((np.diff(ascending) > 0).sum()) + 1


def thin(steps: I64, values: F64, shift: int) -> I64:
    """Return the indices of the rows that stay, ascending, of rows in the order of their steps: of
    every 2^shift steps the first, least, greatest and last finite row, and the first that is not.

    >>> values = np.array([3.0, 1.0, 9.0, np.nan, 4.0, 5.0])
    >>> thin(np.arange(6), values, 3).tolist()
    [0, 1, 2, 3, 5]
    """
    bucket, finite = steps >> shift, np.isfinite(values)
    good, bad = np.flatnonzero(finite), np.flatnonzero(~finite)
    kept = [_first(bucket, good), _last(bucket, good), _first(bucket, bad)]
    ranked = good[np.lexsort((values[good], bucket[good]))]  # by bucket, then by value
    kept += [_first(bucket, ranked), _last(bucket, ranked)]
    return np.unique(np.concatenate(kept))


def _first(bucket: I64, at: I64) -> I64:
    """Return the first of each bucket, of indices that are sorted by bucket."""
    return at[np.diff(bucket[at], prepend=-1) > 0]


def _last(bucket: I64, at: I64) -> I64:
    return at[np.diff(bucket[at], append=np.iinfo(np.int64).max) > 0]


@dataclass
class Curves:
    """Holds the curves of a run by the names of their columns, and what the file holds beside
    them."""

    columns: dict[str, Curve] = field(default_factory=dict)
    lines: int = 0
    rewritten: int = 0  # rows that came after one of the same step, or of a later one
    broken: int = 0  # lines that are no rows
    first_broken: str = ""
    left_out: set[str] = field(default_factory=set)  # columns beyond COLUMNS
    last: Row | None = None  # of the highest step
    timed: int = 0  # rows that say how fast their step was
    trained_s: float = 0.0  # seconds that the steps took, for a batch of one picture
    waited_s: float = 0.0  # of these, waiting for data


def read(run: Path) -> Curves:
    """Read all rows of a run. Raises UserError where the file is none, and OSError where it cannot
    be read."""
    found = Curves()
    with _open(run) as file:
        for lines in _chunks(file):
            rows = [row for line in lines if (row := _row(found, line)) is not None]
            if rows:
                _fold(found, rows)
    return found


def _open(run: Path) -> BinaryIO:
    path = run / NAME
    if path.is_symlink():
        raise UserError(f"{str(path)!r} is a link; put the file itself there")
    return os.fdopen(open_regular(path), "rb")


def _chunks(file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield whole lines, some megabytes at a time. One that is longer than any row is cut, and so
    is none; what follows the last line end is still being written."""
    rest, skips = b"", False
    while data := file.read(CHUNK_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        if skips and lines:
            del lines[0]
            skips = False
        if len(rest) > ROW:
            lines += [] if skips else [rest[:ROW]]
            rest, skips = b"", True
        yield lines


def _row(found: Curves, line: bytes) -> Row | None:
    """Return the numbers of a line by their names; None of one that is no row, which is counted."""
    found.lines += 1
    try:
        if (row := plain_row(line)) is None:
            row = _numbers(line)
        if row["step"] > MOST_STEPS:
            raise ValueError("its step is larger than any")
    except ValueError as error:
        if not found.broken:
            found.first_broken = f"line {found.lines}: {error}"
        found.broken += 1
        return None
    return row


def _numbers(line: bytes) -> Row:
    """Return what are numbers in a row, NaN and infinities among them, which are texts there."""
    if len(line) >= ROW:
        raise ValueError(f"it has more than {ROW} bytes")
    row = parse_row(line)
    told = {name: number(value) for name, value in row.items() if name != "step"}
    return {
        "step": row["step"],
        **{name: float(value) for name, value in told.items() if value is not None},
    }


def _fold(found: Curves, rows: Sequence[Row]) -> None:
    """Add the rows of a chunk to the curves; of a step that is written again the later row
    holds."""
    _add_times(found, rows)
    unique = {row["step"]: row for row in rows}  # later ones win
    before = -1 if found.last is None else found.last["step"]
    steps = np.fromiter((row["step"] for row in rows), np.int64, len(rows))
    highest = np.maximum.accumulate(np.concatenate([[before], steps]))
    again = int((steps <= highest[:-1]).sum())
    found.rewritten += again
    if again:
        for curve in found.columns.values():
            curve.drop(steps)
    if highest[-1] in unique:
        found.last = unique[int(highest[-1])]
    for name, (at, values) in _columns(unique.values()).items():
        if name in found.columns or len(found.columns) < COLUMNS:
            found.columns.setdefault(name, Curve()).add(at, values)
        elif len(found.left_out) < COLUMNS:
            found.left_out.add(name)


def _columns(rows: Iterable[Row]) -> dict[str, tuple[I64, F64]]:
    """Return steps and values of each column; rows with the same names are taken together."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(tuple(row), []).append(row)
    pieces: dict[str, list[tuple[I64, F64]]] = {}
    for names, group in alike.items():
        values = np.array([list(row.values()) for row in group], np.float64)  # (n, names)
        steps = values[:, names.index("step")].astype(np.int64)
        for i, name in enumerate(names):
            if name not in NO_CURVE:
                pieces.setdefault(name, []).append((steps, values[:, i]))
    return {
        name: (np.concatenate([at for at, _ in each]), np.concatenate([x for _, x in each]))
        for name, each in pieces.items()
    }


def _add_times(found: Curves, rows: Sequence[Row]) -> None:
    """Add the seconds that steps took: pictures a second are all that a row tells of them."""
    speed = np.array([row.get("images_per_s", 0) for row in rows], np.float64)
    wait = np.array([row.get("data_wait", 0) for row in rows], np.float64)
    good = np.isfinite(speed) & (speed > SLOWEST)
    seconds = 1 / speed[good]
    found.timed += len(seconds)
    found.trained_s += float(seconds.sum())
    found.waited_s += float((np.clip(np.nan_to_num(wait[good]), 0, 1) * seconds).sum())
