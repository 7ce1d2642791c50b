"""The extraction: pictures -> views -> teacher -> targets -> codec -> shard, once.

Stages overlap: threads decode and render, the caller's copies pixels over and runs the teacher, one
thread encodes, one writes (`stages`). Batches are made of views in (picture, view) order, never
cross a shard, and the last one of a shard is padded, so that a real network sees the same batches
whenever it is run again. Several plans over the same views are one pass: each picture is decoded
once, and what a plan writes is what it would write alone.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import device_pipeline, rendering
from featcache.extraction import rows as item_rows
from featcache.extraction.layout import checked_token_ids
from featcache.extraction.plan import ExtractJob, Plan
from featcache.extraction.progress import ExtractProgress
from featcache.extraction.shard_queue import free_shards, lacks_record
from featcache.extraction.target_folder import (
    check_disk_space,
    disk_full_error,
    prepare_folder,
    report_quarantine,
)
from featcache.models import tokenizer
from featcache.storage import checksums, commit, lease, manifest
from featcache.storage.part import previous_record
from featcache.storage.statistics import FeatureStatistics, Statistics, statistics_of_stored
from featcache.storage.store import ShardWriter, get_store

Shard = dict[str, Any]  # name, first, count
IN_FLIGHT = 2  # batches that the teacher is done with and that are not written yet


def run(plan: Plan, out: Path, **options: Any) -> dict[str, Any]:
    """Extract what is missing of the cache at `out`; returns its manifest. Options are those of
    `run_jobs`."""
    return run_jobs([ExtractJob(plan, out)], **options)[0]


def run_jobs(
    jobs: Sequence[ExtractJob],
    *,
    batch_size: int = 64,
    workers: int = 2,
    strict: bool = False,
    progress: ExtractProgress | None = None,
    share: tuple[int, int] = (0, 1),
    about: dict[str, Any] | None = None,
    only: str | None = None,
) -> list[dict[str, Any]]:
    """Extract what is missing of each job, which share pictures, policy, views and shards; returns
    their manifests. Killed at any moment, the next call continues; several processes may work on
    one cache at once. `share` (i, n) takes only shards i, i + n, ... A picture that cannot be used
    is quarantined, or a UserError with `strict`. A repair gives the manifest `about` of its one
    job, which it has compared itself, and the `only` shard it wants."""
    if batch_size < 1 or workers < 1:
        raise UsageError(f"--batch-size {batch_size}, --workers {workers}: at least 1 is needed")
    progress = progress or ExtractProgress()
    if len(jobs) > 1:
        check_disk_space(jobs)
    wanted = [about] if about else [prepare_folder(*job, batch_size) for job in jobs]
    mine = [
        shard
        for shard in wanted[0]["shards"][share[0] :: share[1]]
        if only in (None, shard["name"])
    ]
    for plan, out in jobs:
        commit.recover(out, plan.store, (shard["name"] for shard in mine))
    progress.workers = workers
    by_name = {shard["name"]: shard for shard in mine}
    recount = _count_pictures(jobs, mine, progress)
    queue = free_shards(jobs, list(by_name), progress.waiting, recount=recount)
    try:
        with ThreadPools(workers) as pools, contextlib.closing(queue) as free:
            for name, lacking in free:
                _extract_shard(lacking, by_name[name], batch_size, strict, progress, pools)
    except BaseException as error:
        for _, out in jobs:
            commit.abort(out)
            lease.abort(out)
        if full := disk_full_error(error, jobs[0].out, wanted[0]):
            raise full from error
        if isinstance(error, FileNotFoundError) and not (jobs[0].out / manifest.NAME).is_file():
            raise commit.cache_gone_error(jobs[0].out) from error
        raise
    # a repair does so when all is mended
    for job, each in zip(jobs, wanted, strict=True) if only is None else ():
        report_quarantine(job.out, each)
    return wanted


def _count_pictures(
    jobs: Sequence[ExtractJob], shards: Sequence[Shard], progress: ExtractProgress
) -> Callable[[str, int], None]:
    """Set the total to the pictures of the shards that are missing; returns what corrects it."""
    missing = {
        shard["name"]: shard["count"]
        for shard in shards
        if any(lacks_record(job, shard["name"], leased=False) for job in jobs)
    }
    progress.total = progress.total or sum(missing.values())

    def recount(shard: str, times: int) -> None:
        progress.total += times * missing.get(shard, 0)

    return recount


class ThreadPools(contextlib.ExitStack):
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


class ShardWriterTask:
    """What one job makes of a shard's batches."""

    def __init__(
        self, job: ExtractJob, writer: ShardWriter, batch_size: int, progress: ExtractProgress
    ) -> None:
        self.plan, self.writer, self.progress = job.plan, writer, progress
        self.pipeline = device_pipeline.DevicePipeline(job.plan, batch_size, progress)
        self.statistics = Statistics()

    def encode(self, in_flight: device_pipeline.InFlight) -> tuple[list[str], item_rows.Host]:
        """Keys and items of a batch; batches come in order, one at a time."""
        host = self.pipeline.collect(in_flight)
        with self.progress.stage("encode"):
            items, about = self._items(in_flight.batch, host)
            self.statistics.add(items, about)
            items |= checksums.compute_checksums(self.plan.arrays, items)
        return [picture.key for picture, _ in in_flight.batch], items

    def _items(
        self, batch: item_rows.Batch, host: item_rows.Host
    ) -> tuple[item_rows.Host, FeatureStatistics]:
        plan = self.plan
        if plan.is_tokenizer:
            ids = checked_token_ids(host[tokenizer.FIELD], plan.teacher.width, plan.teacher.name)
            return {tokenizer.FIELD: ids, **item_rows.view_items(batch)}, FeatureStatistics(
                0.0, 0.0, ids[:0].astype("f4")
            )
        answer = item_rows.check_encoded(plan, batch, host)
        items = item_rows.batch_items(plan, batch, answer)
        of_copy = plan.keep is not None or plan.recount
        return items, statistics_of_stored(
            plan.codec, plan.teacher.width, items
        ) if of_copy else answer.about

    def write(self, made: Future[tuple[list[str], item_rows.Host]]) -> None:
        keys, items = made.result()
        with self.progress.stage("write"):
            self.writer.append(keys, items)


def _extract_shard(
    jobs: Sequence[ExtractJob],
    shard: Shard,
    batch_size: int,
    strict: bool,
    progress: ExtractProgress,
    pools: ThreadPools,
) -> None:
    tasks: list[ShardWriterTask] = []
    try:
        for plan, out in jobs:
            writer = get_store(plan.store).writer(out, shard["name"], plan.arrays, plan.views)
            tasks.append(ShardWriterTask(ExtractJob(plan, out), writer, batch_size, progress))
        _run_tasks(tasks, _Rows(jobs, shard), batch_size, strict, progress, pools)
    except BaseException:
        pools.stop()
        for task in tasks:
            task.writer.discard()
        raise


class _Rows:
    """Which pictures of a shard have a row. Where parts beside this one, or the shard that is
    replaced, have decided it already, theirs are the rows, since row i is row i everywhere."""

    def __init__(self, jobs: Sequence[ExtractJob], shard: Shard) -> None:
        keys, numbers = (
            jobs[0].plan.source.keys,
            range(shard["first"], shard["first"] + shard["count"]),
        )
        found = [(job.out, record) for job in jobs if (record := previous_record(job.out, shard))]
        before: Mapping[str, Any] = found[0][1] if found else {"quarantined": []}
        self.decided = found[0][0] if found else None
        self.quarantined: list[dict[str, str]] = list(before["quarantined"])
        out = {row["key"] for row in self.quarantined}
        self._before = list(self.quarantined)
        self.indices = [i for i in numbers if keys[i] not in out]
        if found and manifest.keys_digest(keys[i] for i in self.indices) != before["keys_digest"]:
            raise IdentityError(
                f"shard {shard['name']} of {str(self.decided)!r} has other rows than these "
                "pictures give; give the pictures of that extraction: --images SRC"
            )

    def check(self) -> None:
        """A picture that had a row and can no longer be used would move every later one."""
        for row in self.quarantined if self.decided else []:
            if row not in self._before:
                raise UserError(
                    f"picture {row['key']!r} has a row in {str(self.decided)!r} and cannot be used "
                    f"now: {row['reason']}; mend it and run the same command again"
                )


def _run_tasks(
    tasks: Sequence[ShardWriterTask],
    rows: _Rows,
    batch_size: int,
    strict: bool,
    progress: ExtractProgress,
    pools: ThreadPools,
) -> None:
    """Decode, copy and teacher here, encoding and writing each in its thread, in the order of
    batches and tasks."""
    plans = [task.plan for task in tasks]
    plan = plans[0]
    pending: deque[Future[None]] = deque()
    window = max(2 * batch_size // plan.views, 2 * progress.workers)

    def decode(index: int) -> rendering.Rendered:
        with progress.stage("decode"):
            return rendering.render_views(plans, index)

    futures = rendering.prefetch(pools.decode, decode, rows.indices, window)
    rendered = rendering.usable_pictures(plan, futures, strict, rows.quarantined)
    for batch in rendering.view_batches(rendered, plan.views, batch_size):
        rows.check()
        for task in tasks:
            in_flight = task.pipeline.submit(batch)
            while len(pending) >= IN_FLIGHT:
                pending.popleft().result()
            made = pools.encode.submit(task.encode, in_flight)
            pending.append(pools.write.submit(task.write, made))
        progress.pictures += sum(view == plan.views - 1 for _, view in batch)
        progress.report(progress)
    for future in pending:
        future.result()
    rows.check()
    for task in tasks:
        with progress.stage("write"):
            task.writer.finish(rows.quarantined, task.statistics.summary())
    progress.pictures += len(rows.quarantined)
    progress.report(progress)
