"""A cache that was begun keeps its shards where `--rows-per-shard` is left to its choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.catalog import home
from featcache.errors import UserError
from featcache.storage import manifest

if TYPE_CHECKING:
    from featcache.extraction.plan import Plan


def with_shards(plans: Sequence[Plan], out: Path | None) -> list[Plan]:
    """Return plans of one pass with the shards of the cache at `out` or, where none is named, of
    the one below home that differs in nothing else; of a new one with those that its sizes choose.
    """
    from featcache.extraction.shard_rows import with_auto_rows, with_rows

    chosen = with_auto_rows(plans)
    if out is not None:
        begun = (out / manifest.NAME).is_file()
        return with_rows(chosen, _rows(manifest.read(out))) if begun else chosen
    wanted = chosen[0].manifest()
    found = {_rows(each) for each in _same_but_for_shards(wanted)}
    if not found or _rows(wanted) in found:
        return chosen
    return with_rows(chosen, min(found))


def _same_but_for_shards(wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifests below home of caches with this identity, but for their shards."""
    found = []
    for path in home.caches():
        try:
            about = manifest.read(path)
        except (UserError, OSError):  # damaged: `featcache ls` says so
            continue
        if _but_for_shards(about) == _but_for_shards(wanted):
            found.append(about)
    return found


def _rows(about: Mapping[str, Any]) -> int:
    return int(about["identity"]["rows_per_shard"])


def _but_for_shards(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about["identity"].items() if key != "rows_per_shard"}
