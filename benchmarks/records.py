"""Records are made and written as a cache; it is read by featcache, by plain preads, and copied by
memcpy.

L levels, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import featcache
from benchmarks.comparison import F16, I64, Batches, Comparison, Reader, Task, check_reader
from featcache.storage import checksums, json_file, manifest
from featcache.storage.store import SHARDS, Array, get_store
from featcache.views import pixel_path
from featcache.views.policy import Policy

SHARD_ROWS = 1024


# ------------------------------------------------------------ the records


def make_source(task: Task, seed: int = 0) -> F16:
    """Draw numbers like normalised features: fp16 of unit variance, which no disk or kernel can
    compress."""
    random, source = np.random.default_rng(seed), np.empty((task.rows, *task.item), np.float16)
    for low in range(0, task.rows, 16):
        part = source[low : low + 16]
        part[:] = random.standard_normal(part.shape, np.float32)
    return source


def write_cache(
    path: Path, source: F16, name: str, *, ranked: bool, shard_rows: int = SHARD_ROWS
) -> Path:
    """Write a cache with these features by the store's own writer; checksums as extraction stores
    them."""
    rows, levels, tokens, width = source.shape
    row_view = ("row", "view")
    arrays = [
        Array(
            "features",
            "<f2",
            (levels, tokens, width),
            (*row_view, "level", "token", "channel"),
            split=True,
        ),
        Array("attention", "<f4", (tokens - 1,), (*row_view, "patch")),
        Array("mask_order", "<u2", (tokens - 1,), (*row_view, "rank")),
    ]
    arrays += checksums.checksum_arrays(arrays, levels, tokens, ranked=ranked)
    keys = [f"{row:09d}" for row in range(rows)]
    (path / SHARDS).mkdir(parents=True)
    shards = [
        {"name": f"{i:06d}", "first": first, "count": min(shard_rows, rows - first)}
        for i, first in enumerate(range(0, rows, shard_rows))
    ]
    identity = {
        "teacher": {"name": "benchmark", "patches": tokens - 1, "width": width, "depth": levels},
        "levels": list(range(1, levels + 1)),
        "eps": 1e-5,
        "order": "attentive",
        "codec": "fp16",
        "tokens": "ranked" if ranked else "raster",
        "policy": Policy().as_dict(),
        "pixel_path": pixel_path.PIXEL_PATH,
        "views": 1,
        "pictures": {"count": rows, "keys_digest": manifest.keys_digest(keys)},
        "rows_per_shard": shard_rows,
        "store": name,
    }
    provenance, declared = (
        {"weights": "registered", "source": ""},
        {array.name: array.as_dict() for array in arrays},
    )
    about = manifest.make(identity, provenance, declared, shards, {})
    json_file.write_json(path / manifest.NAME, about)
    form = manifest.shard_form(about)
    for shard in shards:
        first = shard["first"]
        writer = get_store(name).writer(path, shard["name"], arrays, 1, form)
        for low in range(first, first + shard["count"], 32):
            high = min(low + 32, first + shard["count"])
            items: dict[str, Any] = {
                "features": source[low:high],
                "attention": np.full((high - low, tokens - 1), 1 / tokens, np.float32),
                "mask_order": np.tile(np.arange(tokens - 1, dtype=np.uint16), (high - low, 1)),
            }
            writer.append(keys[low:high], {**items, **checksums.compute_checksums(arrays, items)})
        writer.finish([], {})
    return path


# ------------------------------------------------------------ ours and memcpy


class ReadCase(NamedTuple):
    """One measured case: the part of each row, its order, threads and checks."""

    kind: str = "rows"
    threads: int = 1
    levels: int | None = None
    tokens: int | None = None
    checks: bool | None = None  # None: memcpy
    kept: bool = False  # the tokens are all that is stored (--keep)
    bare: bool = False  # the system calls alone
    fresh: bool = False  # without `out=`
    archive: bool = False  # of compressed rows

    @property
    def name(self) -> str:
        who = "preads" if self.bare else "memcpy" if self.checks is None else "ours"
        part = [f"{self.levels} level{'s' * (self.levels != 1)}"] * bool(self.levels)
        part += [f"{self.tokens} {'kept ' * self.kept}tokens"] * bool(self.tokens)
        part += ["without out="] * self.fresh + ["of an archive"] * self.archive
        checks = [] if self.checks is None else ["checks" if self.checks else "no checks"]
        return ", ".join(
            [who, self.kind, *part, *checks, f"{self.threads} thread{'s' * (self.threads > 1)}"]
        )

    @property
    def memcpy(self) -> ReadCase:
        return self._replace(checks=None, kept=False, bare=False, fresh=False, archive=False)


class CacheReaders:
    """Makes the readers of caches: they share the records in memory and a destination for each
    shape."""

    def __init__(self, task: Task, source: F16, order: I64) -> None:
        self.task, self.source, self.order = task, source, order
        self._memory: dict[tuple[int, ...], F16] = {}

    def requests(self, kind: str) -> Iterator[I64]:
        if kind == "rows":
            return (np.asarray(rows) for rows in self.task.batches(self.order))
        return (np.arange(low, high) for low, high in self.task.blocks(self.order))

    def memory(self, case: ReadCase) -> F16:
        levels, tokens, width = self.task.item
        count = self.task.batch if case.kind == "rows" else self.task.block
        shape = (count, case.levels or levels, case.tokens or tokens, width)
        if shape not in self._memory:
            self._memory[shape] = np.ones(shape, np.float16)
        return self._memory[shape]

    def ours(self, cache: featcache.Cache, case: ReadCase) -> Reader:
        out, levels = (
            self.memory(case),
            None if case.levels is None else cache.levels[: case.levels],
        )
        tokens = None if case.kept else case.tokens

        def read(order: I64) -> Batches:
            for rows in self.requests(case.kind):
                given = None if case.fresh else {"features": out[: len(rows)]}
                got = cache.read(
                    rows, levels=levels, tokens=tokens, out=given, check=bool(case.checks)
                )
                yield rows, got["features"]

        return Reader(case.name, case.kind, read, case.levels, case.tokens)

    def preads(self, cache: featcache.Cache, case: ReadCase) -> Reader:
        """Read these ranges by system calls alone: a pread for each level of each row, or for each
        row where all its tokens are wanted, by threads that take a part of the rows each time one
        is free."""
        (part,) = cache._parts
        spec, out = part.arrays["features"], self.memory(case)
        levels, width = out.shape[1], 2 * out.shape[2] * out.shape[3]
        stored, row = spec.item_bytes // levels, levels * width
        ranges = (
            [(0, 0, row)]
            if stored == width
            else [(i * stored, i * width, width) for i in range(levels)]
        )
        memory, pool = out.reshape(-1).view(np.uint8).data, ThreadPoolExecutor(case.threads)

        def work(jobs: Sequence[tuple[int, int, int]]) -> None:
            for fd, offset, destination in jobs:
                for source, target, count in ranges:
                    at = destination * row + target
                    os.preadv(fd, (memory[at : at + count],), offset + source)

        def read(order: I64) -> Batches:
            with contextlib.ExitStack() as stack:
                shards = range(-(-self.task.rows // SHARD_ROWS))
                paths = [part.locate(i, spec, 0, np.array([i * SHARD_ROWS]))[0] for i in shards]
                fds = [os.open(path, os.O_RDONLY) for path in paths]
                for fd in fds:
                    stack.callback(os.close, fd)
                for numbers in self.requests(case.kind):
                    at = np.argsort(numbers)
                    offsets = (numbers[at] % SHARD_ROWS * spec.item_bytes).tolist()
                    files = [fds[i] for i in (numbers[at] // SHARD_ROWS).tolist()]
                    jobs = list(zip(files, offsets, at.tolist(), strict=True))
                    step = len(jobs) if case.threads == 1 else -(-len(jobs) // (4 * case.threads))
                    parts = [jobs[low : low + step] for low in range(0, len(jobs), step)]
                    if case.threads == 1:
                        work(jobs)
                    else:
                        list(pool.map(work, parts))
                    yield numbers, out[: len(numbers)]

        return Reader(case.name, case.kind, read, case.levels, case.tokens)

    def memcpy(self, case: ReadCase) -> Reader:
        """Copy the same rows in memory, by threads that take a part of the rows each time one is
        free, as ours do."""
        out, source = self.memory(case), self.source[:, : case.levels, : case.tokens]
        pool = ThreadPoolExecutor(case.threads)

        def copy(destinations: Sequence[int], rows: Sequence[int]) -> None:
            for destination, row in zip(destinations, rows, strict=True):
                np.copyto(out[destination], source[row])

        def read(order: I64) -> Batches:
            for numbers in self.requests(case.kind):
                rows, step = numbers.tolist(), -(-len(numbers) // (4 * case.threads))
                if case.threads == 1:
                    copy(range(len(rows)), rows)
                else:
                    cuts = range(0, len(rows), step)
                    parts = [range(low, min(low + step, len(rows))) for low in cuts]
                    list(pool.map(copy, parts, [rows[low : low + step] for low in cuts]))
                yield numbers, out[: len(rows)]

        return Reader(case.name, case.kind, read, case.levels, case.tokens)

    def compare(
        self,
        cases: Sequence[ReadCase],
        caches: Callable[[ReadCase], featcache.Cache],
        others: Sequence[Reader],
    ) -> Comparison:
        """Return a comparison of cases, the memcpy that belongs to each, and other readers; the
        numbers of all of them are checked here."""
        readers = [self.memcpy(case) for case in dict.fromkeys(case.memcpy for case in cases)]
        readers += [(self.preads if case.bare else self.ours)(caches(case), case) for case in cases]
        comparison = Comparison([*readers, *others])
        for reader in comparison.readers:
            check_reader(reader, self.order, self.source)
        return comparison
