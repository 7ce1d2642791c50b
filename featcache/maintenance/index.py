"""The indices of a cache and of what was added to it are made, on a user's word."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from featcache.catalog import extract_command
from featcache.errors import UsageError, UserError
from featcache.storage import index_build, manifest
from featcache.storage.files import address, files_of
from featcache.storage.index_file import NAME
from featcache.storage.part import added_parts, describe_part

Progress = Callable[[int, int], None]  # shards that are done, of how many


def run(
    cache: Path, progress: Progress = lambda done, total: None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Make the index of a cache and of every addition that is complete; returns the facts of each,
    and what was left out in words. Raises UsageError for a cache in an object store, and UserError
    where the cache is incomplete or cannot be written to."""
    if files_of(cache.absolute()).may_be_far:
        raise UsageError(
            f"{address(cache)} is in an object store, where a cache is opened by one listing and "
            "by the records that are kept on this machine: an index is of a cache in a folder"
        )
    parts, left = _parts(cache)
    for part in parts:
        index_build.index_path(part)
        _check_writable(part)
    total = sum(len(manifest.read(part)["shards"]) for part in parts)
    done, found = 0, []
    for part in parts:
        built = _write(part, partial(_tell, progress, done, total))
        done += built.facts.shards
        found.append(
            {
                "path": str(part / NAME),
                "part": describe_part(manifest.read(part)),
                "rows": built.facts.rows,
                "shards": built.facts.shards,
                "bytes": (part / NAME).stat().st_size,
            }
        )
    return found, left


def _tell(progress: Progress, before: int, total: int, done: int, of: int) -> None:
    progress(before + done, total)


def _parts(cache: Path) -> tuple[list[Path], list[str]]:
    """Return the parts that are complete, and the additions that are not, in words."""
    left = list(extract_command.unfinished(cache))
    if not _is_complete(cache):
        raise UserError(f"cache {str(cache)!r} has no index until it is complete; {left[0]}")
    parts = [part for part in (cache, *added_parts(cache)) if _is_complete(part)]
    return parts, [str(each) for each in left]


def _is_complete(part: Path) -> bool:
    return index_build.is_complete(part, manifest.read(part))


def _check_writable(part: Path) -> None:
    if not os.access(part, os.W_OK | os.X_OK):
        raise _unwritable(part, os.strerror(errno.EACCES))


def _unwritable(part: Path, why: str) -> UserError:
    return UserError(
        f"{str(part / NAME)!r} cannot be written: {why}; allow writing to {str(part)!r}, or index "
        "a copy of the cache"
    )


def _write(part: Path, progress: Progress) -> index_build.BuiltIndex:
    try:
        return index_build.write(part, progress)
    except OSError as error:
        raise _unwritable(part, str(error.strerror or error)) from error
