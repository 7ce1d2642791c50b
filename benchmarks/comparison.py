"""Readers are compared on the same records: their output is checked before anything is timed, they
take turns, and medians are given.

Readers give (row numbers, their values) batch by batch. Kinds:

    rows     in the random order that is asked for
    block    some consecutive rows at a time, blocks in random order
    stream   in the order of the files, the only one a tar has

The first batch of a turn is not timed: files are opened and workers start once, an epoch is long. A
turn ends with its rows or its time, whichever comes first; rates are compared, and ratios of rates
within one repetition.

L levels, T tokens, D width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError

F16 = npt.NDArray[np.float16]
I64 = npt.NDArray[np.int64]
Batches = Iterator[tuple[npt.ArrayLike, npt.NDArray[Any]]]
# rows a batch of libraries that fill memory of their own, and of a block where a format has such
FEW = 32


@dataclass(frozen=True)
class Task:
    """The records that every reader reads: `rows` of (L, T, D) fp16, so many at a time, by so many
    threads."""

    rows: int
    item: tuple[int, int, int]
    threads: int
    batch: int = 256
    block: int = 64

    @property
    def row_bytes(self) -> int:
        return 2 * self.item[0] * self.item[1] * self.item[2]

    @property
    def file_rows(self) -> int:
        """Return the rows of one tar, safetensors file or Zarr shard: several files, each large."""
        return max(min(256, self.rows // 4), 1)

    def batches(self, order: I64, size: int | None = None) -> Iterator[list[int]]:
        step = min(size or self.batch, self.batch)
        return (order[low : low + step].tolist() for low in range(0, len(order), step))

    def blocks(self, order: I64, size: int | None = None) -> Iterator[tuple[int, int]]:
        """Return (first, end) of every block, in the order in which their first rows come."""
        step = min(size or self.block, max(self.rows // 4, 1))
        return (
            (first, min(first + step, self.rows)) for first in order[order % step == 0].tolist()
        )

    def memory(self, rows: int | None = None) -> F16:
        """Return a buffer for so many rows, or a batch, already touched."""
        return np.ones((rows or self.batch, *self.item), np.float16)


@dataclass(frozen=True)
class Reader:
    """One way to read the records: batches of (row numbers, values) for an order of rows."""

    name: str
    kind: str
    read: Callable[[I64], Batches]
    levels: int | None = None  # reads only the first so many
    tokens: int | None = None
    # the format's files, read without its library: as fast as anything that copies bytes
    by_hand: bool = False


def read_each_row(
    task: Task, one: Callable[[int, F16], None], pool: ThreadPoolExecutor | None = None
) -> Callable[[I64], Batches]:
    """Return a function that reads random rows into a batch's buffer, `one` row a call, by the
    caller or by a pool's threads."""

    def read(order: I64) -> Batches:
        out = task.memory()
        for rows in task.batches(order):
            for _ in (pool.map if pool else map)(one, rows, out[: len(rows)]):
                pass
            yield rows, out[: len(rows)]

    return read


def check_reader(reader: Reader, order: I64, source: F16, batches: int = 2) -> None:
    """Raise UserError unless the first batches are what was written."""
    seen = 0
    for rows, values in reader.read(order):
        numbers = np.atleast_1d(np.asarray(rows, np.int64))
        wanted = source[numbers, : reader.levels, : reader.tokens]
        if values.dtype != wanted.dtype or not np.array_equal(values.reshape(wanted.shape), wanted):
            raise UserError(
                f"{reader.name}: row {numbers[0]} and those after it are not what was written"
            )
        seen += 1
        if seen == batches:
            return
    if not seen:
        raise UserError(f"{reader.name}: gave no rows at all")


@dataclass
class Timing:
    """Rows and bytes that one turn read, and its seconds."""

    rows: int
    bytes: int
    seconds: float


def time_reader(reader: Reader, order: I64, limit_s: float) -> Timing:
    """Time one turn of one reader."""
    timing, batches = Timing(0, 0, 0.0), reader.read(order)
    next(batches)
    start = time.perf_counter()
    for rows, values in batches:
        timing.rows += np.size(rows)
        timing.bytes += values.nbytes
        if time.perf_counter() - start > limit_s:
            break
    timing.seconds = max(time.perf_counter() - start, 1e-9)
    if not timing.rows:
        raise UserError(f"{reader.name}: one batch holds all rows; more --rows are needed")
    return timing


@dataclass
class Comparison:
    """Readers that take turns, and their timings in every repetition."""

    readers: Sequence[Reader]
    timings: dict[str, list[Timing]] = field(default_factory=dict)

    def run(
        self, order: I64, reps: int, limit_s: float, log: Callable[[str], None] = lambda line: None
    ) -> None:
        """Time all readers; another one begins each repetition, so that none always follows the
        same one."""
        for rep in range(reps):
            first = rep * len(self.readers) // max(reps, 1)
            for reader in [*self.readers[first:], *self.readers[:first]]:
                self.timings.setdefault(reader.name, []).append(time_reader(reader, order, limit_s))
            log(f"repetition {rep + 1} of {reps}")

    def gb_s(self, name: str) -> float:
        return (
            statistics.median(timing.bytes / timing.seconds for timing in self.timings[name]) / 1e9
        )

    def ratios(self, name: str, versus: str) -> list[float]:
        """Return bytes a second over another's, for each repetition."""
        pairs = zip(self.timings[name], self.timings[versus], strict=True)
        return [(a.bytes / a.seconds) / (b.bytes / b.seconds) for a, b in pairs]

    def ratio(self, name: str, versus: str) -> float:
        return statistics.median(self.ratios(name, versus))

    def time_ratio(self, name: str, versus: str) -> float:
        """Return seconds a row over another's, the median over repetitions."""
        pairs = zip(self.timings[name], self.timings[versus], strict=True)
        return statistics.median((a.seconds / a.rows) / (b.seconds / b.rows) for a, b in pairs)

    def facts(self, name: str, versus: str) -> dict[str, Any]:
        """Return one reader's rates and ratios for the JSON."""
        ratios = self.ratios(name, versus)
        return {
            "name": name,
            "kind": next(reader.kind for reader in self.readers if reader.name == name),
            "gb_s": self.gb_s(name),
            "versus": versus,
            "versus_gb_s": self.gb_s(versus),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
