"""A source of pictures is opened by its spec: a folder, webdataset tars, or an FFCV `.beton`.

A source gives every picture a key (its path below the source without the last suffix), bytes at
random access, and labels where there are any. The decoder of the bytes is chosen by
`views.pixel_path`.
"""

from __future__ import annotations

import os
from pathlib import Path

from featcache.pictures.folder import open_folder
from featcache.pictures.source import Source, check_keys
from featcache.pictures.tars import expand_patterns, open_tars


def open_source(spec: str | os.PathLike[str]) -> Source:
    """Open the pictures at `spec`. Raises UserError when there are none, or when two pictures have
    one key."""
    text = os.fspath(spec)
    path = Path(text)
    if is_beton(text):
        from featcache.pictures import beton

        source: Source = beton.open_beton(text)
    else:
        source = (
            open_folder(text, path) if path.is_dir() else open_tars(text, expand_patterns(text))
        )
    check_keys(source)
    return source


def is_beton(text: str) -> bool:
    """Return whether a spec names an FFCV file."""
    return text.endswith(".beton") and not Path(text).is_dir()
