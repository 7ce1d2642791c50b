"""A stamp says whether pictures are those of before, without reading one.

It is a digest of their keys and of the size and the times of each file that they lie in: one that
was written again, or changed in place, has other times even where its size is the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from featcache.pictures.source import Source

Told = tuple[int | str, ...]  # of a file: changes when the file does


def told_of_file(path: str) -> Told:
    """Return size and times of a file. Raises OSError where it is gone."""
    found = os.stat(path)  # noqa: PTH116 (a Path a file costs as much as all else)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp_files(
    keys: Iterable[str],
    paths: Iterable[str],
    ranges: npt.NDArray[np.int64] | None = None,
    told: Callable[[str], Told] = told_of_file,
) -> str:
    """Return a digest of pictures by their keys, their files, and where they lie in them (n,...).
    Raises OSError where a file is gone."""
    digest = hashlib.blake2b(digest_size=16)
    for key in keys:
        digest.update(key.encode() + b"\0")
    for path in paths:
        digest.update(f"{os.path.basename(path)} {told(path)};".encode())  # noqa: PTH119
    if ranges is not None:
        digest.update(np.ascontiguousarray(ranges).tobytes())
    return digest.hexdigest()


def stamp(source: Source) -> str:
    """Return the stamp of a source's pictures; empty where the source cannot tell (one of a user's
    own), or a file of it is gone.

    >>> from types import SimpleNamespace
    >>> stamp(SimpleNamespace(keys=["a"]))
    ''
    """
    own = getattr(source, "stamp", None)
    try:
        return str(own(range(len(source)))) if own is not None else ""
    except OSError:
        return ""
