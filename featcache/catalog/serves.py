"""The recipes that a cache can serve are found without importing any of them (they need torch;
`info` must not).

A package of recipes announces itself with the entry point group `featcache.recipes`; each of its
files states with a literal what its default configuration reads, which is parsed and never run:

    SERVED_BY = {"fields": ("features", "attention"), "levels": "last:5", "mask_ratio": 0.7}

`all_tokens`: hidden patches' tokens are read too. `derive`: z, which only a teacher with a
projection gives.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
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


def unsupported_reason(cache: Cache, needs: dict[str, Any]) -> str:
    """Say what the default configuration of a recipe would miss here."""
    if not needs["fields"]:
        return ""
    depth = cache.identity["teacher"]["depth"]
    wanted = _levels(needs["levels"], depth)
    if wanted.start < 1:
        return f"{len(wanted)} levels are aligned, the teacher has {depth} blocks"
    if missing := [level for level in wanted if level not in cache.levels]:
        return f"level {', '.join(map(str, missing))} is not stored (--levels {needs['levels']})"
    patches, keep = cache.identity["teacher"]["patches"], cache.identity.get("keep")
    visible = int(patches * (1 - needs["mask_ratio"]))
    if keep is not None and (keep < visible or needs.get("all_tokens")):
        return f"{keep} patches are kept, " + (
            "all are read" if needs.get("all_tokens") else f"{visible} are visible"
        )
    if fields := [field for field in needs["fields"] if field not in cache.fields]:
        return f"{', '.join(fields)} is not stored"
    if needs.get("derive") == "z" and not _has_projection(cache):
        return "its teacher has no projection (target=f)"
    return "" if cache.complete else "the cache is incomplete"


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
