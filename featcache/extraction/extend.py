"""Views, levels or another teacher's arrays are added to a cache without rewriting it.

What is added is a part: an extraction of its own below `CACHE/parts/`, over the same pictures,
crops and shards, so that row i is row i everywhere. A cache stays rectangular: every level of a
teacher is there for every view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcache.errors import UsageError, UserError, counted
from featcache.extraction.options import file_name
from featcache.extraction.plan import ExtractJob, Plan
from featcache.extraction.target_folder import existing_manifest, in_form_of
from featcache.models import tokenizer
from featcache.reading.cache import Cache
from featcache.storage import identity, json_file, manifest
from featcache.storage.part import (
    ADDABLE_FIELDS,
    PARTS,
    TEACHER_FIELDS,
    Part,
    added_parts,
    describe_part,
)

# Pixels are stored by the parts of the cache's own views, or by none.
_FREE = tuple(field for field in ADDABLE_FIELDS if field != "identity.pixels")


def plan_jobs(plans: Sequence[Plan], out: Path, *, add: bool) -> list[ExtractJob]:
    """Return plans over the same views as jobs of one pass. Without `add` the first is the cache at
    `out` itself, and the others are what `add` would make of them once it is complete."""
    if add:
        jobs = plan_parts(plans, out)
        if len({job.plan.view_numbers for job in jobs}) > 1:
            raise UsageError(
                f"--add: {', '.join(_views(job.plan) for job in jobs)} are lacking in "
                f"{str(out)!r}; one pass adds the same views of every teacher: add to one teacher "
                "after the other, in several commands"
            )
        return jobs
    base, *others = (in_form_of(out, plan) for plan in plans)
    if base.is_tokenizer:
        raise UsageError(
            f"--teacher {base.teacher.name}: discrete tokens are added to a cache of features: "
            "give a teacher first, or --add --out CACHE"
        )
    if existing_manifest(base.manifest(), out):
        with Cache(out) as cache:
            complete = cache.complete
        if complete:
            return [ExtractJob(base, out), *plan_parts(others, out)]
    return [ExtractJob(base, out), *(_job(_beside(each, base.views), out) for each in others)]


def _views(plan: Plan) -> str:
    return f"views {plan.view_numbers.start} to {plan.view_numbers.stop - 1} of {plan.teacher.name}"


def plan_part(wanted: Plan, out: Path) -> ExtractJob | None:
    """Return what a cache lacks of a plan, and the folder it goes to; None where nothing lacks."""
    return next(iter(plan_parts([wanted], out)), None)


def plan_parts(wanted: Sequence[Plan], out: Path) -> list[ExtractJob]:
    """Do the same for several plans, without those that lack nothing."""
    with Cache(out) as cache:
        if "parent" in cache.identity:
            raise UserError(
                f"--add: cache {str(out)!r} was derived from {cache.identity['parent']}; add to "
                "that one, and derive again"
            )
        if not cache.complete:
            raise UserError(
                f"--add: cache {str(out)!r} is incomplete; finish it first, with the command that "
                "made it"
            )
        jobs = [_job(part, out) for each in wanted if (part := _part(each, cache)) is not None]
    # by one pass, perhaps, with others beside them
    begun = all((job.out / manifest.NAME).is_file() for job in jobs)
    for path in [] if begun else added_parts(out):
        if path not in {job.out for job in jobs} and not Part(path).complete:
            raise UserError(
                f"--add: an addition is unfinished, {describe_part(manifest.read(path))}; finish "
                f"it, or remove {path}"
            )
    return jobs


def _part(wanted: Plan, cache: Cache) -> Plan | None:
    base = cache.identity
    pixels = wanted.pixels or "pixels" in base
    wanted = replace(wanted, rows_per_shard=base["rows_per_shard"], pixels=pixels)
    wanted = _own(in_form_of(cache.path, wanted))
    name = wanted.teacher.name
    _check_same(
        wanted,
        cache.manifest,
        _FREE if name == base["teacher"]["name"] else (*_FREE, *TEACHER_FIELDS),
    )
    if name in cache.teachers[1:]:
        _check_same(replace(wanted, pixels=False), cache.manifest_of(name), _FREE)
    return _lacking(wanted, cache)


def _job(part: Plan, out: Path) -> ExtractJob:
    return ExtractJob(
        part,
        out
        / PARTS
        / f"{file_name(part.teacher.name)}-{json_file.digest(part.manifest()['identity'])[:8]}",
    )


def _own(plan: Plan) -> Plan:
    """Drop what a tokenizer has nothing of, so that its part is the same whatever was said for
    features."""
    if not plan.is_tokenizer:
        return plan
    return replace(
        plan, levels=tokenizer.LEVELS, order="uniform", codec="fp16", tokens="raster", keep=None
    )


def _beside(wanted: Plan, views: int) -> Plan:
    """Plan a teacher that is new to a cache: over all its views, whose pixels are stored
    already."""
    return replace(_own(wanted), views=views, first_view=0, pixels=False)


def _check_same(wanted: Plan, there: dict[str, Any], free: tuple[str, ...]) -> None:
    for each in identity.compare(wanted.manifest(), there):
        if each.field.startswith("identity.") and not each.field.startswith(free):
            raise UsageError(
                f"--add: {each.field} is {each.here!r}, the cache has {each.there!r}; what is "
                "added is drawn from the same pictures and crops, with the same weights: give "
                f"{each.fix or 'the same'}, or make another cache"
            )


def _lacking(wanted: Plan, cache: Cache) -> Plan | None:
    """Plan new levels over all views of the teacher, or new views with all its levels, or a teacher
    that is new here.

    The cache's own teacher has as many views as are asked for; another has those of the cache.
    """
    name, first = wanted.teacher.name, cache.teachers[0]
    if name not in cache.teachers:
        return _beside(wanted, cache.views)
    stored, views = cache.levels_of(name), cache.views_of(name)
    levels = tuple(level for level in wanted.levels if level not in stored)
    more = (wanted.views if name == first else cache.views) - views
    if levels and more > 0 and name == first:
        raise UsageError(
            f"--add: {counted(views, 'view is', 'views are')} stored and levels "
            f"{list(stored)}; add levels "
            f"({','.join(map(str, levels))}) and views ({wanted.views}) one after the other, in "
            "two commands"
        )
    if levels:
        return replace(wanted, levels=levels, views=views, pixels=False)
    if more > 0:
        return replace(
            wanted,
            levels=stored,
            views=more,
            first_view=views,
            pixels=wanted.pixels and name == first,
        )
    return None
