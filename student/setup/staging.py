"""A cache in an object store is read by blocks of neighbours, and may have a stage: a folder that
rows are fetched to before the step that reads them."""

from __future__ import annotations

import os

from featcache.errors import UsageError
from featcache.reading.cache import Cache
from featcache.runtime.numbers import is_whole
from featcache.storage.files import files_of
from student.data.read_ahead import FetchAhead
from student.setup.options import Options
from student.targets.cached import CachedTargets
from student.targets.contract import Targets
from student.targets.fallback import FallbackTargets


def by_block(targets: Targets, sampling: str | None) -> bool:
    """Return whether pictures come in blocks: as asked for, else where the cache is far."""
    return sampling == "block" or (sampling is None and _far_cache(targets) is not None)


def stage(targets: Targets, options: Options) -> FetchAhead | None:
    """Give the cache a stage, and return what fills it; None where none is asked for."""
    if options.stage is None:
        if options.stage_limit is not None:
            raise UsageError("--stage-limit is about --stage DIR: give that too, or leave it out")
        return None
    cache = _far_cache(targets)
    if cache is not None and not isinstance(targets, CachedTargets):
        raise UsageError(
            "--stage fetches the rows of all pictures ahead of time, and with --fallback the "
            "teacher makes some: leave one out"
        )
    if cache is None or not isinstance(targets, CachedTargets) or options.resident:
        raise UsageError(
            "--stage is about rows that are read from an object store step by step, and none are "
            "here: leave it out"
        )
    cache.set_stage(options.stage, options.stage_limit, _processes_here())
    return targets.fetch_ahead


def _far_cache(targets: Targets) -> Cache | None:
    cached = targets.cached if isinstance(targets, FallbackTargets) else targets
    if isinstance(cached, CachedTargets) and files_of(cached.cache.path).may_be_far:
        return cached.cache
    return None


def _processes_here() -> int:
    """Return how many processes of the run this machine has, as torchrun, accelerate or Slurm
    say."""
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]  # as in 4(x2)
    told = os.environ.get("LOCAL_WORLD_SIZE", "") or slurm
    return max(int(told), 1) if is_whole(told) else 1
