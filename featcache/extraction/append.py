"""Pictures are appended to a cache: a list of their own, whose shards follow those that are there.

The manifest alone says which lists a cache has, so appending is one replacement of it; the shards
are then extracted as any others, and the same command goes on after a death at any moment. Rows
that were there keep their numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featcache.errors import IdentityError, UserError, counted
from featcache.extraction.plan import ExtractJob, Plan
from featcache.extraction.target_folder import check_disk_space, in_form
from featcache.pictures.patterns import absolute
from featcache.reading.cache import Cache
from featcache.storage import identity, manifest, picture_lists
from featcache.storage import lease as leases
from featcache.storage.files import files_of
from featcache.storage.json_file import digest
from featcache.storage.part import added_parts
from featcache.storage.store import SHARDS

WAIT_S = 0.2  # between looks at a manifest that another process appends to


def plan_append(plan: Plan, out: Path) -> ExtractJob:
    """Return the job that appends a plan's pictures to the cache at `out`, or goes on with that.

    Raises IdentityError where the plan would store other numbers, UserError where a picture is
    there already, or nothing may be appended to this cache.
    """
    there = manifest.read(out)
    _check_kind(out, there)
    plan = in_form(there, plan)
    if not plan.cache_lists and not _is_whole(plan, there):
        plan = _with_new_list(plan, there)
        _check_new(plan.source.keys, out, plan.source.spec)
    _check_same(plan, there, out)
    return ExtractJob(plan, out)


def _is_whole(plan: Plan, there: dict[str, Any]) -> bool:
    """Whether the pictures are those that the cache was made of, and no more."""
    return picture_lists.match(picture_lists.lists(there["identity"]), plan.source.keys)


def _with_new_list(plan: Plan, there: dict[str, Any]) -> Plan:
    before = picture_lists.lists(there["identity"])
    lists = (*before, picture_lists.list_of(plan.source.keys))
    own = range(len(before), len(lists))
    return replace(plan, cache_lists=lists, own_lists=own, is_new_list=True)


def _check_kind(out: Path, there: dict[str, Any]) -> None:
    if "parent" in there["identity"]:
        raise UserError(
            f"--append: cache {str(out)!r} was derived from {there['identity']['parent']}; append "
            "to that one, and derive again"
        )
    if "copied_from" in there["provenance"]:
        raise UserError(
            f"--append: cache {str(out)!r} is a copy of a part of another; append to that one, and "
            "copy again"
        )
    if found := added_parts(out):
        raise UserError(
            f"--append: cache {str(out)!r} has {counted(len(found), 'addition')} (--add), which "
            "would lack the new pictures; append before adding: extract all pictures into a new "
            "cache, --images A::B"
        )


def _check_new(keys: Sequence[str], out: Path, spec: str) -> None:
    """Raise UserError unless all pictures of the cache are known, and none of them is among
    these."""
    with Cache(out) as cache:
        if not cache.complete:
            raise UserError(
                f"--append: cache {str(out)!r} is incomplete, so which pictures it will have is "
                "not known; finish it first, with the command that made it: `featcache info` names "
                "it"
            )
        known = cache.keys.find(keys) >= 0
        left_out = {row["key"] for row in cache.quarantined}
    double = [key for key, is_there in zip(keys, known, strict=True) if is_there or key in left_out]
    if double:
        raise UserError(
            f"--append: {len(double)} of {counted(len(keys), 'picture')} of {spec!r} are in cache "
            f"{str(out)!r} already, the first is {double[0]!r}; new keys are needed: give the new "
            "pictures alone, or rename them"
        )


def _check_same(plan: Plan, there: dict[str, Any], out: Path) -> None:
    """Raise IdentityError where the rows of the new pictures would not be as those that are
    there."""
    ours = plan.manifest()
    for each in identity.compare(ours, there):
        lists = ("identity.pictures.", f"identity.{picture_lists.APPENDED}")
        if each.field.startswith("identity.") and not each.field.startswith(lists):
            raise IdentityError(
                f"--append: {each.field} is {each.here!r}, cache {str(out)!r} has {each.there!r}; "
                f"all its rows are extracted alike: give {each.fix or 'the same'}, or make another "
                "cache"
            )


# ------------------------------------------------------------ the manifest


def begin(job: ExtractJob, waiting: Callable[[], None]) -> None:
    """Write the list of a job's pictures into the manifest of its cache, where it is not there yet.
    One process does so at a time; `waiting` is called once where another has the cache in hand.
    Raises UserError, and writes nothing, where the disk has no room for the new shards."""
    check_disk_space([job])
    first = manifest.read(job.out)["shards"][0]["name"]
    waits = False
    while (lease := leases.acquire(job.out, first)) is None:
        if not waits:
            waiting()
        waits = True
        time.sleep(WAIT_S)
    try:
        files_of(job.out).look(job.out / manifest.NAME)
        _write(job.plan, job.out, manifest.read(job.out))
    finally:
        lease.release()


def _write(plan: Plan, out: Path, there: dict[str, Any]) -> None:
    lists, wanted = picture_lists.lists(there["identity"]), list(plan.lists)
    if wanted[len(lists) :] and wanted[: len(lists)] == lists:
        about = _grown(plan, there)
        manifest.write(out / manifest.NAME, about)
        manifest.write(out / SHARDS / manifest.COPY, about)
    elif lists[: len(wanted)] != wanted:
        raise UserError(
            f"--append: another process appended to cache {str(out)!r} in this moment; run the "
            "same command again once it is done"
        )


def _grown(plan: Plan, there: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest `there` with the lists of a plan."""
    own = {**there["identity"], **picture_lists.fields(plan.lists)}
    sources = there["provenance"].get(picture_lists.SOURCES, [])
    more = {picture_lists.SOURCES: [*sources, absolute(plan.source.spec)]}
    return {
        **there,
        "id": digest(own)[:16],
        "identity": own,
        "provenance": {**there["provenance"], **more},
        "shards": picture_lists.shards(plan.lists, own["rows_per_shard"]),
    }
