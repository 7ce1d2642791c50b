"""The recipes that a cache can serve are found without importing any of them (they need torch;
`info` must not).

A package of recipes announces itself with the entry point group `featcache.recipes`; each of its
files states with a literal what its default configuration reads, which is parsed and never run:

    SERVED_BY = {"fields": ("features", "attention"), "levels": "last:5", "mask_ratio": 0.7}

`all_tokens`: hidden patches' tokens are read too. `derive`: z, which only a teacher with a
projection gives. What else an extraction takes from there is in `recipe_needs`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.reading.cache import Cache

ENTRY_POINT_GROUP = "featcache.recipes"
NEEDS_LITERAL = "SERVED_BY"


def recipe_support(cache: Cache) -> dict[str, str]:
    """Return recipe name -> why this cache does not serve it, empty where it does."""
    return {name: unsupported_reason(cache, needs) for name, needs in sorted(recipe_needs())}


def recipe_needs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every announced recipe and what it states."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        package, *inner = point.value.split(".")
        spec = importlib.util.find_spec(package)  # of a top-level name, which imports nothing
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in Path(folder, *inner).glob("*.py"):
                if needs := read_needs(path):
                    yield path.stem, needs


def read_needs(path: Path) -> dict[str, Any] | None:
    """Read the literal of one file; None where there is none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [
            NEEDS_LITERAL
        ]:
            value = ast.literal_eval(node.value)
            return value if isinstance(value, dict) else None
    return None


@dataclass(frozen=True)
class StoredFacts:
    """Hold the facts of a cache, or of one that is planned, by which it serves a recipe."""

    depth: int  # blocks of its first teacher
    patches: int
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
    wanted = _levels(needs["levels"], stored.depth)
    if wanted.start < 1:
        return f"{len(wanted)} levels are aligned, the teacher has {stored.depth} blocks"
    if missing := [level for level in wanted if level not in stored.levels]:
        return f"level {', '.join(map(str, missing))} is not stored (--levels {needs['levels']})"
    visible = int(stored.patches * (1 - needs["mask_ratio"]))
    if stored.keep is not None and (stored.keep < visible or needs.get("all_tokens")):
        return f"{stored.keep} patches are kept, " + (
            "all are read" if needs.get("all_tokens") else f"{visible} are visible"
        )
    if fields := [field for field in needs["fields"] if field not in stored.fields]:
        return f"{', '.join(fields)} is not stored"
    if needs.get("derive") == "z" and not stored.has_projection():
        return "its teacher has no projection (target=f)"
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
