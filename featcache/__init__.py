"""featcache extracts a frozen teacher's features over replayable views once and reads them at
memory speed.

`featcache.extract(...)` makes a cache as the command does, and `featcache.open(path)` gives a
`Cache`. Importing this package, and reading a cache, needs no torch; what it offers is imported
when it is first asked for, so that a command answers Ctrl-C from its first moment on. Notes go to
the logger "featcache", which says nothing unless a program sets it up.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from featcache.errors import IdentityError, StoppedError, UsageError, UserError

if TYPE_CHECKING:
    from featcache.api.extract import ExtractResult, extract
    from featcache.api.progress import Progress
    from featcache.reading.cache import Cache

__version__ = "0.1.0"
__all__ = [
    "Cache",
    "ExtractResult",
    "IdentityError",
    "Progress",
    "StoppedError",
    "UsageError",
    "UserError",
    "extract",
    "open",
]

_HOMES = {
    "Cache": "featcache.reading.cache",
    "ExtractResult": "featcache.api.extract",
    "Progress": "featcache.api.progress",
    "extract": "featcache.api.extract",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
