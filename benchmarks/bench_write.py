"""Measure how fast an extraction writes, beside the bare disk and beside a sink that takes
everything at once; and its memory.

    python -m benchmarks.bench_write                       1,024 pictures x 4 views: 6.2 GB, one
                                                           shard
    python -m benchmarks.bench_write --teacher clip-b16 --weights random:0 --rows 64
    python -m benchmarks.bench_write --rows 32 --views 2   a trial of the program, not a measurement

In turns, each its files removed afterwards:

    raw disk        as many bytes by plain writes of 8 MiB and one fsync
    writer alone    the store's writer, given ready batches
    null sink       the extraction with a store that discards what it is given: decoding, teacher,
                    encoding
    store           the extraction

Of the extraction it prints the slowest stage, resident memory at the start and after each
quarter, its peak, and the most that was dirty in the page cache: a store that streams needs no more
for a shard of 6 GB than for 60 MB. On few cores even the synthetic teacher is slower than a disk;
`--ready` removes that limit.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import command_options, describe, environment, markdown_table, null_store, save_json
from benchmarks.memory_monitor import MemoryMonitor
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.errors import UserError
from featcache.extraction.extract import run
from featcache.extraction.forward import compute_targets
from featcache.extraction.options import parse_levels
from featcache.extraction.plan import Plan
from featcache.extraction.progress import ExtractProgress
from featcache.models.contract import Teacher
from featcache.pictures.open_source import open_source
from featcache.storage.store import SHARDS, STORES, get_store
from featcache.teachers import load
from featcache.views.policy import load_policy

PIECE_BYTES = 8 << 20
PICTURE_PX = 256


class MemoizedTeacher:
    """Answers every batch as the teacher answered the first of that size, at no cost."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._answers: dict[int, tuple[list[Tensor], Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def __call__(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        if len(images) not in self._answers:
            self._answers[len(images)] = self._teacher(images, levels)
        return self._answers[len(images)]


# ------------------------------------------------------------ the four variants


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Write JPEGs that cost a decoder what photographs do: slopes, edges, and noise."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:PICTURE_PX, :PICTURE_PX].astype(np.float32) / PICTURE_PX
    for i in range(count):
        a, b, c = random.uniform(0.5, 6, (3, 3, 1, 1)).astype(np.float32)
        picture = (
            128
            + 60 * np.sin(a * x + b * y)
            + 40 * np.sign(np.sin(c * (x - y)))
            + random.normal(0, 8, (3, *x.shape))
        )
        pixels = np.clip(picture, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i:06d}.jpg", quality=90)
    return folder


def write_raw(path: Path, count: int) -> int:
    """Write `count` bytes, and return when they are on the disk."""
    piece = np.random.default_rng(0).integers(0, 256, PIECE_BYTES, np.uint8).data
    fd, left = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), count
    try:
        while left:
            left -= os.write(fd, piece[: min(left, PIECE_BYTES)])
        os.fsync(fd)
    finally:
        os.close(fd)
    return count


def write_alone(path: Path, plan: Plan, batch_size: int) -> int:
    """Write one batch again and again by the store's writer."""
    random, arrays = np.random.default_rng(0), plan.arrays
    batch = {array.name: np.zeros((batch_size, *array.item), array.dtype) for array in arrays}
    batch["features"][:] = random.standard_normal(batch["features"].shape, np.float32)
    (path / SHARDS).mkdir(parents=True)
    for shard in plan.shards:
        sink = get_store(plan.store).writer(path, shard["name"], arrays, plan.views, plan.form)
        names = [
            plan.source.keys[shard["first"] + i]
            for i in range(shard["count"])
            for _ in range(plan.views)
        ]
        for low in range(0, len(names), batch_size):
            part = names[low : low + batch_size]
            sink.append(part, {name: values[: len(part)] for name, values in batch.items()})
        sink.finish([], {})
    return _bytes(path)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def extract(
    path: Path, plan: Plan, batch_size: int, workers: int, monitor: MemoryMonitor
) -> dict[str, Any]:
    progress = ExtractProgress(report=monitor.report)
    run(plan, path, batch_size=batch_size, workers=workers, progress=progress)
    return {"slowest": progress.slowest, "busy": dict(progress.busy)}


def measure(
    work: Callable[[MemoryMonitor], dict[str, Any]], rows: int, bytes_: int
) -> dict[str, Any]:
    """Run one variant; return its rates and memory."""
    with MemoryMonitor() as monitor:
        facts = work(monitor)
    return {
        **facts,
        "seconds": monitor.seconds,
        "pictures_s": rows / monitor.seconds,
        "mb_s": bytes_ / monitor.seconds / 1e6,
        "start_bytes": monitor.start_bytes,
        "peak_bytes": monitor.peak_bytes,
        "dirty_bytes": monitor.dirty_bytes,
        "resident_bytes": monitor.quarters,
    }


def warm_up(plan: Plan, batch_size: int) -> None:
    """Run one batch, so that costs of the first one are not measured."""
    size = plan.teacher.input_px
    compute_targets(
        plan.teacher,
        torch.zeros((batch_size, 3, size, size), dtype=torch.uint8),
        plan.levels,
        plan.codec,
        1,
        plan.state,
    )


def repetition(
    folder: Path, plan: Plan, batch_size: int, workers: int, first: int
) -> dict[str, dict[str, Any]]:
    """Run the four in turn, another one first each time; rates are of the bytes that the store
    writes, for all."""
    out, rows = folder / "out", len(plan.source)
    total = plan.view_bytes * plan.views * rows
    nothing = replace(plan, store=null_store.NAME)

    def alone(monitor: MemoryMonitor) -> dict[str, Any]:
        write_alone(out, plan, batch_size)
        return {}

    def raw(monitor: MemoryMonitor) -> dict[str, Any]:
        write_raw(out, total)
        return {}

    runs: dict[str, Callable[[MemoryMonitor], dict[str, Any]]] = {
        "raw disk": raw,
        "writer alone": alone,
        "null sink": lambda monitor: extract(out, nothing, batch_size, workers, monitor),
        "store": lambda monitor: extract(out, plan, batch_size, workers, monitor),
    }
    results = {}
    for i in range(len(runs)):
        name = list(runs)[(first + i) % len(runs)]
        results[name] = measure(runs[name], rows, total)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        click.echo(f"  {name}: {results[name]['seconds']:.1f} s", err=True)
    return {name: results[name] for name in runs}


# ------------------------------------------------------------ the program


def medians(reps: Sequence[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Return the medians of ratios within each repetition."""

    def ratio(name: str, versus: str) -> float:
        return statistics.median(rep[name]["mb_s"] / rep[versus]["mb_s"] for rep in reps)

    return {
        "writer alone / raw disk": ratio("writer alone", "raw disk"),
        "store / null sink": ratio("store", "null sink"),
        "store / raw disk": ratio("store", "raw disk"),
    }


def rates_table(reps: Sequence[dict[str, dict[str, Any]]]) -> str:
    rows = []
    for name in reps[0]:
        mine = [rep[name] for rep in reps]
        busy = mine[0].get("busy", {})
        rate, speed = (
            statistics.median(each[key] for each in mine) for key in ("pictures_s", "mb_s")
        )
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in busy.items()) or "-"
        rows.append((name, f"{rate:.1f}", f"{speed:.0f}", mine[0].get("slowest", "-"), stages))
    return markdown_table(["", "pictures/s", "MB/s", "slowest", "busy seconds"], rows)


def memory_table(reps: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Format the last repetition: the start of the first one includes what is loaded once."""
    rows = []
    for name, mine in reps[-1].items():
        quarters = [
            f"{mine['resident_bytes'][q] / 1e6:.0f}" if q in mine["resident_bytes"] else "-"
            for q in (25, 50, 75, 100)
        ]
        sizes = [f"{mine[key] / 1e6:.0f}" for key in ("start_bytes", "peak_bytes", "dirty_bytes")]
        rows.append((name, sizes[0], *quarters, sizes[1], sizes[2]))
    return markdown_table(
        ["MB resident", "start", "25 %", "50 %", "75 %", "100 %", "peak", "most dirty"], rows
    )


@click.command(cls=Command, context_settings={"max_content_width": 110})
@command_options.text("--teacher", default="synthetic:levels=5,tokens=196,width=768")
@option(
    "--weights",
    group=HelpGroup.INPUT,
    help="As for `featcache extract`.",
)
@option(
    "--ready",
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="Answer every batch with the teacher's first answer: no wait for it.",
)
@command_options.levels
@command_options.number("--rows", HelpGroup.INPUT, 1024, "Pictures; one shard.")
@command_options.number("--views", HelpGroup.INPUT, 4, "Views a picture.")
@command_options.store
@command_options.batch_size(32)
@command_options.workers
@command_options.reps(1)
@command_options.folder
@command_options.json_file
def cli(
    teacher: str,
    weights: str | None,
    ready: bool,
    levels: str,
    rows: int,
    views: int,
    store_name: str,
    batch_size: int,
    workers: int,
    reps: int,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Measure how fast an extraction writes, and what memory it needs."""
    STORES[null_store.NAME] = null_store.__name__
    with tempfile.TemporaryDirectory(prefix="featcache-bench-", dir=folder) as temporary:
        root = Path(temporary)
        model: Any = MemoizedTeacher(load(teacher, weights)) if ready else load(teacher, weights)
        pictures = open_source(write_pictures(root / "pictures", rows))
        plan = Plan(
            source=pictures,
            teacher=model,
            policy=load_policy(size=model.input_px),
            views=views,
            levels=parse_levels(levels, model.depth),
            store=store_name,
            rows_per_shard=rows,
        )
        total = plan.view_bytes * views * rows
        free = shutil.disk_usage(root).free
        if 1.1 * total > free:
            raise UserError(
                f"--folder {str(root)!r}: {1.1 * total / 1e9:.1f} GB are needed, {free / 1e9:.1f} "
                "GB are free; fewer --rows or --views"
            )
        about = environment(root)
        who = f"{teacher}{', ready' * ready}"
        click.echo(
            f"{describe(about)}\n{rows} pictures x {views} views, {who}: {total / 1e9:.2f} GB in "
            "one shard"
        )
        warm_up(plan, batch_size)
        done = [repetition(root, plan, batch_size, workers, first) for first in range(reps)]
    ratios = medians(done)
    options = {
        "teacher": teacher,
        "rows": rows,
        "views": views,
        "batch_size": batch_size,
        "workers": workers,
    }
    options |= {"ready": ready, "store": store_name}
    save_json(
        json_path,
        {**about, "options": options, "bytes": total, "ratios": ratios, "repetitions": done},
    )
    click.echo(f"\n{rates_table(done)}\n\n{memory_table(done)}\n")
    for text, value in ratios.items():
        click.echo(f"{text} = {value:.2f}")
    last = done[-1]["store"]
    click.echo(
        f"memory above the start = {(last['peak_bytes'] - last['start_bytes']) / 1e6:.0f} MB"
    )
    click.echo(f"most dirty bytes = {last['dirty_bytes'] / 1e6:.0f} MB of {total / 1e6:.0f} MB")


if __name__ == "__main__":
    entry(cli)
