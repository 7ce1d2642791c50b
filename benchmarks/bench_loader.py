"""Measure how many pictures with their targets a loader delivers a second: ours in all variants,
others', and plain preads.

    python -m benchmarks.bench_loader
        512 pictures, five levels: some minutes
    python -m benchmarks.bench_loader --rows 64 --reps 1 --seconds 0.5
        a trial of the program, not a measurement

Pictures are photographs of about ImageNet's size, crops 224 pixels, targets 5 x 197 x 768 fp16, in
the page cache. In turns, another one first each time; every ratio is of one repetition, and medians
are printed. A turn begins after its first batches. The last lines say which claims hold; the exit
status does not depend on them.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import featcache
from benchmarks import (
    command_options,
    describe,
    environment,
    loading,
    markdown_table,
    save_json,
    sync,
    warm,
)
from featcache import rng, teachers
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.extraction.extract import run
from featcache.extraction.plan import Plan
from featcache.models import precision
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.reading import join
from featcache.reading.cache import Cache
from featcache.views.pixel_path import open_with_decoder
from featcache.views.policy import AREA, Policy
from student.data.loader import AHEAD, Loader
from student.recipes import TargetSpec
from student.targets import in_memory
from student.targets.cached import CachedTargets

SIZE, VIEWS = 224, 2
PREADS = "plain preads of the same bytes"
STORED, CHECKED, TARS = "ours, stored pixels, rows not checked", "ours, stored pixels", "ours, tars"
WEBDATASET = "webdataset, Pillow and npy"

MakeBatches = Callable[[], Iterator[int]]


# ------------------------------------------------------------ what is measured


def prepare(folder: Path, rows: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Write pictures, tars of them, a cache with stored pixels, and the same targets as others
    store them."""
    from featcache.maintenance import pack_tars

    pictures = loading.write_pictures(folder / "pictures", rows)
    packed = pack_tars.pack(open_source(pictures), folder / "packed", 256, seed=0)
    source = open_source(str(packed[0].parent / "*.tar"))
    extract(source, folder / "cache", shape, "bicubic")
    with featcache.open(folder / "cache") as cache:
        features = cache.read(np.arange(rows), 0)["features"]
    tars = loading.write_tars(folder / "others", pictures, features)
    (folder / "arrays").mkdir()
    for row, each in enumerate(features):
        np.save(folder / "arrays" / f"{row:06d}.npy", each)
    betons = make_betons(folder, source, shape) if importlib.util.find_spec("ffcv") else {}
    for part in folder.iterdir():
        sync(part)
        warm(part)
    here = {"cache": folder / "cache", "pictures": pictures, "arrays": folder / "arrays"}
    return {"source": source, "tars": tars, "betons": betons, **here}


def extract(source: Source, out: Path, shape: tuple[int, int, int], filter: str) -> None:
    """Extract a cache with stored pixels, of the synthetic teacher."""
    levels, tokens, width = shape
    teacher = teachers.load(
        f"synthetic:levels={levels},tokens={tokens - 1},width={width},size={SIZE}", None, "cpu"
    )
    policy, chosen = Policy(size=SIZE, filter=filter), tuple(range(1, levels + 1))
    run(
        Plan(
            source=source,
            teacher=teacher,
            policy=policy,
            views=VIEWS,
            levels=chosen,
            rows_per_shard=1024,
            pixels=True,
        ),
        out,
    )


def make_betons(
    folder: Path, source: Source, shape: tuple[int, int, int]
) -> dict[str, tuple[Source, Path]]:
    """Pack the same JPEGs into one .beton; return it through our decoder and through FFCV's, which
    has a cache of its own."""
    from featcache.maintenance import pack_beton

    path = folder / "all.beton"
    pack_beton.pack(source, path, seed=0)
    compiled = open_with_decoder(path, "ffcv")
    extract(compiled, folder / "compiled", shape, AREA)
    return {
        "ours, beton": (open_source(path), folder / "cache"),
        "ours, beton by FFCV's decode": (compiled, folder / "compiled"),
    }


def ours(
    cache: Cache, source: Source, batch: int, workers: int, *, stored: bool = False, **options: Any
) -> Loader:
    """Build the trainer's loader over all levels, as `student train` does for a recipe that reads
    attention."""
    spec = TargetSpec(
        teacher="", levels=cache.levels, fields=("features", "attention"), patches=196
    )
    pictures, rows, _ = join.join_by_key(cache, source)
    targets = CachedTargets(cache, spec, rows, stored_pixels=stored)
    digests = rng.key_digests(source.keys[i] for i in pictures)
    return Loader(
        source=source,
        targets=targets,
        pictures=pictures,
        digests=digests,
        seed=0,
        batch_size=batch,
        workers=workers,
        **options,
    )


def batch_sizes(loader: Loader) -> Iterator[int]:
    """Yield the sizes of batches, without end."""
    with closing(loader.iterate(0, 1 << 40)) as batches:
        for host in batches:
            yield len(host["keys"])


def loaders(made: dict[str, Any], batch: int, workers: int) -> dict[str, MakeBatches]:
    """Return a function for each loader that starts it, by name."""
    checked = featcache.open(made["cache"], threads=workers)
    plain = featcache.open(made["cache"], threads=workers, verify_rows=0)
    tars, stored = made["source"], join.StoredPixels
    held = ours(checked, stored(checked), batch, workers, stored=True)
    _reset()
    in_memory.load(held.targets, Accelerator(cpu=True))  # type: ignore[arg-type]
    fields = ("features", "attention", "pixels")
    folder = (made["tars"], SIZE, batch)
    files = (made["pictures"], made["arrays"], SIZE, batch)
    return {
        PREADS: lambda: loading.pread_batches(plain, fields, batch, workers),
        STORED: lambda: batch_sizes(
            ours(plain, stored(plain), batch, workers, stored=True, check_fraction=0)
        ),
        CHECKED: lambda: batch_sizes(ours(checked, stored(checked), batch, workers, stored=True)),
        "ours, resident": lambda: batch_sizes(replace(held)),
        TARS: lambda: batch_sizes(ours(checked, tars, batch, workers)),
        **{name: _beton_loader(*each, batch, workers) for name, each in made["betons"].items()},
        f"{TARS}, {VIEWS} views of a picture": lambda: batch_sizes(
            ours(checked, tars, batch, workers, repeats=VIEWS)
        ),
        WEBDATASET: lambda: loading.webdataset_batches(*folder, 0),
        f"{WEBDATASET}, {workers} workers": lambda: loading.webdataset_batches(*folder, workers),
        f"torch DataLoader over files, {workers} workers": lambda: loading.torchvision_batches(
            *files, workers
        ),
    }


def _beton_loader(source: Source, path: Path, batch: int, workers: int) -> MakeBatches:
    cache = featcache.open(path, threads=workers)
    return lambda: batch_sizes(ours(cache, source, batch, workers))


def _reset() -> None:
    """Accelerate refuses a second start with other settings in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def samples_per_second(make: MakeBatches, seconds: float) -> float:
    """Return samples a second, after the first batches: those open files, start workers and touch
    memory."""
    with closing(make()) as batches:  # type: ignore[type-var]
        for _ in range(AHEAD + 1):
            next(batches)
        start, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds or not count:
            count += next(batches)
        return count / spent


def measure(
    variants: dict[str, MakeBatches], reps: int, seconds: float, log: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return samples a second of every loader in every repetition."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for rep in range(reps):
        names = [*variants]
        first = rep * len(names) // reps
        for name in [*names[first:], *names[:first]]:
            rates[name].append(samples_per_second(variants[name], seconds))
        log(f"repetition {rep + 1} of {reps}")
    return rates


def ratio(rates: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[over], rates[under], strict=True))


def data_waits(cache: Path, steps: int, batch: int, folder: Path) -> list[float]:
    """Return `data_wait` of each step of a run with the smallest encoder and stored pixels, the
    first left out."""
    from student import cli as student_cli

    _reset()
    sets = ("encoder=tiny", "level_weights=mean", "drop_path=0", "warmup_epochs=0")
    args = [
        "train",
        "--recipe",
        "maskalign",
        "--cache",
        str(cache),
        "--out",
        str(folder),
        "--steps",
        str(steps),
    ]
    args += ["--batch-size", str(batch), *[part for text in sets for part in ("--set", text)]]
    student_cli.cli.main(args, standalone_mode=False)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["data_wait"] for row in rows[1:]]


# ------------------------------------------------------------ the program


def rates_table(rates: dict[str, list[float]], sample_bytes: int) -> str:
    rows = []
    for name, found in rates.items():
        median = statistics.median(found)
        times = ratio(rates, TARS, name)
        rows.append(
            (
                name,
                f"{median:.0f}",
                f"{median * sample_bytes / 1e9:.2f}",
                f"{ratio(rates, name, PREADS):.3f}",
                f"{times:.2f}",
            )
        )
    return markdown_table(["", "samples/s", "GB/s", "/ preads", f"{TARS} / it"], rows)


@click.command(cls=Command, context_settings={"max_content_width": 110})
@command_options.number("--rows", HelpGroup.INPUT, 512, "Pictures that are made.", least=8)
@option(
    "--shape",
    group=HelpGroup.STORAGE,
    default="5x197x768",
    show_default=True,
    help="Levels, tokens ([CLS] and 196) and width.",
)
@command_options.batch_size(64)
@command_options.number("--workers", HelpGroup.RUNNING, 2, "Threads of ours; others' workers.")
@command_options.number(
    "--steps", HelpGroup.RUNNING, 12, "Of the run that tells data_wait.", least=0
)
@command_options.reps(5)
@option(
    "--seconds",
    group=HelpGroup.RUNNING,
    type=click.FloatRange(0.1),
    default=4.0,
    show_default=True,
    help="Of a turn.",
)
@command_options.folder
@command_options.json_file
def cli(
    rows: int,
    shape: str,
    batch_size: int,
    workers: int,
    steps: int,
    reps: int,
    seconds: float,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Measure loaders of pictures and targets."""
    precision.keep_freed_memory()
    levels, tokens, width = (int(part) for part in shape.split("x"))
    with tempfile.TemporaryDirectory(prefix="featcache-bench-", dir=folder) as temporary:
        root = Path(temporary)
        about = environment(root)
        click.echo(describe(about))
        made = prepare(root, rows, (levels, tokens, width))
        rates = measure(
            loaders(made, batch_size, workers),
            reps,
            seconds,
            lambda line: click.echo(f"  {line}", err=True),
        )
        found = data_waits(made["cache"], steps, batch_size, root / "run") if steps > 1 else []
    sample = 2 * levels * tokens * width + 4 * (tokens - 1) + 3 * SIZE**2
    click.echo(
        f"\n{rows} pictures, {sample / 1e6:.2f} MB a sample, batch {batch_size}, {workers} threads "
        "or workers"
    )
    click.echo(f"\n{rates_table(rates, sample)}\n")
    lines = [
        (f"{STORED} / preads", ratio(rates, STORED, PREADS), 0.7),
        (f"{CHECKED} / preads", ratio(rates, CHECKED, PREADS), 0.7),
        (f"{TARS} / {WEBDATASET}", ratio(rates, TARS, WEBDATASET), 3.0),
    ]
    for text, value, aim in lines:
        click.echo(f"{text} = {value:.2f}, aim {aim:g}  {'ok' if value >= aim else 'MISSED'}")
    if found:
        wait = statistics.median(found)
        verdict = "ok" if wait < 0.05 else "MISSED"
        text = (
            f"data_wait, encoder tiny on {'cuda' if torch.cuda.is_available() else 'cpu'}, "
            "stored pixels"
        )
        click.echo(f"{text} = {wait:.4f} (at most {max(found):.4f}), aim below 0.05  {verdict}")
    options = {
        "rows": rows,
        "shape": shape,
        "batch_size": batch_size,
        "workers": workers,
        "seconds": seconds,
    }
    save_json(json_path, {**about, "options": options, "rates": rates, "data_wait": found})


if __name__ == "__main__":
    entry(cli)
