"""featcache extracts a frozen teacher's features over replayable views once and reads them at
memory speed.

`featcache.open(path)` gives a `Cache`. Importing this package, and reading a cache, needs no torch;
the reader itself is imported when it is first asked for, so that a command answers Ctrl-C from its
first moment on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from featcache.errors import IdentityError, StoppedError, UsageError, UserError

if TYPE_CHECKING:
    from featcache.reading.cache import Cache

__version__ = "0.1.0"
__all__ = ["Cache", "IdentityError", "StoppedError", "UsageError", "UserError", "open"]


def __getattr__(name: str) -> Any:
    if name != "Cache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from featcache.reading.cache import Cache

    return Cache


def open(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    verify_rows: float = 1.0,
    io: str = "auto",
) -> Cache:
    """Open the cache at `path` for reading; the options are those of `Cache`. Files are checked
    here for existence and size, rows as they are read."""
    from featcache.reading.cache import Cache

    return Cache(path, threads=threads, verify_rows=verify_rows, io=io)
