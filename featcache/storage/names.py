"""Names that a JSON of a cache gives to files are checked once, where the JSON is read.

A cache may come from anyone, and its names are joined to folders that are written to. What passes
here stays below the folder that it is joined to, on every file system, and is none of the names
that a writer uses for its own (`.NAME.HOST-PID-NONCE.tmp`, `NAME.lease`, `NAME.bad`).
"""

from __future__ import annotations

from functools import lru_cache

_COMPONENT_BYTES = 255  # what file systems take
_DEPTH = 4
_OWN_SUFFIXES = (".tmp", ".lease", ".bad")
_SEPARATORS = '\\:*?"<>|'  # of other systems' paths, drives and patterns


@lru_cache(4096)  # every shard of a cache has the same names
def check_file_name(name: str) -> str:
    """Return a relative POSIX path as it was given. Raises ValueError where it may lead anywhere
    else than to a file below the folder it is joined to.

    >>> check_file_name("features/c.0.1.0.0.0")
    'features/c.0.1.0.0.0'
    >>> check_file_name("../zarr.json")
    Traceback (most recent call last):
    ...
    ValueError: it is no name of a file inside the cache
    """
    components = name.split("/")
    fine = name.isprintable() and len(components) <= _DEPTH and not set(name) & set(_SEPARATORS)
    if not fine or not all(map(_is_component, components)):
        raise ValueError("it is no name of a file inside the cache")
    return name


def _is_component(text: str) -> bool:
    return (
        text not in ("", ".", "..")
        and text == text.strip(" ").rstrip(".")
        and len(text.encode()) <= _COMPONENT_BYTES
        and not text.lower().endswith(_OWN_SUFFIXES)
    )
