"""Whole caches, or additions, are removed: renamed first, then deleted, and only where nothing in
them is a stranger's."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from featcache.errors import UserError
from featcache.storage import belongings, json_file, lease, manifest, owner
from featcache.storage.own_folder import linked_folder
from featcache.storage.part import PARTS, added_parts
from featcache.storage.store import SHARDS


def check_removable(cache: Path) -> None:
    """Raise UserError for what must not be removed."""
    if cache.is_symlink():
        raise UserError(f"{str(cache)!r} is a link to {str(cache.resolve())!r}; give that folder")
    if not any((cache / name).is_file() for name in (manifest.NAME, f"{SHARDS}/{manifest.COPY}")):
        raise UserError(
            f"{str(cache)!r} holds no {manifest.NAME}: it is no cache, and is left as it is"
        )
    _check_contents(cache)
    if shards := active_leases(cache):
        raise UserError(
            f"{str(cache)!r} is being written: shard {shards[0].stem} is held; stop that process, "
            "or wait until it has ended"
        )


def _check_contents(cache: Path) -> None:
    """Raise UserError for a folder that cannot be proven to be a cache, and for one that holds what
    featcache did not write."""
    try:
        strangers = list(belongings.foreign(cache))
    except UserError as error:
        raise UserError(
            f"{str(cache)!r} is not known as a cache that featcache wrote, and is left as it is: "
            f"{error}; to remove it all the same, use the tools of your system"
        ) from error
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        shown = ", ".join(repr(str(path.relative_to(cache))) for path in strangers[:3])
        raise UserError(
            f"{str(cache)!r} holds what featcache did not write: {shown}{more}; nothing "
            "is removed; move that away and run the same command again"
        )


def active_leases(cache: Path) -> list[Path]:
    """Return leases of shards that somebody works on, in the cache and what was added to it."""
    return [path for path in lease_paths(cache) if not is_stale_lease(path)]


def lease_paths(cache: Path) -> list[Path]:
    """List the leases in a cache and in what was added to it; what lies behind a link is not in
    it."""
    parts = [part for part in (cache, *added_parts(cache)) if not linked_folder(part)]
    return sorted(path for part in parts for path in (part / SHARDS).glob("*.lease"))


def is_stale_lease(path: Path) -> bool:
    """Tell what `lease.is_held` tells, in a cache that may be read-only too."""
    try:
        return not lease.is_held(path.parent.parent, path.stem)
    except OSError:
        return lease.is_stale(path, time.time())


def folder_bytes(path: Path) -> int:
    """Sum the bytes of all files of a folder, or of one file."""
    return sum(
        each.lstat().st_size
        for each in (path, *path.rglob("*"))
        if not each.is_dir() or each.is_symlink()
    )


def remove_cache(cache: Path) -> None:
    """Rename, then remove. An addition is taken out of parts/ by the rename, where it would still
    be seen. UserError where something was put into it since it was looked at."""
    cache = cache.resolve()
    _check_writable(cache)
    parent = cache.parent.parent if cache.parent.name == PARTS else cache.parent
    gone = parent / f".{cache.name}.{owner.writer_id()}.tmp"
    cache.rename(gone)
    json_file.sync_folder(parent)
    try:
        _check_contents(gone)
    except UserError:
        gone.rename(cache)
        raise
    try:
        delete(gone)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; what is left of {str(cache)!r} lies in "
            f"{str(gone)!r}; allow removing it and remove that folder, or run `featcache gc`"
        ) from error


def delete(cache: Path) -> None:
    """Delete a cache, its manifest last: as long as anything is left, that proves whose it is."""
    for path in sorted(cache.iterdir(), key=lambda path: path.name == manifest.NAME):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    cache.rmdir()


def _check_writable(cache: Path) -> None:
    """Check, before anything is renamed, that every folder may lose what is in it."""
    for folder in (
        cache.parent,
        cache,
        *(path for path in cache.rglob("*") if path.is_dir() and not path.is_symlink()),
    ):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"{str(folder)!r}: permission denied, nothing removed; allow writing to it and run "
                "again"
            )
