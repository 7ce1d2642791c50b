"""Measure how fast a cache is read, beside memcpy, other formats and the bare disk.

    python -m benchmarks.bench_read                             all of it: 2,048 rows, a quarter of
                                                                an hour
    python -m benchmarks.bench_read --peers npy,h5py --no-cold  a part
    python -m benchmarks.bench_read --rows 128 --reps 1         a trial of the program, not a
                                                                measurement

Records are 5 x 197 x 768 fp16. Every number is a ratio of rates within one repetition, its median
over repetitions: to memcpy of the same rows, in the same order, by as many threads, into the same
memory. Each format's files are written, read into the page cache, measured in turns with memcpy and
us, and removed. Two formats are read by hand as well, without their libraries: by bare system calls
or a memory map, in threads, which is the limit of all that copies bytes. The last lines say which
claims hold; the exit status does not depend on them.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

import featcache
from benchmarks import cold as colds
from benchmarks import (
    command_options,
    describe,
    environment,
    peers,
    resident_share,
    save_json,
    sync,
    warm,
)
from benchmarks.comparison import Task
from benchmarks.read_report import (
    PeerResult,
    Results,
    claim_ours,
    cold_table,
    fastest,
    ours_table,
    peers_table,
)
from benchmarks.records import CacheReaders, ReadCase, make_source, write_cache
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.errors import UsageError, UserError
from featcache.maintenance import transfer

NO_YES = (False, True)
TOKENS, VISIBLE = 197, 59  # [CLS] and all patches; [CLS] and those a student with 30 % sees


# ------------------------------------------------------------ what is measured


def measure_ours(
    cache_readers: CacheReaders, folder: Path, options: Options, results: Results
) -> None:
    """Measure rows and blocks by every number of threads, parts of a row by the default number."""
    levels, tokens, _ = cache_readers.task.item
    default, visible = cache_readers.task.threads, max(tokens * VISIBLE // TOKENS, 2)
    cases = [
        ReadCase(kind, n, checks=c)
        for n in options.threads
        for kind in ("rows", "block")
        for c in (False, True)
    ]
    cases += [
        ReadCase("rows", default, levels=k, checks=c)
        for k in (1, 3)
        if k < levels
        for c in (False, True)
    ]
    cases += [
        ReadCase("rows", n, tokens=visible, kept=k, checks=c)
        for n in {1, default}
        for k in NO_YES
        for c in NO_YES
    ]
    cases += [
        ReadCase("rows", n, tokens=t, kept=k, bare=True)
        for n in {1, default}
        for t, k in ((None, False), (visible, False), (visible, True))
    ]
    cases += [ReadCase("rows", n, checks=c, fresh=True) for n in {1, default} for c in NO_YES]
    archives = options.store == "zarr"
    cases += [ReadCase("rows", n, checks=True, archive=True) for n in {1, default} if archives]
    raster, archive, ranked = (
        folder / "raster",
        folder / "archive",
        write_cache(folder / "ranked", cache_readers.source, options.store, ranked=True),
    )
    if archives:
        transfer.copy(raster, archive, compress=True)
    kept = write_cache(
        folder / "kept", cache_readers.source[:, :, :visible], options.store, ranked=True
    )
    paths = (raster, ranked, kept, *([archive] if archives else []))
    opened = {
        (path, n): featcache.open(path, threads=n, io="buffered")
        for path in paths
        for n in options.threads
    }
    sync(folder)
    resident = [warm(path) for path in paths]

    def cache_of(case: ReadCase) -> featcache.Cache:
        path = kept if case.kept else ranked if case.tokens else raster
        return opened[archive if case.archive else path, case.threads]

    comparison = cache_readers.compare(cases, cache_of, [])
    comparison.run(cache_readers.order, options.reps, options.seconds, options.log)
    for case in cases:
        results.add(
            "ours",
            comparison,
            case.name,
            case.memcpy.name,
            threads=case.threads,
            checks=case.checks,
        )
    results.note_pages("ours", *resident, *(resident_share(path) for path in paths))
    for cache in opened.values():
        cache.close()
    for path in paths[1:]:
        shutil.rmtree(path)
    claim_ours(comparison, default, levels, visible, results)


def measure_layout(
    cache_readers: CacheReaders,
    layout: peers.Layout,
    folder: Path,
    options: Options,
    results: Results,
) -> list[PeerResult]:
    """Write one format, read it into the page cache, measure it in turns with memcpy and ours,
    remove it; return a result for each reader."""
    files = folder / "peer"
    files.mkdir()
    layout.write(files, cache_readers.source, cache_readers.task)
    sync(files)
    resident = [warm(files), warm(folder / "raster")]
    found = {
        peer: make(files, cache_readers.task)
        for peer, make in layout.readers.items()
        if peer in options.peers
    }
    cases = [
        ReadCase(kind, cache_readers.task.threads, checks=c)
        for kind in ("rows", "block")
        for c in (False, True)
    ]
    with featcache.open(
        folder / "raster", threads=cache_readers.task.threads, io="buffered"
    ) as cache:
        others = [reader for readers in found.values() for reader in readers]
        comparison = cache_readers.compare(cases, lambda case: cache, others)
        comparison.run(cache_readers.order, options.reps, options.seconds, options.log)
    results.note_pages(
        layout.name, *resident, resident_share(files), resident_share(folder / "raster")
    )
    peer_results = []
    for peer, readers in found.items():
        for reader in readers:
            mine = ReadCase(
                "block" if reader.kind == "block" else "rows",
                cache_readers.task.threads,
                checks=False,
            )
            checked = mine._replace(checks=True)
            ours = [comparison.ratio(case.name, reader.name) for case in (mine, checked)]
            rate = comparison.gb_s(reader.name)
            best = PeerResult(
                peer, layout.name, reader.name, reader.kind, reader.by_hand, rate, 0.0, *ours
            )
            peer_results.append(
                best._replace(memcpy=comparison.ratio(reader.name, mine.memcpy.name))
            )
            results.add(
                layout.name, comparison, reader.name, mine.memcpy.name, peer=peer, ours=ours
            )
    shutil.rmtree(files)
    return peer_results


def measure_peers(
    cache_readers: CacheReaders, folder: Path, options: Options, results: Results
) -> list[PeerResult]:
    peer_results: list[PeerResult] = []
    for layout in peers.LAYOUTS:
        if set(layout.readers) & set(options.peers):
            options.log(layout.name)
            peer_results += measure_layout(cache_readers, layout, folder, options, results)
            gc.collect()  # files that are still open or mapped would keep their pages
    loaders = [best for best in peer_results if "DataLoader" in best.name]
    if loaders:
        top = min(loaders, key=lambda best: best.ours_checked)
        for words, best in (("as documented", loaders[0]), ("at its best", top)):
            loader = f"a webdataset DataLoader {words} ({best.name})"
            for checks, ratio in (("no checks", best.ours), ("row checks", best.ours_checked)):
                results.claim(f"random rows, {checks} / {loader}", ratio, 10)
            results.claim(f"memcpy / {loader}", 1 / best.memcpy)
    for best in fastest(peer_results):
        how = "without its library" if best.by_hand else "at its best"
        results.claim(
            f"ours / {best.peer}, {best.kind}, {how} ({best.name}; {best.layout})", best.ours, 1.0
        )
    return peer_results


def measure_cold(
    cache_readers: CacheReaders, folder: Path, options: Options, results: Results
) -> colds.ColdRates:
    sync(folder / "raster")
    cold = colds.measure(
        folder / "raster",
        cache_readers.task,
        cache_readers.order,
        min(options.reps, 3),
        options.log,
    )
    results.facts["cold"] = {"gb_s": cold.gb_s, "stayed": cold.stayed, "skipped": cold.skipped}
    for ours, plain in colds.PAIRS:
        if ours in cold.gb_s and plain in cold.gb_s:
            results.claim(f"cold: {ours} / {plain}", cold.ratio(ours, plain), 0.9)
    return cold


# ------------------------------------------------------------ the program


@dataclass(frozen=True)
class Options:
    """The options of the command that all measurements share."""

    reps: int
    seconds: float
    threads: tuple[int, ...]
    peers: tuple[str, ...]
    store: str

    def log(self, line: str) -> None:
        click.echo(f"  {line}", err=True)


def parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if (
        len(parts) != 3
        or not all(part.isdecimal() and int(part) for part in parts)
        or int(parts[1]) < 2
    ):
        raise UsageError(
            f"--shape {text!r}: LEVELSxTOKENSxWIDTH is needed, such as 5x197x768, tokens from 2"
        )
    levels, tokens, width = map(int, parts)
    return levels, tokens, width


def _check_space(folder: Path, task: Task) -> None:
    """Raise UserError unless two caches, or one and a peer's files, fit on the disk. The page cache
    should hold them beside the records themselves."""
    needed, free = 2.6 * task.rows * task.row_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--folder {str(folder)!r}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are "
            "free; fewer --rows"
        )


@click.command(cls=Command, context_settings={"max_content_width": 110})
@command_options.number("--rows", HelpGroup.INPUT, 2048, "Records; 1.5 MB each.", least=8)
@command_options.reps(5)
@option(
    "--seconds",
    group=HelpGroup.RUNNING,
    type=float,
    default=2.0,
    show_default=True,
    help="Longest turn of one reader.",
)
@command_options.folder
@option(
    "--peers",
    "peers_text",
    group=HelpGroup.INPUT,
    default="all",
    show_default=True,
    help=f"{','.join(peers.PEERS)}, or none.",
)
@option(
    "--cold/--no-cold",
    group=HelpGroup.RUNNING,
    default=True,
    show_default=True,
    help="Measure reads from the disk.",
)
@command_options.store
@option(
    "--threads",
    group=HelpGroup.RUNNING,
    default="1,2,3,4",
    show_default=True,
    help="Numbers of reading threads to try.",
)
@option(
    "--shape",
    group=HelpGroup.STORAGE,
    default="5x197x768",
    show_default=True,
    help="Levels x tokens x width of a record.",
)
@command_options.json_file
def cli(
    rows: int,
    reps: int,
    seconds: float,
    folder: Path | None,
    peers_text: str,
    cold: bool,
    store_name: str,
    threads: str,
    shape: str,
    json_path: Path | None,
) -> None:
    """Measure how fast a cache is read, beside memcpy, other formats and the bare disk."""
    default = min(4, len(os.sched_getaffinity(0)))  # as featcache.open chooses
    tried = tuple(sorted({1, *map(int, threads.split(",")), default}))
    task = Task(rows, parse_shape(shape), default, min(256, rows // 4), min(64, rows // 4))
    options = Options(reps, seconds, tried, peers.parse_peers(peers_text), store_name)
    with tempfile.TemporaryDirectory(prefix="featcache-bench-", dir=folder) as temporary:
        root = Path(temporary)
        _check_space(root, task)
        about = {
            **environment(root),
            "options": {"rows": rows, "reps": reps, "shape": shape, "store": store_name},
        }
        results = Results({**about, "results": []})
        click.echo(describe(about))
        cache_readers = CacheReaders(
            task, make_source(task), np.random.default_rng(1).permutation(rows)
        )
        write_cache(root / "raster", cache_readers.source, store_name, ranked=False)
        measure_ours(cache_readers, root, options, results)
        click.echo(
            f"\nOurs, {default} threads by default:\n\n{ours_table(results.facts['results'])}"
        )
        peer_results = measure_peers(cache_readers, root, options, results)
        if peer_results:
            heading = (
                f"Others, {default} threads; in bold the best of each, for each order, and by hand"
            )
            click.echo(f"\n{heading}:\n\n{peers_table(peer_results)}")
        if cold:
            measured = measure_cold(cache_readers, root, options, results)
            click.echo(f"\nFrom the disk, {default} threads:\n\n{cold_table(measured)}")
            if measured.skipped:
                click.echo(f"\nNot measured from here on: {measured.skipped}")
    results.facts["claims"] = [
        {"claim": c, "value": value, "ok": ok} for c, value, ok in results.claims
    ]
    save_json(json_path, results.facts)
    click.echo("\n" + "\n".join(results.lines()))


if __name__ == "__main__":
    entry(cli)
