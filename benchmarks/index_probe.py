"""One thing is asked of a cache in a process of its own, and its seconds and memory are printed.

    python -m benchmarks.index_probe CACHE open|info|ls|find|read|order

Of memory the anonymous part is given (RssAnon): the page cache belongs to the machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import featcache
from benchmarks.many_rows import key, row_numbers

FOUND = 1024  # keys that are sought
BATCH = 256
BATCHES = 100  # of an epoch
SAMPLE_S = 0.01


def anonymous_bytes() -> int:
    """Return the bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Sample anonymous memory while a block runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    @property
    def facts(self) -> dict[str, float]:
        return {"s": self.seconds, "bytes": self.bytes}


def probe_open(path: Path) -> dict[str, Any]:
    with Peak() as peak:
        cache = featcache.open(path)
    return {**peak.facts, "indexed": cache._parts[0].index is not None}


def _command(*words: str) -> dict[str, Any]:
    from featcache.cli import cli

    with Peak() as peak, contextlib.redirect_stdout(io.StringIO()):
        cli(list(words), standalone_mode=False)
    return peak.facts


def probe_info(path: Path) -> dict[str, Any]:
    return _command("info", str(path))


def probe_ls(path: Path) -> dict[str, Any]:
    """List the caches beside this one, where it is alone: FEATCACHE_HOME is the folder above."""
    return _command("ls")


def probe_find(path: Path) -> dict[str, Any]:
    with featcache.open(path) as cache:
        rows = np.random.default_rng(0).integers(0, len(cache), FOUND)
        keys = [key(row) for row in rows.tolist()]
        with Peak() as peak:
            found = cache.keys.find(keys)
    assert (found == rows).all()
    return peak.facts


def _batches(rows: int, epoch: int) -> Iterator[Any]:
    random = np.random.default_rng(epoch)
    return (random.integers(0, rows, BATCH) for _ in range(BATCHES))


def probe_read(path: Path) -> dict[str, Any]:
    """Read random batches: memory after each of three times as many."""
    with featcache.open(path) as cache:
        after, ms = [], []
        for epoch in range(3):
            start = time.perf_counter()
            for rows in _batches(len(cache), epoch):
                got = cache.read(rows)["features"]
                assert (row_numbers(got) == rows).all()
            ms.append((time.perf_counter() - start) / BATCHES * 1e3)
            after.append(anonymous_bytes())
    return {"ms": ms, "after": after}


def probe_order(path: Path) -> dict[str, Any]:
    """Draw the order of an epoch, as training does."""
    from student.data.sampler import SampleOrder

    with featcache.open(path) as cache:
        order = SampleOrder(len(cache), 0)
    after = []
    with Peak() as peak:
        for epoch in range(3):
            order.step(epoch, 0, BATCH)
            after.append(anonymous_bytes())
    return {"s": peak.seconds / 3, "bytes": peak.bytes, "after": after}


PROBES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "open": probe_open,
    "info": probe_info,
    "ls": probe_ls,
    "find": probe_find,
    "read": probe_read,
    "order": probe_order,
}


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[2]](Path(sys.argv[1]))))
