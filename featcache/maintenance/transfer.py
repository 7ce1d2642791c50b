"""A cache, or a part of it, is copied or converted to another store or format, without the teacher.

What stays as it is goes file by file, each compared with its record; what changes (another store or
format, an archive, fewer views or levels) goes row by row through `Cache.read`, which checks every
item, into a writer. Both publish shard by shard as an extraction does, so that a transfer that was
killed continues where it stopped.

n items (row, view), L levels, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError, UserError, command_line, counted
from featcache.extraction import target_folder
from featcache.extraction.shard_queue import free_shards
from featcache.maintenance import transfer_plan
from featcache.maintenance.transfer_plan import Target, TransferJob, target_like
from featcache.reading.cache import Cache
from featcache.runtime.meter import meter
from featcache.storage import checksums, codec_state, commit, index_build, manifest
from featcache.storage.files import address, files_of
from featcache.storage.statistics import (
    FeatureStatistics,
    Statistics,
    first_not_finite,
    stored_feature_statistics,
)
from featcache.storage.store import COMPRESSIONS, FORMATS, folder_path, get_store

BLOCK_BYTES = 64 << 20  # items held at a time
_FILE_BYTES = 8 << 20
WORDS = target_folder.Wording(
    option="",
    other_cache="give another folder, or the same command to continue this one",
    other_form="give another folder, or the options that it was begun with",
    smaller="another disk, or less: `featcache copy` takes --views, --levels and --shards",
    show_fixes=False,
)


@dataclass
class TransferProgress:
    """Count bytes of rows that are done, of those that were lacking; `report` is called after every
    block."""

    report: Callable[[TransferProgress], None] = lambda progress: None
    # called while other processes hold the last shards
    waiting: Callable[[int], None] = lambda shards: None
    done: int = 0
    total: int = 0
    shards: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, count: int) -> None:
        self.done += count
        self.report(self)

    @property
    def rate(self) -> float:
        """Return bytes a second since the start."""
        return self.done / max(time.perf_counter() - self.started, 1e-9)


def copy(
    cache: Path,
    out: Path,
    *,
    views: int | None = None,
    levels: Sequence[int] | None = None,
    shards: tuple[int, int] | None = None,
    compress: bool = False,
    progress: TransferProgress | None = None,
) -> list[str]:
    """Copy the cache with all that was added to it, or shards A to B - 1 of it; with `views` (the
    first so many) or `levels`, one flat cache of its own teacher. With `compress` the copy is an
    archive; without, a copy of an archive is plain again. Returns what was left out, in words."""
    check_apart(cache, out)
    with Cache(cache) as source:
        if compress and source.identity["store"] != "zarr":
            raise UsageError(
                f"--compress: cache {str(cache)!r} is in the {source.identity['store']} store; an "
                "archive is written of the zarr store: run `featcache convert --store zarr` first"
            )
        compression = COMPRESSIONS[0] if compress else ""
        target = replace(target_like(source), compression=compression)
        if views is None and levels is None:
            jobs, left = transfer_plan.whole_cache_jobs(source, out, target, shards=shards)
        else:
            jobs, left = transfer_plan.flat_cache_jobs(
                source, out, target, views=views, levels=levels, shards=shards
            )
        run(jobs, progress or TransferProgress())
    return left


def convert(
    cache: Path,
    out: Path,
    *,
    store: str | None = None,
    format: int | None = None,
    progress: TransferProgress | None = None,
) -> list[str]:
    """Write the same cache, and all that was added to it, in another store or format. Returns what
    was left out, in words."""
    check_apart(cache, out)
    with Cache(cache) as source:
        here = target_like(source)
        get_store(store or here.store)
        if store is None and format is None:
            raise UsageError(
                f"cache {str(cache)!r} is in the {here.store} store and format {here.format}: give "
                "--store, --format or both of what OUT is to be"
            )
        if format not in (None, *FORMATS):
            allowed = ", ".join(map(str, FORMATS))
            raise UsageError(f"--format {format!r}: {allowed} is allowed")
        target = Target(store or here.store, format or here.format, here.compression)
        if target.store != "zarr":
            target = replace(target, compression="")
        if target == here:
            raise UsageError(
                f"cache {str(cache)!r} is in the {here.store} store and format {here.format} "
                "already: give another --store or --format; `featcache copy` copies it"
            )
        jobs, left = transfer_plan.whole_cache_jobs(source, out, target)
        run(jobs, progress or TransferProgress())
    return left


def check_apart(cache: Path, out: Path) -> None:
    """Raise UsageError for a folder that lies in the cache itself."""
    if files_of(cache.absolute()).may_be_far or files_of(out.absolute()).may_be_far:
        inside = f"{address(out)}/".startswith(f"{address(cache)}/")
    else:
        here, there = cache.resolve(), out.resolve()
        inside = here == there or here in there.parents
    if inside:
        raise UsageError(
            f"{str(out)!r} lies in the cache {str(cache)!r} itself; give a folder outside of it"
        )


def run(
    jobs: Sequence[TransferJob],
    progress: TransferProgress,
    prepare: Callable[[TransferJob], TransferJob] = lambda job: job,
) -> None:
    """Transfer the base, which is the first job, last, so that a cache is complete when all of it
    is there. `prepare` is called with each job before its folder is begun."""
    for job in jobs:
        target_folder.existing_manifest(job.manifest, job.out, WORDS)
    progress.total = sum(job.bytes(record) for job in jobs for record in job.missing)
    target_folder.check_space(jobs[0].out, progress.total, WORDS)
    try:
        ready = [_begin(prepare(job)) for job in jobs]
        for job in reversed(ready):
            _transfer_shards(job, progress)
            target_folder.write_quarantine(job.out, job.records)
        _check_whole(ready)
        for job in ready:
            index_build.update(job.out)
    except OSError as error:
        folders = {job.out: job.manifest for job in jobs}
        if full := target_folder.disk_full_error(error, folders, WORDS):
            raise full from error
        if gone := _gone_folder(error, jobs):
            raise commit.cache_gone_error(gone) from error
        raise
    finally:
        for job in jobs:
            job.source.close()


def _gone_folder(error: OSError, jobs: Sequence[TransferJob]) -> Path | None:
    """Return the folder that was removed while it was written to; None where that is not why."""
    missing = Path(str(error.filename)) if isinstance(error, FileNotFoundError) else None
    for job in jobs:
        if missing and missing.is_relative_to(job.out) and not (job.out / manifest.NAME).is_file():
            return job.out
    return None


def _check_whole(jobs: Sequence[TransferJob]) -> None:
    for job in jobs:
        if lost := job.missing:
            raise UserError(
                f"{str(job.out)!r}: {len(lost)} of "
                f"{counted(len(job.records), 'shard is', 'shards are')} no longer there, "
                f"the first {lost[0]['shard']}: something else removed them; run the same command "
                "again"
            )


def _begin(job: TransferJob) -> TransferJob:
    source = job.source
    if problems := manifest.check_files(source.path, source.manifest):
        raise UserError(
            f"cache file {problems[0]}; run `{command_line('featcache', 'repair', source.path)}`"
        )
    if not job.as_files:
        _state_of(job)  # raises before anything is written
    state = {codec_state.file_name(job.manifest): job.state_file} if job.state_file else {}
    others = [name for name in job.manifest["files"] if name not in state]
    files = {**{name: (source.path / name).read_bytes() for name in others}, **state}
    target_folder.begin_folder(job.out, job.manifest, files, WORDS)
    return job


def _transfer_shards(job: TransferJob, progress: TransferProgress) -> None:
    records = {record["shard"]: record for record in job.records}
    transfer = _copy_shard if job.as_files else rewrite_shard
    with contextlib.closing(free_shards([job], list(records), progress.waiting)) as free:
        for shard, _ in free:
            transfer(job, records[shard], progress)
            progress.shards += 1


def _copy_shard(job: TransferJob, record: dict[str, Any], progress: TransferProgress) -> None:
    name = record["shard"]
    origin, folder = (
        folder_path(job.source.path, name, job.store),
        commit.begin_shard(job.out, name, job.store),
    )
    place, paths = files_of(origin), [f"{origin}/{file}" for file in record["files"]]
    try:
        place.bring(paths)
        for file, facts in record["files"].items():
            _copy_file(
                origin / file, folder / file, facts, get_store(job.store), job.source.path, progress
            )
        commit.publish(folder, job.out, name, job.store, record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        place.drop(paths)


def _copy_file(
    origin: Path,
    target: Path,
    facts: dict[str, Any],
    backend: ModuleType,
    cache: Path,
    progress: TransferProgress,
) -> None:
    """Copy a file, and compare the copy with the record while it still lies in memory: that covers
    both disks."""
    target.parent.mkdir(exist_ok=True)
    buffer = memoryview(bytearray(min(_FILE_BYTES, max(facts["bytes"], 1))))
    with origin.open("rb", buffering=0) as source, target.open("xb") as out:
        while count := source.readinto(buffer):
            out.write(buffer[:count])
            meter.count("bytes_read", count)
            progress.add(count)
        out.flush()
        os.fsync(out.fileno())
    if target.stat().st_size == facts["bytes"] and backend.is_intact(target, facts):
        return
    if origin.stat().st_size == facts["bytes"] and backend.is_intact(origin, facts):
        raise UserError(
            f"the copy {target} differs from {origin}, which is sound: disk or memory may be at "
            "fault; run the same command again"
        )
    raise UserError(
        f"cache file {origin}: its bytes are not those that were written; run "
        f"`{command_line('featcache', 'repair', cache)}`"
    )


def rewrite_shard(job: TransferJob, record: dict[str, Any], progress: TransferProgress) -> None:
    """Write one shard of a job, row by row, from the record of the source's."""
    job.source.notes_archive = False  # who copies it out need not be told to
    writer = get_store(job.store).writer(
        job.out,
        record["shard"],
        job.arrays,
        job.identity["views"],
        manifest.shard_form(job.manifest),
    )
    statistics = Statistics()
    state = _state_of(job)
    try:
        for keys, items in blocks(job, record):
            if job.change:
                items = job.change.apply(items)
            if job.recount:
                found = stored_feature_statistics(
                    job.identity["codec"], job.identity["teacher"]["width"], items, state
                )
                _check_finite(job, keys, items, found)
                statistics.add(items, found)
            items = {**items, **checksums.compute_checksums(job.arrays, items)}
            writer.append(keys, items)
            progress.add(job.bytes(record) * len(keys) // (record["rows"] * job.identity["views"]))
        writer.finish(
            record["quarantined"], statistics.summary() if job.recount else record["statistics"]
        )
    except BaseException:
        writer.discard()
        raise


def _state_of(job: TransferJob) -> Mapping[str, Any]:
    """Return the state that decodes the levels of the target."""
    if job.change:
        return job.change.new_state
    return job.source.codec_state(job.source.teachers[0], job.identity["levels"])


def _check_finite(
    job: TransferJob,
    keys: Sequence[str],
    items: Mapping[str, npt.NDArray[Any]],
    features: FeatureStatistics,
) -> None:
    """Raise UserError for numbers that no extraction writes, and no statistics can be made of."""
    if bad := first_not_finite(items, features):
        name, item = bad
        raise UserError(
            f"cache {str(job.source.path)!r}: {name} of {keys[item]!r} are not finite, which no "
            "extraction writes; extract it again"
        )


def blocks(
    job: TransferJob, record: dict[str, Any]
) -> Iterator[tuple[list[str], dict[str, npt.NDArray[Any]]]]:
    """Yield keys and items (n, *item) of a shard in (row, view) order, as the source has them,
    without checksums. Memory is used again: a block is gone when the next comes."""
    views, first_view = job.identity["views"], job.identity.get("first_view", 0)
    specs = job.source_arrays
    rows = transfer_plan.shard_rows(job.source, record)
    total = int(record["rows"]) * views
    count = max(1, min(total, BLOCK_BYTES // max(sum(spec.item_bytes for spec in specs), 1)))
    memory = {spec.name: np.empty((count, *spec.item), spec.dtype) for spec in specs}
    for low in range(0, total, count):
        at = np.arange(low, min(low + count, total))
        out = {name: values[: len(at)] for name, values in memory.items()}
        row, view = rows.start + at // views, first_view + at % views
        items = job.source.read(row, view, list(out), levels=job.identity["levels"], out=out)
        yield [job.source.keys[i] for i in row.tolist()], items
