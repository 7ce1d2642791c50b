"""Leases share out shards among processes: one loop for whatever makes shards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from featcache.storage import commit
from featcache.storage import lease as leases
from featcache.storage.files import files_of
from featcache.storage.store import record_path

WAIT_S = 1.0  # between looks at shards that other processes work on


class ShardJob(Protocol):
    """A job makes the shards of one folder."""

    @property
    def out(self) -> Path: ...
    @property
    def store(self) -> str: ...


Job = TypeVar("Job", bound=ShardJob)


def lacks_record(job: ShardJob, shard: str, *, leased: bool) -> bool:
    """Return whether a shard is still to be made; under its lease, what a dead writer left of it
    is adopted or removed first."""
    if leased:
        commit.recover(job.out, job.store, [shard])
        files_of(job.out).look(record_path(job.out, shard))
    return not record_path(job.out, shard).is_file()


def free_shards(
    jobs: Sequence[Job],
    shards: Sequence[str],
    waiting: Callable[[int], None],
    *,
    lacks: Callable[..., bool] = lacks_record,
    recount: Callable[[str, int], None] = lambda shard, times: None,
) -> Generator[tuple[str, list[Job]], None, None]:
    """Yield each shard with the jobs that lack it, under their leases.

    `lacks(job, shard, leased=...)` is asked without the lease, and again with it, since another
    process may have finished the shard in between. While others hold all that is left,
    `waiting(n)` is called with the number of shards, until they are complete or left behind. Some
    jobs of a shard may be free and others not: it then comes again. `recount(shard, times)` tells
    that it will be yielded once more (1) or not at all (-1).
    """
    try:
        yield from _looks(jobs, list(shards), waiting, lacks, recount)
    except BaseException:  # an interrupt may fall between a lease and what releases it
        for job in jobs:
            leases.abort(job.out)
        raise


def _looks(
    jobs: Sequence[Job],
    left: list[str],
    waiting: Callable[[int], None],
    lacks: Callable[..., bool],
    recount: Callable[[str, int], None],
) -> Generator[tuple[str, list[Job]], None, None]:
    while left:
        taken = False
        for shard in list(left):
            lacking = [job for job in jobs if lacks(job, shard, leased=False)]
            with contextlib.ExitStack() as held:
                ours = [job for job in lacking if _take(job, shard, held)]
                free = [job for job in ours if lacks(job, shard, leased=True)]
                taken = taken or bool(ours)
                if complete := len(ours) == len(lacking):
                    left.remove(shard)
                if complete != bool(free):
                    recount(shard, -1 if complete else 1)
                if free:
                    yield shard, free
            for job in jobs if complete else ():
                leases.clear_stale(job.out, shard)
        if left and not taken:
            waiting(len(left))
            time.sleep(WAIT_S)


def _take(job: ShardJob, shard: str, held: contextlib.ExitStack) -> bool:
    """Acquire the lease of a job's shard until `held` is left; False while another has it."""
    lease = leases.acquire(job.out, shard)
    if lease is None:
        return False
    held.callback(lease.release)
    return True
