"""What a training run cost, over all of its processes, and the seconds of a teacher that its cache
saved it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from featcache.catalog import costs, ledger
from featcache.catalog.account import chain
from featcache.errors import StoppedError
from featcache.runtime.meter import Counts, from_plain
from student.targets.cached import CachedTargets
from student.targets.fallback import FallbackTargets
from student.training.train import Run


def note_use(run: Run) -> None:
    """Note, as a run begins, which cache it reads, where those look who remove what is unused."""
    if (cached := _cached(run)) is not None:
        about = {"cache_id": run.about.get("id"), "recipe": run.name}
        ledger.log_use(cached.cache.path, **about, run=str(run.out.absolute()))


def gather(acc: Accelerator, own: Counts, error: BaseException | None) -> tuple[Counts, int]:
    """Return what all processes counted, and how many did. After a failure the others may be gone:
    then it is this one's alone."""
    ended = list(chain(error))
    together = not ended or any(isinstance(each, StoppedError) for each in ended)
    if any(isinstance(each, KeyboardInterrupt) for each in ended):  # at once, for this one
        together = False
    if acc.num_processes == 1 or not together:
        return own, 1
    every = [from_plain(each) for each in gather_object([asdict(own)])]
    return sum(every, Counts()), len(every)


def saved(run: Run, counts: Counts) -> dict[str, Any]:
    """Return the views that a run showed, and the seconds that its teachers would have taken for
    them: null where no ledger tells what a view took when the cache was made."""
    facts = {"views_shown": counts.views_shown}
    cached = _cached(run)
    if cached is None:
        return {**facts, "teacher_saved_s": 0.0}
    rates = costs.seconds_per_view(str(run.about.get("id")))
    names = cached_teachers(cached)
    if any(name not in rates for name in names):
        return {**facts, "teacher_saved_s": None}
    computed = counts.teachers.get(cached.cache.teachers[0], (0.0, 0))[1]
    views = dict.fromkeys(names, counts.views_shown)
    if cached.cache.teachers[0] in views:
        views[cached.cache.teachers[0]] -= computed  # by --fallback
    total = sum(max(count, 0) * rates[name] for name, count in views.items())
    return {**facts, "teacher_saved_s": round(total, 6)}


def cached_teachers(targets: CachedTargets) -> set[str]:
    """Return the teachers whose targets a run takes from its cache."""
    own, spec = targets.cache.teachers[0], targets.spec
    others = {field.rpartition("/")[0] for field in spec.fields}
    names = {name for name in others if name}
    if targets.reader is not None or any("/" not in field for field in spec.fields):
        names.add(own)
    return names | ({spec.second} if spec.second else set())


def _cached(run: Run) -> CachedTargets | None:
    match run.targets:
        case CachedTargets():
            return run.targets
        case FallbackTargets():
            return run.targets.cached
    return None
