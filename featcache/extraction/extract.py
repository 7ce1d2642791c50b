"""Extraction runs once from pictures to shards: views -> teacher -> targets -> codec -> shard.

Stages overlap: threads decode and render, the caller's copies pixels over and runs the teacher, one
thread encodes, one writes. Batches are made of views in (picture, view) order, never
cross a shard, and the last one of a shard is padded, so that a real network sees the same batches
whenever it is run again. Several plans over the same views are one pass: each picture is decoded
once, and what a plan writes is what it would write alone.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import codec_sample, device_pipeline, rendering
from featcache.extraction import rows as item_rows
from featcache.extraction.layout import checked_token_ids
from featcache.extraction.picture_check import (
    StoredViews,
    check_same_pictures,
    stored_views,
)
from featcache.extraction.plan import ExtractJob, Plan
from featcache.extraction.progress import ExtractProgress
from featcache.extraction.shard_queue import free_shards, lacks_record
from featcache.extraction.target_folder import (
    check_disk_space,
    disk_full_error,
    in_form_of,
    prepare_folder,
    report_quarantine,
)
from featcache.models import tokenizer
from featcache.storage import checksums, commit, index_build, manifest
from featcache.storage.part import cache_root, previous_record
from featcache.storage.statistics import FeatureStatistics, Statistics, stored_feature_statistics
from featcache.storage.store import ShardWriter, get_store

Shard = dict[str, Any]  # name, first, count
IN_FLIGHT = 2  # batches that the teacher is done with and that are not written yet


def run(plan: Plan, out: Path, **options: Any) -> dict[str, Any]:
    """Extract what is missing of the cache at `out`; returns its manifest. Options are those of
    `run_jobs`."""
    return run_jobs([ExtractJob(plan, out)], **options)[0]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Say how an extraction runs; the options change at most the last bits of numbers."""

    batch_size: int = 64
    workers: int = 2
    strict: bool = False  # a picture that cannot be used is an error
    progress: ExtractProgress = field(default_factory=ExtractProgress)
    # pictures that are rendered already, by their numbers
    kept: dict[int, rendering.Rendered] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 1:
            raise UsageError(
                f"--batch-size {self.batch_size}, --workers {self.workers}: at least 1 is needed"
            )
        self.progress.workers = self.workers


def run_jobs(
    jobs: Sequence[ExtractJob],
    *,
    batch_size: int = 64,
    workers: int = 2,
    strict: bool = False,
    progress: ExtractProgress | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]]:
    """Extract what is missing of each job, which share pictures, policy, views and shards; returns
    their manifests. Killed at any moment, the next call continues; several processes may work on
    one cache at once. `share` (i, n) takes only shards i, i + n, ... A picture that cannot be used
    is quarantined, or a UserError with `strict`."""
    progress = progress or ExtractProgress()
    options = RunOptions(batch_size=batch_size, workers=workers, strict=strict, progress=progress)
    jobs = [ExtractJob(in_form_of(job.out, job.plan), job.out) for job in jobs]
    if len(jobs) > 1:
        check_disk_space(jobs)
    begun = begin_all(jobs, options)
    jobs, wanted = [job for job, _ in begun], [about for _, about in begun]
    with undone_on_failure(jobs, wanted[0]):
        _extract_missing(jobs, jobs[0].plan.shards[share[0] :: share[1]], options)
    for job, each in zip(jobs, wanted, strict=True):
        report_quarantine(job.out, each)
        index_build.update(job.out)
    return wanted


def begin_all(
    jobs: Sequence[ExtractJob], options: RunOptions
) -> list[tuple[ExtractJob, dict[str, Any]]]:
    try:
        return list(_begin(jobs, options))
    except OSError as error:
        folders = {job.out: job.plan.manifest() for job in jobs}
        if full := disk_full_error(error, folders):
            raise full from error
        raise


def _begin(
    jobs: Sequence[ExtractJob], options: RunOptions
) -> Iterator[tuple[ExtractJob, dict[str, Any]]]:
    """Begin the folders of the jobs, one after the other, since a cache is there before what is
    added to it. Yield each with the state of its codec, which is made where there is none yet, and
    its manifest. The pictures that are looked at for it are kept, and not decoded again."""
    with ThreadPools(options.workers) as pools:
        for job in jobs:
            views = partial(_first_batches, jobs, job, options, pools)
            ready = codec_sample.begin_codec(job, options.batch_size, views, options.progress)
            yield ready, prepare_folder(*ready, options.batch_size)


def _first_batches(
    jobs: Sequence[ExtractJob], job: ExtractJob, options: RunOptions, pools: ThreadPools
) -> Iterator[item_rows.Batch]:
    """Yield the batches that a job's rows will be made of, from the first; those of other pictures
    than the rows that are there are an error here too."""
    plans = [each.plan for each in jobs]
    with stored_views([job.out], cache_root(job.out)) as stored:
        for shard in job.plan.shards:
            rows = _Rows(jobs, shard, stored)
            for batch in _batches(plans, rows, options, pools, keep=True):
                rows.check(batch)
                yield batch
            rows.check([])


def extract_shard(
    job: ExtractJob, shard: Shard, wanted: dict[str, Any], options: RunOptions
) -> None:
    """Extract one shard of the cache that has the manifest `wanted`. The caller holds the shard's
    lease, and has compared the plan with the manifest."""
    with undone_on_failure([job], wanted), ThreadPools(options.workers) as pools:
        write_shard([job], shard, options, pools)


@contextlib.contextmanager
def undone_on_failure(jobs: Sequence[ExtractJob], wanted: dict[str, Any]) -> Iterator[None]:
    """Remove what is unfinished when the work fails or is stopped; a full disk and a cache that is
    gone are a UserError."""
    out = jobs[0].out
    try:
        yield
    except BaseException as error:
        for job in jobs:
            commit.abort(job.out)
        if full := disk_full_error(error, {out: wanted}):
            raise full from error
        if isinstance(error, FileNotFoundError) and not (out / manifest.NAME).is_file():
            raise commit.cache_gone_error(out) from error
        raise


def _extract_missing(
    jobs: Sequence[ExtractJob], shards: Sequence[Shard], options: RunOptions
) -> None:
    """Extract those of the shards that lack a record and that nobody else works on."""
    by_name = {shard["name"]: shard for shard in shards}
    for job in jobs:
        commit.recover(job.out, job.store, by_name)
    recount = _count_pictures(jobs, shards, options.progress)
    check_pictures(jobs, shards)
    queue = free_shards(jobs, list(by_name), options.progress.waiting, recount=recount)
    with (
        stored_views([job.out for job in jobs], cache_root(jobs[0].out)) as stored,
        ThreadPools(options.workers) as pools,
        contextlib.closing(queue) as free,
    ):
        for name, lacking in free:
            write_shard(lacking, by_name[name], options, pools, stored)


def _count_pictures(
    jobs: Sequence[ExtractJob], shards: Sequence[Shard], progress: ExtractProgress
) -> Callable[[str, int], None]:
    """Set the total to the pictures of the shards that are missing; returns what corrects it."""
    missing = {
        shard["name"]: shard["count"] for shard in shards if any(lacks(job, shard) for job in jobs)
    }
    progress.total = progress.total or sum(missing.values())
    progress.there = sum(shard["count"] for shard in shards) - progress.total

    def recount(shard: str, times: int) -> None:
        progress.total += times * missing.get(shard, 0)
        progress.there -= times * missing.get(shard, 0)

    return recount


def check_pictures(jobs: Sequence[ExtractJob], shards: Sequence[Shard]) -> None:
    """Raise IdentityError where rows are to be added to those of other pictures."""
    count = sum(shard["count"] for shard in shards if any(lacks(job, shard) for job in jobs))
    if count:
        plan = jobs[0].plan
        check_same_pictures(plan.source, cache_root(jobs[0].out), count, first=plan.first_picture)


def lacks(job: ExtractJob, shard: Shard) -> bool:
    return lacks_record(job, shard["name"], leased=False)


class ThreadPools(contextlib.ExitStack):
    """Hold the threads: many that decode, one that encodes, one that writes."""

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
    """Encode and write one job's batches of a shard."""

    def __init__(self, plan: Plan, writer: ShardWriter, options: RunOptions) -> None:
        self.plan, self.writer, self.progress = plan, writer, options.progress
        self.pipeline = device_pipeline.DevicePipeline(plan, options.batch_size, options.progress)
        self.statistics = Statistics()

    def encode(self, in_flight: device_pipeline.InFlight) -> tuple[list[str], item_rows.Host]:
        """Return keys and items of a batch; batches come in order, one at a time."""
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
            return {tokenizer.FIELD: ids, **item_rows.view_items(plan, batch)}, FeatureStatistics(
                0.0, 0.0, ids[:0].astype("f4")
            )
        answer = item_rows.check_encoded(plan, batch, host)
        items = item_rows.batch_items(plan, batch, answer)
        of_stored = plan.keep is not None or plan.recount or bool(plan.state)
        return items, stored_feature_statistics(
            plan.codec, plan.teacher.width, items, plan.state
        ) if of_stored else answer.about

    def write(self, made: Future[tuple[list[str], item_rows.Host]]) -> None:
        keys, items = made.result()
        with self.progress.stage("write"):
            self.writer.append(keys, items)


def write_shard(
    jobs: Sequence[ExtractJob],
    shard: Shard,
    options: RunOptions,
    pools: ThreadPools,
    stored: StoredViews | None = None,
) -> None:
    tasks: list[ShardWriterTask] = []
    try:
        for job in jobs:
            writer = get_store(job.store).writer(
                job.out, shard["name"], job.plan.arrays, job.plan.views, job.plan.form
            )
            tasks.append(ShardWriterTask(job.plan, writer, options))
        _run_tasks(tasks, _Rows(jobs, shard, stored), options, pools)
    except BaseException:
        pools.stop()
        for task in tasks:
            task.writer.discard()
        raise


class _Rows:
    """Decide which pictures of a shard have a row. Where parts beside this one, or the shard that
    is replaced, have decided it already, theirs are the rows, since row i is row i everywhere."""

    def __init__(
        self, jobs: Sequence[ExtractJob], shard: Shard, stored: StoredViews | None
    ) -> None:
        self.stored, self._first_view = stored, jobs[0].plan.first_view
        self._rows = stored.rows(shard["name"]) if stored else {}
        plan = jobs[0].plan
        first = shard["first"] - plan.first_picture
        keys, numbers = plan.source.keys, range(first, first + shard["count"])
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

    def check(self, batch: item_rows.Batch) -> None:
        """Raise UserError where a picture that had a row can no longer be used: it would move every
        later row; IdentityError where the views of a batch are of other pictures than the rows."""
        if self.stored:
            self.stored.check(batch, self._rows, self._first_view)
        for row in self.quarantined if self.decided else []:
            if row not in self._before:
                raise UserError(
                    f"picture {row['key']!r} has a row in {str(self.decided)!r} and cannot be used "
                    f"now: {row['reason']}; fix it and run the same command again"
                )


def _run_tasks(
    tasks: Sequence[ShardWriterTask], rows: _Rows, options: RunOptions, pools: ThreadPools
) -> None:
    """Decode, copy and teacher here, encoding and writing each in its thread, in the order of
    batches and tasks."""
    progress, views = options.progress, tasks[0].plan.views
    pending: deque[Future[None]] = deque()
    for batch in _batches([task.plan for task in tasks], rows, options, pools):
        rows.check(batch)
        for task in tasks:
            in_flight = task.pipeline.submit(batch)
            while len(pending) >= IN_FLIGHT:
                pending.popleft().result()
            made = pools.encode.submit(task.encode, in_flight)
            pending.append(pools.write.submit(task.write, made))
        last = [picture for picture, view in batch if view == views - 1]
        progress.pictures += len(last)
        progress.exif_ignored += sum(picture.ignores_exif for picture in last)
        progress.report(progress)
    for future in pending:
        future.result()
    rows.check([])
    for task in tasks:
        with progress.stage("write"):
            task.writer.finish(rows.quarantined, task.statistics.summary())
    progress.pictures += len(rows.quarantined)
    progress.report(progress)


def _batches(
    plans: Sequence[Plan],
    rows: _Rows,
    options: RunOptions,
    pools: ThreadPools,
    *,
    keep: bool = False,
) -> Iterator[item_rows.Batch]:
    """Decode and render a shard's pictures in threads; those that cannot be used are quarantined.
    With `keep` they are kept for a later call, which takes them."""

    def decode(index: int) -> rendering.Rendered:
        with options.progress.stage("decode"):
            found = options.kept.get(index) or rendering.render_views(plans, index)
            if keep:
                options.kept[index] = found
            else:
                options.kept.pop(index, None)
            return found

    plan, window = plans[0], max(2 * options.batch_size // plans[0].views, 2 * options.workers)
    futures = rendering.prefetch(pools.decode, decode, rows.indices, window)
    rendered = rendering.usable_pictures(plan, futures, options.strict, rows.quarantined)
    return rendering.view_batches(rendered, plan.views, options.batch_size)
