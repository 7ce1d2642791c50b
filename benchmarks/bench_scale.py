"""Measure opening, `featcache info` and epochs of reading on a cache with as many rows as
ImageNet-1k, of tiny width.

    python -m benchmarks.bench_scale
    python -m benchmarks.bench_scale --rows 100000 --epochs 2 --json scale.json

Rows are zeros behind true checksums; every shard has the arrays, files and record that an
extraction writes. Opening is measured in new processes. Of memory the anonymous part is given: the
page cache belongs to the machine.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np

import featcache
from benchmarks import command_options, describe, environment, markdown_table, save_json
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup

FIELDS = ("features", "attention", "crop", "flip", "jitter")
BATCH = 1024


@dataclass(frozen=True)
class KeysOnly:
    """Names pictures that no benchmark decodes: a source that has keys alone."""

    count: int
    spec: str = "names"
    labels: None = None
    classes: None = None

    def __len__(self) -> int:
        return self.count

    @cached_property
    def keys(self) -> Sequence[str]:
        return [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}" for i in range(self.count)]

    def read(self, index: int) -> bytes:
        raise AssertionError(f"picture {index} is asked for; this benchmark decodes none")


def write_cache(path: Path, rows: int, view_count: int) -> None:
    """Write the cache; files are not synced, which is not measured here."""
    from featcache import teachers
    from featcache.extraction.plan import Plan
    from featcache.extraction.target_folder import prepare_folder
    from featcache.storage import checksums
    from featcache.storage.statistics import FeatureStatistics, Statistics
    from featcache.storage.store import get_store

    # here, so that the process that reads has no torch in its memory
    from featcache.views.policy import Policy

    teacher = teachers.load("synthetic:levels=5,tokens=4,width=4", None, "cpu")
    plan = Plan(
        source=KeysOnly(rows),
        teacher=teacher,
        policy=Policy(),
        views=view_count,
        levels=(1, 2, 3, 4, 5),
    )
    about = prepare_folder(plan, path, 1)
    items: dict[str, Any] = {
        a.name: np.zeros((plan.rows_per_shard * view_count, *a.item), a.dtype) for a in plan.arrays
    }
    items["crop"][..., 2:] = items["source_size"][:] = 1
    items["mask_order"][:] = range(items["mask_order"].shape[1])
    items |= checksums.compute_checksums(plan.arrays, items)
    known = Statistics()
    known.add(items, FeatureStatistics(0.0, 0.0, np.zeros((len(items["features"]), 5), np.float32)))
    sync, os.fsync = os.fsync, lambda fd: None
    try:
        for shard in about["shards"]:
            count = shard["count"] * view_count
            keys = [plan.source.keys[shard["first"] + i // view_count] for i in range(count)]
            writer = get_store(plan.store).writer(
                path, shard["name"], plan.arrays, view_count, plan.form
            )
            writer.append(keys, {name: values[:count] for name, values in items.items()})
            writer.finish([], known.summary())
    finally:
        os.fsync = sync


def median_seconds(code: Sequence[str], repeats: int) -> float:
    """Run a command several times; return the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(code, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return stats.median(seconds)


def open_s(path: Path, repeats: int) -> float:
    """Return the median seconds of `featcache.open` alone, each in a process of its own."""
    code = (
        "import featcache, time; t = time.perf_counter(); "
        f"featcache.open({str(path)!r}); print(time.perf_counter() - t)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        for _ in range(repeats)
    ]
    return stats.median(float(run.stdout) for run in runs)


def anonymous_bytes() -> int:
    """Return the bytes of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous"))


def measure_epochs(path: Path, count: int, batches: int) -> list[dict[str, float]]:
    """Read `batches` random batches of random views an epoch; return memory, Python objects and
    milliseconds after each."""
    cache = featcache.open(path)
    keys = cache.keys
    random, facts, every = np.random.default_rng(0), [], np.arange(len(cache))
    for _ in range(count):
        start = time.perf_counter()
        # in place: a new 10 MB array now and then would be this program's growth
        random.shuffle(every)
        order = every[: batches * BATCH]
        for rows in np.split(order, range(BATCH, len(order), BATCH)):
            cache.read(rows, random.integers(0, cache.views, len(rows)), FIELDS)
            keys[int(rows[0])]
        spent = time.perf_counter() - start
        gc.collect()
        facts.append(
            {
                "anonymous": anonymous_bytes(),
                "objects": len(gc.get_objects()),
                "ms": spent / -(-len(order) // BATCH) * 1e3,
            }
        )
    return facts


@click.command(cls=Command)
@command_options.number("--rows", HelpGroup.INPUT, 1_281_167, "Pictures of the cache.")
@command_options.number("--views", HelpGroup.INPUT, 4, "Views a picture.", param="view_count")
@command_options.number(
    "--epochs", HelpGroup.RUNNING, 5, "Epochs of random batches.", param="epoch_count"
)
@command_options.number("--batches", HelpGroup.RUNNING, 100, "Batches of 1,024 rows an epoch.")
@command_options.folder
@command_options.json_file
def cli(
    rows: int,
    view_count: int,
    epoch_count: int,
    batches: int,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Open, info and epochs of random batches over a cache of many rows."""
    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        path = root / "cache"
        write_cache(path, rows, view_count)
        results: dict[str, Any] = {
            "rows": rows,
            "views": view_count,
            "environment": environment(root),
        }
        results["files"] = sum(len(names) for _, _, names in os.walk(path))
        results["open_s"] = open_s(path, 5)
        results["info_s"] = median_seconds(
            [sys.executable, "-m", "featcache", "info", str(path)], 5
        )
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results["epochs"] = pool.apply(measure_epochs, (path, epoch_count, batches))
    finally:
        shutil.rmtree(root)
    after = [epoch["anonymous"] for epoch in results["epochs"]]
    results["growth"] = max(after) / after[0] - 1
    click.echo(describe(results["environment"]))
    click.echo(f"{rows} rows x {view_count} views in {results['files']} files")
    click.echo(
        f"open {results['open_s']:.2f} s, `featcache info` {results['info_s']:.2f} s (process "
        "start and all)"
    )
    lines = [
        (str(i), f"{epoch['anonymous'] / 1e6:.1f}", str(epoch["objects"]), f"{epoch['ms']:.0f}")
        for i, epoch in enumerate(results["epochs"], 1)
    ]
    click.echo(
        markdown_table(("epoch", "anonymous MB", "Python objects", "ms a batch of 1,024"), lines)
    )
    click.echo(f"growth after the first epoch: {results['growth']:.1%}")
    save_json(json_path, results)


if __name__ == "__main__":
    entry(cli)
