"""A cache, or a part of it, in another place or another store, without the teacher.

What stays as it is goes file by file, each compared with its record; what changes (another store,
fewer views or levels) goes row by row through the reader, which checks every item, into a writer.
Both publish shard by shard as an extraction does, so that a transfer that was killed continues
where it stopped.

n items (row, view), L levels, T tokens, D width.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError, UserError
from featcache.extraction.shard_queue import free_shards
from featcache.maintenance import transfer_plan
from featcache.maintenance.transfer_plan import TransferJob
from featcache.reading.cache import Cache
from featcache.storage import checksums, commit, identity, json_file, manifest
from featcache.storage.statistics import Statistics, stored_feature_statistics
from featcache.storage.store import QUARANTINE, SHARDS, STORES, folder_path, get_store

BLOCK_BYTES = 64 << 20  # items held at a time
_FILE_BYTES = 8 << 20
_SPARE_BYTES = 64 << 20  # what a disk should keep beyond the cache


@dataclass
class TransferProgress:
    """Bytes of rows that are done, of those that were lacking; `report` is called after every
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
        """Bytes a second since the start."""
        return self.done / max(time.perf_counter() - self.started, 1e-9)


def copy(
    cache: Path,
    out: Path,
    *,
    views: int | None = None,
    levels: Sequence[int] | None = None,
    shards: tuple[int, int] | None = None,
    progress: TransferProgress | None = None,
) -> list[str]:
    """Copy the cache with all that was added to it, or shards A to B - 1 of it; with `views` (the
    first so many) or `levels`, one flat cache of its own teacher. Returns what was left out, in
    words."""
    _apart(cache, out)
    with Cache(cache) as source:
        if views is None and levels is None:
            jobs, left = transfer_plan.whole_cache_jobs(source, out, shards=shards)
        else:
            jobs, left = transfer_plan.flat_cache_jobs(
                source, out, views=views, levels=levels, shards=shards
            )
        _run(jobs, progress or TransferProgress())
    return left


def convert(
    cache: Path, out: Path, name: str, *, progress: TransferProgress | None = None
) -> list[str]:
    """The same cache, and all that was added to it, in the store `name`. Returns what was left out,
    in words."""
    _apart(cache, out)
    with Cache(cache) as source:
        here = source.identity["store"]
        if name not in STORES or name == here:
            others = ", ".join(other for other in STORES if other != here)
            raise UsageError(
                f"--store {name!r}: cache {str(cache)!r} is in the {here} store; {others} is "
                "allowed, and `featcache copy` copies it as it is"
            )
        jobs, left = transfer_plan.whole_cache_jobs(source, out, store=name)
        _run(jobs, progress or TransferProgress())
    return left


def _apart(cache: Path, out: Path) -> None:
    here, there = cache.resolve(), out.resolve()
    if here == there or here in there.parents:
        raise UsageError(
            f"{str(out)!r} lies in the cache {str(cache)!r} itself; give a folder outside of it"
        )


def _run(jobs: Sequence[TransferJob], progress: TransferProgress) -> None:
    """The base is the first job and is done last, so that a cache is complete when all of it is
    there."""
    for job in jobs:
        _refuse(job)
    progress.total = sum(job.bytes(record) for job in jobs for record in job.missing)
    _check_space(jobs[0].out, progress.total)
    try:
        for job in jobs:
            _begin(job)
        for job in reversed(jobs):
            _transfer_shards(job, progress)
            _report_quarantine(job)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        total, lacking = (
            sum(len(job.records) for job in jobs),
            sum(len(job.missing) for job in jobs),
        )
        raise UserError(
            f"{str(jobs[0].out)!r}: {error.strerror}; {total - lacking} of {total} shards are "
            "complete and kept; make room and run the same command again, it continues"
        ) from error
    finally:
        for job in jobs:
            job.source.close()


def _refuse(job: TransferJob) -> None:
    """Is there another cache in the target's folder, or something else?"""
    out = job.out
    if (out / manifest.NAME).is_file():
        todo = "give another folder, or the same command to continue this one"
        grades = ("fatal", "lossy", "layout")
        identity.refuse_mismatch(
            job.manifest, manifest.read(out), f"{str(out)!r} holds another cache", todo, grades
        )
    elif out.exists() and (
        not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())
    ):
        if (out / manifest.NAME).is_file():  # another process has begun the same in this moment
            _refuse(job)
            return
        raise UserError(f"{str(out)!r} exists and is no cache; give an empty or new folder")


def _check_space(out: Path, needed: int) -> None:
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed and needed + _SPARE_BYTES > free:
        raise UserError(
            f"{str(out)!r}: {(needed + _SPARE_BYTES) / 1e9:.1f} GB more are needed, "
            f"{free / 1e9:.1f} GB are free; another disk, or less: `featcache copy` takes --views, "
            "--levels and --shards"
        )


def _begin(job: TransferJob) -> None:
    """Manifest first, so that a folder that is left behind is a cache to continue; then the files
    beside it."""
    source, out = job.source, job.out
    out.mkdir(parents=True, exist_ok=True)
    json_file.sweep(out)
    for path in (out / manifest.NAME, out / SHARDS / manifest.COPY):
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            json_file.write_json(path, job.manifest)
    json_file.sweep(out / SHARDS)
    if problems := manifest.check_files(source.path, source.manifest):
        raise UserError(f"cache file {problems[0]}; run `featcache repair {source.path}`")
    for name in job.manifest["files"]:
        data = (source.path / name).read_bytes()
        if not (out / name).is_file() or (out / name).read_bytes() != data:
            json_file.write_file(out / name, data)


def _transfer_shards(job: TransferJob, progress: TransferProgress) -> None:
    records = {record["shard"]: record for record in job.records}
    transfer = _copy_shard if job.as_files else _rewrite_shard
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
    try:
        for file, facts in record["files"].items():
            _copy_file(
                origin / file, folder / file, facts, get_store(job.store), job.source.path, progress
            )
        commit.publish(folder, job.out, name, job.store, record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_file(
    origin: Path,
    target: Path,
    facts: dict[str, Any],
    backend: ModuleType,
    cache: Path,
    progress: TransferProgress,
) -> None:
    """The copy is what is compared with the record, while it still lies in memory: that covers both
    disks."""
    target.parent.mkdir(exist_ok=True)
    buffer = memoryview(bytearray(min(_FILE_BYTES, max(facts["bytes"], 1))))
    with origin.open("rb", buffering=0) as source, target.open("xb") as out:
        while count := source.readinto(buffer):
            out.write(buffer[:count])
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
        f"cache file {origin}: its bytes are not those that were written; run `featcache repair "
        f"{cache}`"
    )


def _rewrite_shard(job: TransferJob, record: dict[str, Any], progress: TransferProgress) -> None:
    writer = get_store(job.store).writer(
        job.out, record["shard"], job.arrays, job.identity["views"]
    )
    statistics = Statistics()
    try:
        for keys, items in _blocks(job, record):
            if job.recount:
                statistics.add(
                    items,
                    stored_feature_statistics(
                        job.identity["codec"], job.identity["teacher"]["width"], items
                    ),
                )
            items = {**items, **checksums.compute_checksums(job.arrays, items)}
            writer.append(keys, items)
            progress.add(job.bytes(record) * len(keys) // (record["rows"] * job.identity["views"]))
        writer.finish(
            record["quarantined"], statistics.summary() if job.recount else record["statistics"]
        )
    except BaseException:
        writer.discard()
        raise


def _blocks(
    job: TransferJob, record: dict[str, Any]
) -> Iterator[tuple[list[str], dict[str, npt.NDArray[Any]]]]:
    """Keys and items (n, *item) of a shard in (row, view) order, without checksums. Memory is used
    again: a block is gone when the next comes."""
    views, first_view = job.identity["views"], job.identity.get("first_view", 0)
    specs = [spec for spec in job.arrays if spec.name not in checksums.NAMES]
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


def _report_quarantine(job: TransferJob) -> None:
    rows = [row for record in job.records for row in record["quarantined"]]
    if rows and not (job.out / QUARANTINE).is_file():
        json_file.write_json(job.out / QUARANTINE, {"pictures": rows})
