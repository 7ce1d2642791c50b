"""Reads are measured from the disk: before every pass a cache's files leave the page cache, and it
is checked that they did.

Ours is compared with the plainest way to read the same bytes: whole files from end to end in pieces
of 8 MiB, and the same rows in the same order. Both have as many threads, each with a buffer that it
uses again. Caches below (of a disk, of a host) cannot be emptied from here; passes take turns, so
that they help all alike.
"""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import featcache
from benchmarks import drop
from benchmarks.comparison import I64, Task
from featcache.errors import UserError
from featcache.storage.store import get_store

PIECE_BYTES = 8 << 20
_ALIGN = 4096
_GONE = 0.01  # a share that may stay: what the kernel is using just then


class Range(NamedTuple):
    path: str
    offset: int
    length: int


def row_ranges(cache: featcache.Cache, path: Path, order: I64) -> list[Range]:
    """Return the byte ranges of rows' features, in the order of the rows."""
    spec, module = cache.arrays["features"], get_store(cache.identity["store"])
    starts = np.cumsum([0, *(record["rows"] for record in cache.records)])
    out = []
    for row in order.tolist():
        shard = int(np.searchsorted(starts, row, side="right") - 1)
        position = np.array([row - starts[shard]])
        file, offsets = module.locate(
            path, cache.records[shard]["shard"], spec, cache.views, 0, position
        )
        out.append(Range(str(file), int(offsets[0]), spec.item_bytes))
    return out


def file_ranges(rows: Sequence[Range]) -> list[Range]:
    """Return the ranges of the same files from end to end."""
    return [
        Range(path, offset, min(PIECE_BYTES, size - offset))
        for path in sorted({row.path for row in rows})
        for size in [Path(path).stat().st_size]
        for offset in range(0, size, PIECE_BYTES)
    ]


def read_raw(ranges: Sequence[Range], threads: int, *, direct: bool, shared: bool) -> int:
    """Read ranges by threads; return the bytes. Each thread takes the next range (`shared`), or has
    a part of the list, which suits read-ahead."""
    if shared:
        left = deque(ranges)
        lists: list[deque[Range]] = [left] * threads
    else:
        cuts = np.linspace(0, len(ranges), threads + 1).astype(int).tolist()
        lists = [deque(ranges[low:high]) for low, high in itertools.pairwise(cuts)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda each: _read_all(each, direct), lists))


def _read_all(ranges: deque[Range], direct: bool) -> int:
    """Read ranges from the left until none is left, into one buffer; return the bytes that were
    asked for."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    fds: dict[str, int] = {}
    memory, total = mmap.mmap(-1, PIECE_BYTES), 0
    try:
        while True:
            try:
                path, offset, count = ranges.popleft()
            except IndexError:
                return total
            if path not in fds:
                fds[path] = os.open(path, flags)
            low = offset // _ALIGN * _ALIGN if direct else offset
            span = -(-(offset + count - low) // _ALIGN) * _ALIGN if direct else count
            if span > len(memory):
                memory = mmap.mmap(-1, span)
            _read_range(fds[path], memoryview(memory)[:span], low, offset + count - low)
            total += count
    finally:
        for fd in fds.values():
            os.close(fd)


def _read_range(fd: int, memory: memoryview, offset: int, needed: int) -> None:
    got = 0
    while got < needed:
        more = os.preadv(fd, [memory[got:]], offset + got)
        if not more:
            raise UserError(
                "a file ended early while it was measured; is another program writing it?"
            )
        got += more


# ------------------------------------------------------------ passes


@dataclass
class ColdRates:
    """Rates of each pass in every repetition, and why passes were skipped, where they were."""

    gb_s: dict[str, list[float]] = field(default_factory=dict)
    stayed: float = 0.0
    skipped: str = ""

    def ratio(self, name: str, versus: str) -> float:
        return statistics.median(
            a / b for a, b in zip(self.gb_s[name], self.gb_s[versus], strict=True)
        )

    def median(self, name: str) -> float:
        return statistics.median(self.gb_s[name])


# what is compared with what: (ours, plain)
PAIRS = tuple(
    (f"ours, {order}, {io}, {checks}", f"plain, {plain}, {io}")
    for io in ("buffered", "direct")
    for order, plain in (("blocks", "end to end"), ("rows", "the same rows"))
    for checks in ("no checks", "checks")
)


def measure(path: Path, task: Task, order: I64, reps: int, log: Callable[[str], None]) -> ColdRates:
    """Run every pass once a repetition, each after the pages have left the page cache."""
    cold = ColdRates()
    for io in ("buffered", "direct"):
        with featcache.open(path, threads=task.threads, io=io) as cache:
            passes = _passes(cache, path, task, order, io)
            for rep in range(reps):
                names = list(passes)
                first = rep * len(names) // reps
                for name in [*names[first:], *names[:first]]:
                    cold.stayed = max(cold.stayed, drop(path))
                    if cold.stayed > _GONE:
                        cold.skipped = (
                            f"{100 * cold.stayed:.0f} % of the pages did not leave the page cache"
                        )
                        return cold
                    start = time.perf_counter()
                    try:
                        count = passes[name]()
                    except (OSError, UserError) as error:
                        if io == "buffered":
                            raise
                        cold.skipped = f"direct: {error}"
                        cold.gb_s = {
                            key: value for key, value in cold.gb_s.items() if "direct" not in key
                        }
                        return cold
                    cold.gb_s.setdefault(name, []).append(
                        count / 1e9 / max(time.perf_counter() - start, 1e-9)
                    )
                log(f"cold, {io}: repetition {rep + 1} of {reps}")
    return cold


def _passes(
    cache: featcache.Cache, path: Path, task: Task, order: I64, io: str
) -> dict[str, Callable[[], int]]:
    rows = row_ranges(cache, path, order)
    whole, direct = file_ranges(rows), io == "direct"
    out = task.memory(max(task.batch, task.block))

    def blocks(check: bool) -> int:
        for low, high in task.blocks(order):
            cache.read(np.arange(low, high), out={"features": out[: high - low]}, check=check)
        return task.rows * task.row_bytes

    def batches(check: bool) -> int:
        for each in task.batches(order):
            cache.read(each, out={"features": out[: len(each)]}, check=check)
        return task.rows * task.row_bytes

    return {
        f"plain, end to end, {io}": lambda: read_raw(
            whole, task.threads, direct=direct, shared=False
        ),
        f"ours, blocks, {io}, no checks": lambda: blocks(False),
        f"ours, blocks, {io}, checks": lambda: blocks(True),
        f"plain, the same rows, {io}": lambda: read_raw(
            rows, task.threads, direct=direct, shared=True
        ),
        f"ours, rows, {io}, no checks": lambda: batches(False),
        f"ours, rows, {io}, checks": lambda: batches(True),
    }
