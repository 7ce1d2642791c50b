"""Inputs are read from a cache without some of its shards, and the teacher computes what is absent
(`--fallback online`).

Pixels are decoded for all pictures, though the cache may store some. n training pictures.
"""

from __future__ import annotations

from featcache.errors import UsageError, command_line, counted
from featcache.pictures.source import Source
from featcache.reading import join
from featcache.reading.cache import Cache
from student.setup import notes
from student.setup.cache_match import MatchedCache
from student.setup.cached_inputs import cache_record
from student.setup.options import RunRequest
from student.setup.teacher_choice import load_teacher
from student.setup.training_inputs import (
    I64,
    TrainingInputs,
    refuse_view_options,
    select_views,
)
from student.setup.view_choice import ViewSelection
from student.targets import fallback
from student.targets.cached import CachedTargets
from student.targets.fallback import FallbackTargets
from student.targets.online import OnlineTargets


def fallback_inputs(request: RunRequest, found: MatchedCache, source: Source) -> TrainingInputs:
    """Join the pictures with the rows that are there, and load the teacher for the others."""
    options, cache = request.options, found.cache
    refuse_view_options(options)
    fallback.check_spec(found.spec)
    limit = fallback.LIMIT if options.fallback_limit is None else options.fallback_limit
    pictures, rows, skipped = fallback.join(cache, source, limit)
    notes.say_skipped(request.say, skipped)
    notes.say_left_out(request.say, cache, rows)
    notes.say_cache(request.say, found)
    selection = select_views(request, found, pictures[rows >= 0], rows[rows >= 0])
    _check_all_views(cache, selection)
    absent = int((rows < 0).sum())
    _say_absent(request, found, source, absent, len(rows), limit)
    targets = _targets(request, found, rows)
    record = cache_record(found, options, selection, stored=False)
    record["reading"] |= {"fallback": {"shards": list(cache.absent), "pictures": absent}}
    return TrainingInputs(found.config, source, targets, pictures, record)


def _check_all_views(cache: Cache, selection: ViewSelection) -> None:
    if selection.schedule is not None:
        raise UsageError(
            "--fallback online shows all views, and of this cache some are shown, not known for "
            "absent shards: leave it out and run "
            f"`{command_line('featcache', 'repair', cache.path)}`, or show all "
            f"with --scale {_scale(cache)}"
        )


def _scale(cache: Cache) -> str:
    """The range of a cache's crops, as --scale takes it."""
    return ",".join(f"{end:g}" for end in cache.identity["policy"]["scale"])


def _say_absent(
    request: RunRequest, found: MatchedCache, source: Source, absent: int, n: int, limit: float
) -> None:
    request.say(
        f"note: {fallback.absent_text(found.cache)}: the teacher computes the targets of {absent} "
        f"of {counted(n, 'picture')} ({absent / n:.4g}, allowed {limit:g}), whose "
        "pixels nothing can be "
        "compared with"
    )
    if join.stores_pixels(found.cache):
        request.say(
            f"note: pixels are decoded from {source.spec}, those in the cache are left alone"
        )


def _targets(request: RunRequest, found: MatchedCache, rows: I64) -> FallbackTargets:
    """rows (n,) -> targets of the cache, and of the teacher as the cache's would be."""
    cache, spec = found.cache, found.spec
    teacher = load_teacher(request, found) if spec.fields else None
    cached = CachedTargets(
        cache, spec, rows, tolerance=request.options.pixel_tolerance, tokens=found.tokens
    )
    online = OnlineTargets(
        cached.policy, spec, teacher, cache.views, cache.identity["order"], stored_as=cached.reader
    )
    return FallbackTargets(cached, online)
