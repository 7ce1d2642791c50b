"""Leftovers of dead processes, and caches that no training run used, are found and removed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from featcache.catalog import home, listing
from featcache.maintenance import remove
from featcache.storage import commit
from featcache.storage.part import added_parts

_DAY_S = 86400.0


def leftovers() -> Iterator[Path]:
    """Yield files and folders that no live process works on, each once."""
    found = [path for path in home.home().glob(".*.tmp") if commit.is_abandoned(path)]
    for cache in home.caches():
        for part in (cache, *added_parts(cache)):
            found += commit.leftovers(part)
        found += [path for path in remove.lease_paths(cache) if remove.is_stale_lease(path)]
    yield from sorted(set(found))


def unused_caches(days: float) -> Iterator[Path]:
    """Yield complete caches that no training run in the ledger used, untouched for so many days."""
    for cache in home.caches():
        facts = listing.describe(cache)
        complete = facts.get("shards") == facts.get("shards_complete") and facts.get(
            "parts"
        ) == facts.get("parts_complete")
        if (
            "damaged" in facts
            or not complete
            or facts["last_used"]
            or cache.is_symlink()
            or remove.active_leases(cache)
        ):
            continue
        newest = max(path.lstat().st_mtime for path in cache.rglob("*") if path.is_file())
        if time.time() - newest > days * _DAY_S:
            yield cache


def remove_leftover(path: Path) -> None:
    """Remove a leftover; what is gone in the meantime, another process removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
