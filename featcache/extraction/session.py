"""A session extracts the shards that it is told, one after the other: the part of an engine that
works beside the teacher.

Who asks decides which shard comes next. Leases still guard a shard against writers that are not
asked by the same one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from featcache.extraction.extract import (
    RunOptions,
    ThreadPools,
    begin_all,
    check_pictures,
    undone_on_failure,
    write_shard,
)
from featcache.extraction.picture_check import StoredViews, stored_views
from featcache.extraction.plan import ExtractJob
from featcache.extraction.progress import ExtractProgress
from featcache.extraction.shard_queue import free_shards
from featcache.extraction.target_folder import check_disk_space, in_form_of
from featcache.storage.part import cache_root

# it was extracted; it is there already; another writer holds its lease
Outcome = Literal["done", "there", "held"]


class _HeldError(Exception):
    """Another writer holds the shard that is asked for."""


@dataclass(frozen=True)
class ExtractSession:
    """Holds jobs whose folders are begun, and what their pictures are compared with."""

    jobs: list[ExtractJob]
    wanted: dict[str, Any]  # the manifest of the first
    options: RunOptions
    stored: StoredViews | None
    _open: contextlib.ExitStack

    @classmethod
    def begin(cls, jobs: Sequence[ExtractJob], options: RunOptions) -> ExtractSession:
        """Begin the folders, or continue those that are there, as `run_jobs` does."""
        jobs = [ExtractJob(in_form_of(job.out, job.plan), job.out) for job in jobs]
        if len(jobs) > 1:
            check_disk_space(jobs)
        begun = begin_all(jobs, options)
        jobs, wanted = [job for job, _ in begun], begun[0][1]
        check_pictures(jobs, jobs[0].plan.shards)
        stack = contextlib.ExitStack()
        folders = [job.out for job in jobs]
        stored = stack.enter_context(stored_views(folders, cache_root(jobs[0].out)))
        return cls(jobs, wanted, options, stored, stack)

    def extract(self, name: str, progress: ExtractProgress) -> Outcome:
        """Extract one shard of all jobs that lack it, unless another writer works on it."""
        options = replace(self.options, progress=progress)
        shard = next(each for each in self.jobs[0].plan.shards if each["name"] == name)
        outcome: Outcome = "there"
        try:
            with (
                undone_on_failure(self.jobs, self.wanted),
                ThreadPools(options.workers) as pools,
                contextlib.closing(free_shards(self.jobs, [name], _refuse)) as free,
            ):
                for _, lacking in free:
                    write_shard(lacking, shard, options, pools, self.stored)
                    outcome = "done"
        except _HeldError:
            return "held"
        finally:
            self.options.kept.clear()  # what was rendered as the folders were begun
        return outcome

    def close(self) -> None:
        self._open.close()


def _refuse(shards: int) -> None:
    raise _HeldError
