"""Inputs are read from a cache, whose rows are joined with the pictures by key."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from featcache.errors import UsageError, UserError
from featcache.pictures.source import Source
from featcache.reading import join
from featcache.reading.cache import Cache
from featcache.storage import picture_lists
from student import checkpoint
from student.setup import notes
from student.setup.cache_match import MatchedCache
from student.setup.content_match import matched
from student.setup.options import Options, RunRequest
from student.setup.source_choice import check_exif, decoded_source
from student.setup.training_inputs import (
    TrainingInputs,
    refuse,
    refuse_view_options,
    select_views,
)
from student.setup.view_choice import ViewSelection
from student.targets.cached import CachedTargets


def cached_inputs(request: RunRequest, found: MatchedCache, given: Source | None) -> TrainingInputs:
    """Join the pictures with the rows of a cache, and choose the views that are shown."""
    options, cache = request.options, found.cache
    stored = join.stores_pixels(cache) and not options.decode
    _check_options(options, stored)
    lists = lists_of_run(options, cache)
    source = matched(request, cache, _source(options, found, given, stored, lists))
    pictures, rows, skipped = join.join_by_key(cache, source, decodes=not stored)
    notes.say_skipped(request.say, skipped)
    notes.say_left_out(request.say, cache, rows)
    notes.say_cache(request.say, found)
    selection = select_views(request, found, pictures, rows)
    _say_pixels(request, found, source, stored)
    targets = CachedTargets(
        cache,
        found.spec,
        selection.rows,
        tolerance=options.pixel_tolerance,
        tokens=found.tokens,
        stored_pixels=stored,
        schedule=selection.schedule,
    )
    record = cache_record(found, options, selection, stored, lists)
    return TrainingInputs(found.config, source, targets, selection.pictures, record)


def _check_options(options: Options, stored: bool) -> None:
    refuse_view_options(options)
    # these want the teacher: of absent shards, and for the alignment of held-out pictures
    if not options.fallback and options.probe is None:
        refuse({"--weights": options.weights, "--teacher-name": options.teacher_name})
    if stored and options.decoder:
        raise UsageError(
            f"--decoder {options.decoder} is about decoding pictures, and the cache stores pixels: "
            "leave it out, or give --decode with it"
        )


def lists_of_run(options: Options, cache: Cache) -> int:
    """Return how many of a cache's lists of pictures a run has seen: all, but where it is resumed
    and others were appended since. The run goes on as it was begun."""
    total = len(picture_lists.lists(cache.identity))
    if not options.resume or options.out is None or total == 1:
        return total
    try:
        targets = checkpoint.read_config(options.out).get("targets")
    except UserError:  # there is no run yet, or the check of the run folder will say what is wrong
        return total
    identity = targets.get("identity") if isinstance(targets, dict) else None
    earlier = picture_lists.lists_at(cache.identity, identity) if identity else None
    return earlier or total


def _source(
    options: Options, found: MatchedCache, given: Source | None, stored: bool, lists: int
) -> Source:
    """Return the pictures, of a cache's first lists where none are given; where pixels are stored
    nothing of a given source is decoded."""
    check_exif(options, found)
    if not stored:
        return decoded_source(given, found, options, lists)
    return join.StoredPixels(found.cache, lists) if given is None else given


def _say_pixels(request: RunRequest, found: MatchedCache, source: Source, stored: bool) -> None:
    if stored:
        request.say(
            "note: pixels come from the cache, nothing is decoded; --decode decodes the pictures "
            "in place of them"
        )
    elif join.stores_pixels(found.cache):
        request.say(
            f"note: pixels are decoded from {source.spec}, those in the cache are left alone"
        )


def cache_record(
    found: MatchedCache,
    options: Options,
    selection: ViewSelection,
    stored: bool,
    lists: int | None = None,
) -> dict[str, Any]:
    """Return the identity of a cache, as it was with its first lists of pictures (all by default),
    and how it is used, for config.json."""
    cache = found.cache
    lists = lists or len(picture_lists.lists(cache.identity))
    # How the cache is read has no effect on any number, so that a resumed run may change it.
    reading = {
        **asdict(options.reading),
        "tokens": found.tokens or "all",
        "pixels": "stored" if stored else "decoded",
    }
    return {
        "kind": "cached",
        "id": picture_lists.ids(cache.identity)[-lists],
        "identity": picture_lists.before(cache.identity, lists),
        "views": cache.views,
        **selection.record,
        "pixel_tolerance": options.pixel_tolerance,
        "reading": reading,
    }
