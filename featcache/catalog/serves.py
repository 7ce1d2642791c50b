"""A cache is compared with what recipes state that they read: whom it can serve.

`all_tokens`: hidden patches' tokens are read too. `derive`: z, which only a teacher with a
projection gives. What else an extraction takes from there is in `recipe_needs`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from featcache.catalog import recipe_needs
from featcache.errors import UserError, counted, listed
from featcache.reading.cache import Cache
from featcache.views import patch_grid


def recipe_support(cache: Cache) -> dict[str, str]:
    """Return recipe name -> why this cache does not serve it, empty where it does."""
    found = {}
    for name, needs in sorted(recipe_needs.installed().items()):
        if isinstance(needs, UserError):
            found[name] = str(needs).removeprefix(f"--for {name}: ")
        else:
            found[name] = unsupported_reason(cache, needs.literal)
    return found


@dataclass(frozen=True)
class StoredFacts:
    """Hold the facts of a cache, or of one that is planned, by which it serves a recipe."""

    depth: int  # blocks of its first teacher
    patches: int
    size: int  # pixels of a view, a side
    input_px: int | None  # of the teacher's own input
    keep: int | None  # patches stored of a view; None: all
    levels: Collection[int]
    fields: Collection[str]
    has_projection: Callable[[], bool]


def unsupported_reason(cache: Cache, needs: dict[str, Any]) -> str:
    """Say what the default configuration of a recipe would miss here."""
    teacher = cache.identity["teacher"]
    stored = StoredFacts(
        depth=teacher["depth"],
        patches=teacher["patches"],
        size=cache.identity["policy"]["size"],
        input_px=teacher.get("input_px"),
        keep=cache.identity.get("keep"),
        levels=cache.levels,
        fields=cache.fields,
        has_projection=lambda: _has_projection(cache),
    )
    if reason := lacking(stored, needs):
        return reason
    return "the cache is incomplete" if needs["fields"] and not cache.complete else ""


def lacking(stored: StoredFacts, needs: dict[str, Any]) -> str:
    """Say what is not stored of what a recipe needs; empty where all is."""
    if not needs["fields"]:
        return ""
    if misfit := patch_grid.misfit(stored.size, stored.patches, stored.input_px):
        return misfit
    wanted = _levels(needs["levels"], stored.depth)
    if wanted.start < 1:
        return (
            f"{counted(len(wanted), 'level is', 'levels are')} aligned, the teacher "
            f"has {counted(stored.depth, 'block')}"
        )
    if missing := [level for level in wanted if level not in stored.levels]:
        absent = listed(missing, "level {} is", "levels {} are")
        return f"{absent} not stored (--levels {needs['levels']})"
    visible = int(stored.patches * (1 - needs["mask_ratio"]))
    if stored.keep is not None and (stored.keep < visible or needs.get("all_tokens")):
        return f"{counted(stored.keep, 'patch is', 'patches are')} kept, " + (
            "all are read" if needs.get("all_tokens") else f"{visible} are visible"
        )
    if fields := [field for field in needs["fields"] if field not in stored.fields]:
        return listed(fields, "{} is not stored", "{} are not stored")
    if needs.get("derive") == "z" and not stored.has_projection():
        return "its teacher has no projection (student train --set target=f)"
    return ""


def _has_projection(cache: Cache) -> bool:
    """Return whether the teacher's projection is beside the cache."""
    try:
        return bool(cache.manifest["files"]) and "proj" in cache.tail()
    except UserError:  # a damaged file, of which `verify` tells
        return False


def _levels(text: str, depth: int) -> range:
    """'last:5' of a teacher of so many blocks."""
    count = int(text.removeprefix("last:")) if text else 0
    return range(depth - count + 1, depth + 1)
