"""Notes tell the user, before training, what is unusual about the views and targets of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from featcache.errors import counted
from featcache.reading import join
from featcache.reading.cache import Cache
from featcache.storage import manifest
from student.setup.cache_match import MatchedCache
from student.setup.options import RunRequest, Say


def say_jitter(request: RunRequest) -> None:
    """Say where the colours' jitter was set otherwise than the recipe was published with."""
    recipe = request.recipe
    if any(field.default is dataclasses.MISSING for field in dataclasses.fields(recipe.Config)):
        return  # a recipe of one's own, which nobody has published
    published, jitter = recipe.needs(recipe.Config()).jitter, recipe.needs(request.config).jitter
    if jitter != published:
        request.say(
            f"note: jitter={jitter:g} deviates from the recipe, which was published with "
            f"{published:g}"
        )


def say_cache(say: Say, found: MatchedCache) -> None:
    """Say what the user should know of the cache that serves."""
    about, policy, spec = found.cache.manifest, found.cache.identity["policy"], found.spec
    if manifest.is_random(about) and spec.fields:
        say(f"note: {manifest.title(about, len(found.cache), found.cache.views)}")
    if policy["jitter"] != spec.jitter and spec.fields:
        say(
            f"note: colours jittered by {policy['jitter']:g}; the recipe was published with "
            f"{spec.jitter:g}"
        )
    if found.lossy_codec:
        say(f"note: the cache keeps its levels in codec {found.lossy_codec}, {_loss(found.lossy)}")
    for note in found.notes:
        say(f"note: {note}")
    for part in found.cache.unfinished:
        say(f"note: {part} is not whole, nothing of it is read")


def _loss(about: Mapping[str, Any]) -> str:
    """Say what the codec of a teacher's part loses, as far as it was measured."""
    added = about["provenance"].get("distortion", {}).get("added_loss")
    if not added:
        return "which is lossy"
    return f"which is lossy: at a residual of 0.5 the loss rises by {max(added):.2%}"


def say_skipped(say: Say, skipped: int) -> None:
    """Say how many pictures are in the cache's quarantine."""
    if skipped:
        say(
            f"note: {counted(skipped, 'picture is', 'pictures are')} in the cache's quarantine "
            "and skipped"
        )


def say_left_out(say: Say, cache: Cache, rows: join.I64) -> None:
    """Say how many rows of a cache no training picture was joined with, `rows` (n,) being those of
    the pictures."""
    count, first = join.left_out(cache, rows)
    if count:
        say(
            f"note: {count} of the {counted(len(cache), 'picture')} of the cache are "
            "not among those given, "
            f"and not trained on, the first is {first!r}"
        )
