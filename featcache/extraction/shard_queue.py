"""Shards are shared out among processes by leases."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from typing import Any

from featcache.extraction.plan import ExtractJob
from featcache.extraction.progress import ExtractProgress
from featcache.storage import commit
from featcache.storage import lease as leases
from featcache.storage.store import record_path

WAIT_S = 1.0  # between looks at shards that other processes work on
Shard = dict[str, Any]  # name, first, count


def free_shards(
    jobs: Sequence[ExtractJob], shards: Sequence[Shard], progress: ExtractProgress
) -> Generator[tuple[Shard, list[ExtractJob]], None, None]:
    """Shards with the jobs that have no record of them and that nobody else works on; waits for
    those that somebody does, until they are complete or left behind."""
    left = list(shards)
    missing = {shard["name"] for shard in left if unfinished_jobs(jobs, shard)}
    progress.total = progress.total or sum(
        shard["count"] for shard in left if shard["name"] in missing
    )
    while left:
        taken = False
        for shard in list(left):
            name = shard["name"]
            lacking = unfinished_jobs(jobs, shard)
            if not lacking:
                left.remove(shard)
                progress.total -= shard["count"] if name in missing else 0
                for _, out in jobs:
                    leases.clear_stale(out, name)
                continue
            with contextlib.ExitStack() as held:
                free = [job for job in lacking if _take(job, name, held)]
                taken = taken or bool(free)
                free = unfinished_jobs(
                    free, shard
                )  # one may have been finished by another meanwhile, or adopted just now
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


def unfinished_jobs(jobs: Sequence[ExtractJob], shard: Shard) -> list[ExtractJob]:
    return [job for job in jobs if not record_path(job.out, shard["name"]).is_file()]


def _take(job: ExtractJob, shard: str, held: contextlib.ExitStack) -> bool:
    """Whether the lease of a job's shard is ours, until `held` is left."""
    lease = leases.acquire(job.out, shard)
    if lease is None:
        return False
    held.callback(lease.release)
    commit.recover(job.out, job.plan.store, [shard])
    return True
