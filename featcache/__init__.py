"""featcache: a frozen teacher's features over replayable views, extracted once, read at memory speed.

`featcache.open(path)` gives a `Cache`. Importing this package, and reading a cache, needs no torch.
"""

from __future__ import annotations

import os

from featcache.errors import IdentityError, UsageError, UserError
from featcache.reader import Cache

__version__ = "0.1.0"
__all__ = ["Cache", "IdentityError", "UsageError", "UserError", "open"]


def open(
    path: str | os.PathLike[str], *, threads: int | None = None, verify_rows: float = 1.0, io: str = "auto"
) -> Cache:
    """Open the cache at `path` for reading; the options are those of `Cache`. Files are checked here for existence and
    size, rows as they are read."""
    return Cache(path, threads=threads, verify_rows=verify_rows, io=io)
