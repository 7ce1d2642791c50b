"""The extraction: pictures -> views -> teacher -> targets -> codec -> shard, once.

Stages overlap: threads decode and render, the caller's copies pixels over and runs the teacher, one thread
encodes, one writes (`stages`). Batches are made of views in (picture, view) order, never cross a shard, and the last
one of a shard is padded, so that a real network sees the same batches whenever it is run again. Several plans over the
same views are one pass: each picture is decoded once, and what a plan writes is what it would write alone.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import device_pipeline as stages
from featcache.extraction import rendering
from featcache.extraction.device_pipeline import compute, ranked
from featcache.extraction.plan import Job, Plan, check_room, prepare
from featcache.extraction.progress import Progress
from featcache.models import tokenizer
from featcache.storage import checksums, manifest
from featcache.storage import commit as publish
from featcache.storage import lease as leases
from featcache.storage.part import same_shard
from featcache.storage.statistics import OfFeatures, Statistics, of_stored
from featcache.storage.store import QUARANTINE, ShardWriter, record_path, store

# `compute` and `ranked` as well: who compares stored rows with the teacher goes the extraction's own way.
__all__ = ["Progress", "compute", "ranked", "report_quarantine", "run", "together"]

WAIT_S = 1.0  # between looks at shards that other processes work on
IN_FLIGHT = 2  # batches that the teacher is done with and that are not written yet
Shard = dict[str, Any]  # name, first, count


def run(plan: Plan, out: Path, **options: Any) -> dict[str, Any]:
    """Extract what is missing of the cache at `out`; returns its manifest. Options are those of `together`."""
    return together([Job(plan, out)], **options)[0]


def together(
    jobs: Sequence[Job],
    *,
    batch_size: int = 64,
    workers: int = 2,
    strict: bool = False,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    about: dict[str, Any] | None = None,
    only: str | None = None,
) -> list[dict[str, Any]]:
    """Extract what is missing of each job, which share pictures, policy, views and shards; returns their manifests.
    Killed at any moment, the next call continues; several processes may work on one cache at once. `share` (i, n) takes
    only shards i, i + n, ... A picture that cannot be used is quarantined, or a UserError with `strict`. A repair
    gives the manifest `about` of its one job, which it has compared itself, and the `only` shard it wants."""
    if batch_size < 1 or workers < 1:
        raise UsageError(f"--batch-size {batch_size}, --workers {workers}: at least 1 is needed")
    progress = progress or Progress()
    if len(jobs) > 1:
        check_room(jobs)
    wanted = [about] if about else [prepare(*job, batch_size) for job in jobs]
    mine = [shard for shard in wanted[0]["shards"][share[0] :: share[1]] if only in (None, shard["name"])]
    for plan, out in jobs:
        publish.settle(out, plan.store, (shard["name"] for shard in mine))
    progress.workers = workers
    try:
        with Pools(workers) as pools, contextlib.closing(_free_shards(jobs, mine, progress)) as free:
            for shard, lacking in free:
                _extract_shard(lacking, shard, batch_size, strict, progress, pools)
    except BaseException as error:
        for _, out in jobs:
            publish.abandon(out)
            leases.abandon(out)
        if full := _disk_full(error, jobs[0].out, wanted[0]):
            raise full from error
        if isinstance(error, FileNotFoundError) and not (jobs[0].out / manifest.NAME).is_file():
            raise publish.gone(jobs[0].out) from error
        raise
    for job, each in zip(jobs, wanted, strict=True) if only is None else ():  # a repair does so when all is mended
        report_quarantine(job.out, each)
    return wanted


class Pools(contextlib.ExitStack):
    """The threads: many that decode, one that encodes, one that writes."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.decode, self.encode, self.write = (
            self.enter_context(ThreadPoolExecutor(count)) for count in (workers, 1, 1)
        )

    def stop(self) -> None:
        """Begin nothing new and wait for what has begun; a stage before the one it feeds."""
        for pool in (self.decode, self.encode, self.write):
            pool.shutdown(wait=True, cancel_futures=True)


def _free_shards(
    jobs: Sequence[Job], shards: Sequence[Shard], progress: Progress
) -> Generator[tuple[Shard, list[Job]], None, None]:
    """Shards with the jobs that have no record of them and that nobody else works on; waits for those that somebody
    does, until they are complete or left behind."""
    left = list(shards)
    missing = {shard["name"] for shard in left if _lacking(jobs, shard)}
    progress.total = progress.total or sum(shard["count"] for shard in left if shard["name"] in missing)
    while left:
        taken = False
        for shard in list(left):
            name = shard["name"]
            lacking = _lacking(jobs, shard)
            if not lacking:
                left.remove(shard)
                progress.total -= shard["count"] if name in missing else 0
                for _, out in jobs:
                    leases.clear(out, name)
                continue
            with contextlib.ExitStack() as held:
                free = [job for job in lacking if _take(job, name, held)]
                taken = taken or bool(free)
                free = _lacking(free, shard)  # one may have been finished by another meanwhile, or adopted just now
                if not free:
                    continue
                if len(free) == len(lacking):
                    left.remove(shard)
                else:  # others work on the rest of it; to be looked at again
                    progress.total += shard["count"]
                yield shard, free
        if left and not taken:
            progress.waiting(len(left))
            time.sleep(WAIT_S)


def _lacking(jobs: Sequence[Job], shard: Shard) -> list[Job]:
    return [job for job in jobs if not record_path(job.out, shard["name"]).is_file()]


def _take(job: Job, shard: str, held: contextlib.ExitStack) -> bool:
    """Whether the lease of a job's shard is ours, until `held` is left."""
    lease = leases.take(job.out, shard)
    if lease is None:
        return False
    held.callback(lease.release)
    publish.settle(job.out, job.plan.store, [shard])
    return True


def _disk_full(error: BaseException, out: Path, wanted: dict[str, Any]) -> UserError | None:
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    done = sum(record_path(out, shard["name"]).is_file() for shard in wanted["shards"])
    return UserError(
        f"--out {str(out)!r}: {error.strerror}; {done} of {len(wanted['shards'])} shards are complete and kept; make "
        "room and run the same command again, it continues"
    )


class Line:
    """What one job makes of a shard's batches."""

    def __init__(self, job: Job, writer: ShardWriter, batch_size: int, progress: Progress) -> None:
        self.plan, self.writer, self.progress = job.plan, writer, progress
        self.lane = stages.Lane(job.plan, batch_size, progress)
        self.statistics = Statistics()

    def encode(self, flight: stages.Flight) -> tuple[list[str], stages.Host]:
        """Keys and items of a batch; batches come in order, one at a time."""
        host = self.lane.land(flight)
        with self.progress.stage("encode"):
            items, about = self._items(flight.batch, host)
            self.statistics.add(items, about)
            items |= checksums.compute(self.plan.arrays, items)
        return [picture.key for picture, _ in flight.batch], items

    def _items(self, batch: stages.Batch, host: stages.Host) -> tuple[stages.Host, OfFeatures]:
        plan = self.plan
        if plan.is_tokenizer:
            ids = tokenizer.stored(host[tokenizer.FIELD], plan.teacher.width, plan.teacher.name)
            return {tokenizer.FIELD: ids, **stages.of_views(batch)}, OfFeatures(0.0, 0.0, ids[:0].astype("f4"))
        answer = stages.encoded(plan, batch, host)
        items = stages.items(plan, batch, answer)
        of_copy = plan.keep is not None or plan.recount
        return items, of_stored(plan.codec, plan.teacher.width, items) if of_copy else answer.about

    def write(self, made: Future[tuple[list[str], stages.Host]]) -> None:
        keys, items = made.result()
        with self.progress.stage("write"):
            self.writer.append(keys, items)


def _extract_shard(
    jobs: Sequence[Job], shard: Shard, batch_size: int, strict: bool, progress: Progress, pools: Pools
) -> None:
    lines: list[Line] = []
    try:
        for plan, out in jobs:
            writer = store(plan.store).writer(out, shard["name"], plan.arrays, plan.views)
            lines.append(Line(Job(plan, out), writer, batch_size, progress))
        _run_lines(lines, _Rows(jobs, shard), batch_size, strict, progress, pools)
    except BaseException:
        pools.stop()
        for line in lines:
            line.writer.discard()
        raise


class _Rows:
    """Which pictures of a shard have a row. Where parts beside this one, or the shard that is replaced, have decided it
    already, theirs are the rows, since row i is row i everywhere."""

    def __init__(self, jobs: Sequence[Job], shard: Shard) -> None:
        keys, numbers = jobs[0].plan.source.keys, range(shard["first"], shard["first"] + shard["count"])
        found = [(job.out, record) for job in jobs if (record := same_shard(job.out, shard))]
        before: Mapping[str, Any] = found[0][1] if found else {"quarantined": []}
        self.decided = found[0][0] if found else None
        self.quarantined: list[dict[str, str]] = list(before["quarantined"])
        out = {row["key"] for row in self.quarantined}
        self._before = list(self.quarantined)
        self.indices = [i for i in numbers if keys[i] not in out]
        if found and manifest.keys_digest(keys[i] for i in self.indices) != before["keys_digest"]:
            raise IdentityError(
                f"shard {shard['name']} of {str(self.decided)!r} has other rows than these pictures give; give the "
                "pictures of that extraction: --images SRC"
            )

    def check(self) -> None:
        """A picture that had a row and can no longer be used would move every later one."""
        for row in self.quarantined if self.decided else []:
            if row not in self._before:
                raise UserError(
                    f"picture {row['key']!r} has a row in {str(self.decided)!r} and cannot be used now: "
                    f"{row['reason']}; mend it and run the same command again"
                )


def _run_lines(
    lines: Sequence[Line],
    rows: _Rows,
    batch_size: int,
    strict: bool,
    progress: Progress,
    pools: Pools,
) -> None:
    """Decode, copy and teacher here, encoding and writing each in its thread, in the order of batches and lines."""
    plans = [line.plan for line in lines]
    plan = plans[0]
    pending: deque[Future[None]] = deque()
    window = max(2 * batch_size // plan.views, 2 * progress.workers)

    def decode(index: int) -> rendering.Rendered:
        with progress.stage("decode"):
            return rendering.render(plans, index)

    futures = rendering.ahead(pools.decode, decode, rows.indices, window)
    rendered = rendering.usable(plan, futures, strict, rows.quarantined)
    for batch in rendering.batches(rendered, plan.views, batch_size):
        rows.check()
        for line in lines:
            flight = line.lane.launch(batch)
            while len(pending) >= IN_FLIGHT:
                pending.popleft().result()
            made = pools.encode.submit(line.encode, flight)
            pending.append(pools.write.submit(line.write, made))
        progress.pictures += sum(view == plan.views - 1 for _, view in batch)
        progress.report(progress)
    for future in pending:
        future.result()
    rows.check()
    for line in lines:
        with progress.stage("write"):
            line.writer.finish(rows.quarantined, line.statistics.summary())
    progress.pictures += len(rows.quarantined)
    progress.report(progress)


def report_quarantine(out: Path, wanted: dict[str, Any]) -> None:
    """quarantine.json beside the manifest, where a picture could not be used; an error where none could."""
    paths = [record_path(out, shard["name"]) for shard in wanted["shards"]]
    if not all(path.is_file() for path in paths):  # the shares of others are still to come
        return
    records = [manifest.read_json(path) for path in paths]
    rows = [row for record in records for row in record["quarantined"]]
    if not rows:
        publish.remove(out / QUARANTINE)
    elif not _is_written(out / QUARANTINE, {"pictures": rows}):
        manifest.write_json(out / QUARANTINE, {"pictures": rows})
    if rows and not sum(record["rows"] for record in records):
        raise UserError(
            f"none of {len(rows)} pictures could be used, the first {rows[0]['key']!r}: {rows[0]['reason']}; "
            f"all are listed in {out / QUARANTINE}"
        )


def _is_written(path: Path, value: dict[str, Any]) -> bool:
    """Whether a JSON of ours is there already: a complete cache may be read-only."""
    try:
        return manifest.read_json(path) == value
    except UserError:
        return False
