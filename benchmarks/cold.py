"""Reading from the disk: before every pass a cache's files leave the page cache, and that they did
is looked at.

Ours against the plainest way to read the same bytes: whole files from end to end in pieces of 8
MiB, and the same rows in the same order. Both with as many threads, each into memory of its own
that it uses again. What lies below (a disk's, a host's own cache) cannot be emptied from here;
passes take turns, so that it helps all alike.
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
from benchmarks.contest import I64, Task
from featcache.errors import UserError
from featcache.storage.store import get_store

PIECE_BYTES = 8 << 20
_ALIGN = 4096
_GONE = 0.01  # a share that may stay: what the kernel is using just then


class Range(NamedTuple):
    path: str
    offset: int
    length: int


def rows_of(cache: featcache.Cache, path: Path, order: I64) -> list[Range]:
    """Where the features of rows lie."""
    spec, module = cache.arrays["features"], get_store(cache.identity["store"])
    starts = np.cumsum([0, *(record["rows"] for record in cache.records)])
    out = []
    for row in order.tolist():
        shard = int(np.searchsorted(starts, row, side="right") - 1)
        place = np.array([row - starts[shard]])
        file, offsets = module.locate(
            path, cache.records[shard]["shard"], spec, cache.views, 0, place
        )
        out.append(Range(str(file), int(offsets[0]), spec.item_bytes))
    return out


def ends_of(rows: Sequence[Range]) -> list[Range]:
    """The same files from end to end."""
    return [
        Range(path, offset, min(PIECE_BYTES, size - offset))
        for path in sorted({row.path for row in rows})
        for size in [Path(path).stat().st_size]
        for offset in range(0, size, PIECE_BYTES)
    ]


def read_raw(ranges: Sequence[Range], threads: int, *, direct: bool, shared: bool) -> int:
    """Bytes read. Threads take the next range each (`shared`), or a part of the list each, which
    suits read-ahead."""
    if shared:
        left = deque(ranges)
        lists: list[deque[Range]] = [left] * threads
    else:
        cuts = np.linspace(0, len(ranges), threads + 1).astype(int).tolist()
        lists = [deque(ranges[low:high]) for low, high in itertools.pairwise(cuts)]
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda each: _read_all(each, direct), lists))


def _read_all(ranges: deque[Range], direct: bool) -> int:
    """Ranges from the left until none is left, into one piece of memory; the bytes that were asked
    for."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    handles: dict[str, int] = {}
    memory, total = mmap.mmap(-1, PIECE_BYTES), 0
    try:
        while True:
            try:
                path, offset, count = ranges.popleft()
            except IndexError:
                return total
            if path not in handles:
                handles[path] = os.open(path, flags)
            low = offset // _ALIGN * _ALIGN if direct else offset
            span = -(-(offset + count - low) // _ALIGN) * _ALIGN if direct else count
            if span > len(memory):
                memory = mmap.mmap(-1, span)
            _read_range(handles[path], memoryview(memory)[:span], low, offset + count - low)
            total += count
    finally:
        for handle in handles.values():
            os.close(handle)


def _read_range(handle: int, memory: memoryview, offset: int, needed: int) -> None:
    got = 0
    while got < needed:
        more = os.preadv(handle, [memory[got:]], offset + got)
        if not more:
            raise UserError(
                "a file ended early while it was measured; is another program writing it?"
            )
        got += more


# ------------------------------------------------------------ passes


@dataclass
class Cold:
    """Rates of each pass in every repetition, and what stood in the way."""

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


def measure(path: Path, task: Task, order: I64, reps: int, say: Callable[[str], None]) -> Cold:
    """Every pass once a repetition, each after the pages have left."""
    cold = Cold()
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
                say(f"cold, {io}: repetition {rep + 1} of {reps}")
    return cold


def _passes(
    cache: featcache.Cache, path: Path, task: Task, order: I64, io: str
) -> dict[str, Callable[[], int]]:
    rows = rows_of(cache, path, order)
    whole, direct = ends_of(rows), io == "direct"
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
