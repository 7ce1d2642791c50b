"""Adding to a cache without rewriting it: more views, more levels, or a second teacher's arrays for the same pictures.

What is added is a part: an extraction of its own below `CACHE/parts/`, over the same pictures, crops and shards, so
that row i is row i everywhere. A cache stays rectangular: every level of a teacher is there for every view of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from featcache import manifest
from featcache.errors import UsageError, UserError
from featcache.part import FREE, OF_TEACHER, PARTS, Part, added, describe
from featcache.plan import Plan, file_name
from featcache.reader import Cache

# Pixels are stored by the parts of the cache's own views, or by none.
_FREE = tuple(field for field in FREE if field != "identity.pixels")


def plan_part(wanted: Plan, out: Path) -> tuple[Plan, Path] | None:
    """From the plan as asked for to what is lacking of it, and the folder it goes to; None where nothing lacks."""
    with Cache(out) as cache:
        if not cache.complete:
            raise UserError(f"--add: cache {str(out)!r} is incomplete; finish it first, with the command that made it")
        base = cache.identity
        wanted = replace(wanted, rows_per_shard=base["rows_per_shard"], pixels=wanted.pixels or "pixels" in base)
        name = wanted.teacher.name
        _check_same(wanted, cache.manifest, _FREE if name == base["teacher"]["name"] else (*_FREE, *OF_TEACHER))
        if name in cache.teachers[1:]:
            _check_same(replace(wanted, pixels=False), cache.manifest_of(name), _FREE)
        part = _lacking(wanted, cache)
    if part is None:
        return None
    folder = out / PARTS / f"{file_name(name)}-{manifest.digest(part.manifest()['identity'])[:8]}"
    for path in added(out):
        if path != folder and not Part(path).complete:
            raise UserError(
                f"--add: an addition is unfinished, {describe(manifest.read(path))}; finish it, or remove {path}"
            )
    return part, folder


def _check_same(wanted: Plan, there: dict[str, Any], free: tuple[str, ...]) -> None:
    for each in manifest.compare(wanted.manifest(), there):
        if each.field.startswith("identity.") and not each.field.startswith(free):
            raise UsageError(
                f"--add: {each.field} is {each.here!r}, the cache has {each.there!r}; what is added is drawn from the "
                f"same pictures and crops, with the same weights: give {each.cure or 'the same'}, or make another cache"
            )


def _lacking(wanted: Plan, cache: Cache) -> Plan | None:
    """New levels over all views of the teacher, or new views with all its levels, or a teacher that is new here.

    The cache's own teacher has as many views as are asked for; another has those of the cache.
    """
    name, first = wanted.teacher.name, cache.teachers[0]
    if name not in cache.teachers:
        return replace(wanted, views=cache.views, pixels=False)
    stored, views = cache.levels_of(name), cache.views_of(name)
    levels = tuple(level for level in wanted.levels if level not in stored)
    more = (wanted.views if name == first else cache.views) - views
    if levels and more > 0 and name == first:
        raise UsageError(
            f"--add: {views} views are stored and levels {list(stored)}; add levels ({','.join(map(str, levels))}) and "
            f"views ({wanted.views}) one after the other, in two commands"
        )
    if levels:
        return replace(wanted, levels=levels, views=views, pixels=False)
    if more > 0:
        return replace(wanted, levels=stored, views=more, first_view=views, pixels=wanted.pixels and name == first)
    return None
