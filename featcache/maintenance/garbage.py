"""Leftovers of dead processes, caches that no training run used, and kept features that no
evaluation used are found and removed; what may be a stranger's is left, and told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from featcache.catalog import home, kept_features, ledger, listing
from featcache.errors import UserError
from featcache.maintenance import remove, remove_features
from featcache.storage import belongings, lease
from featcache.storage.owner import is_abandoned, split_temporary
from featcache.storage.part import added_parts

_DAY_S = 86400.0


@dataclass
class Garbage:
    """Hold what was found; `left` says of a file or folder why it is not removed."""

    leftovers: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)
    left: dict[Path, str] = field(default_factory=dict)


def find(unused_days: float | None) -> Garbage:
    """Find files and folders that no live process works on, and, unless `unused_days` is None,
    complete caches that no training run in the ledger used, untouched for so many days, and
    features that no evaluation used."""
    found = Garbage()
    half = [path for path in _entries(home.home()) if split_temporary(path.name)]
    for path in half:
        if path.is_dir() and not path.is_symlink() and is_abandoned(path):
            _add(found, path, _strangers_in_removed(path))
    for cache in home.caches():
        try:
            for path, strangers in _leftovers_of(cache):
                _add(found, path, strangers)
        except UserError as error:  # nothing says that it is ours, nor whose files are in it
            found.left[cache] = str(error)
        except OSError as error:  # somebody else's folder
            found.left[cache] = f"{error.filename}: {error.strerror}"
    for path, strangers in remove_features.leftovers():
        _add(found, path, strangers)
    if unused_days is not None and (unreadable := ledger.problem()):
        found.left[unreadable[0]] = unreadable[1]
    elif unused_days is not None:
        found.unused = list(_unused_caches(unused_days, found.left))
    if unused_days is not None:
        found.unused += remove_features.unused(unused_days)
    return found


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _add(found: Garbage, path: Path, strangers: list[Path]) -> None:
    if strangers:
        names = ", ".join(repr(str(each.relative_to(path.parent))) for each in strangers[:3])
        found.left[path] = f"featcache did not write {names}"
    else:
        found.leftovers.append(path)


def _strangers_in_removed(path: Path) -> list[Path]:
    """What is foreign in a half-removed cache, or in a half-removed addition to one; an empty
    folder of our name is the very last of it."""
    if not any(path.iterdir()):
        return []
    try:
        return list(belongings.foreign(path))
    except UserError:  # nothing says that it was a cache
        return [path]


def _leftovers_of(cache: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield leftovers in a cache, and what is foreign in each."""
    for part in (cache, *added_parts(cache)):
        yield from belongings.leftovers(part)
    for path in remove.lease_paths(cache):
        if lease.is_of_writer(path) and remove.is_stale_lease(path):
            yield path, []


def _unused_caches(days: float, left: dict[Path, str]) -> Iterator[Path]:
    last_uses = ledger.last_uses()
    for cache in home.caches():
        facts = listing.describe(cache, last_uses)
        if "damaged" in facts:
            left[cache] = facts["damaged"]
        complete = facts.get("shards") == facts.get("shards_complete") and facts.get(
            "parts"
        ) == facts.get("parts_complete")
        if "damaged" in facts or not complete or facts["last_used"] or cache.is_symlink():
            continue
        newest = max(path.lstat().st_mtime for path in cache.rglob("*") if path.is_file())
        if time.time() - newest <= days * _DAY_S:
            continue
        try:
            remove.check_removable(cache)
        except UserError as error:  # somebody works on it, or has files of his own in it
            left[cache] = str(error)
        else:
            yield cache


def remove_leftovers(paths: list[Path]) -> None:
    """Remove leftovers that are still leftovers: since they were listed, another process may have
    removed one or taken a lease over."""
    for path in set(find(None).leftovers) & set(paths):
        with contextlib.suppress(OSError):  # what cannot be removed is told
            if path.parent.name == kept_features.FOLDER:
                remove_features.delete(path)
            elif path.is_dir():
                remove.delete(path)
            else:
                path.unlink(missing_ok=True)
