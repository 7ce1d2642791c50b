"""A source of pictures is opened by its spec: a folder, webdataset tars, or an FFCV `.beton`.

A source gives every picture a key (its path below the source without the last suffix), bytes at
random access, and labels where there are any. The decoder of the bytes is chosen by
`views.pixel_path`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from featcache.pictures import passed_over
from featcache.pictures.folder import open_folder
from featcache.pictures.patterns import expand_patterns, file_mode, literal_path
from featcache.pictures.source import Source, check_keys
from featcache.pictures.tars import open_tars


def open_source(spec: str | os.PathLike[str]) -> Source:
    """Open the pictures at `spec`. Raises UserError when there are none, or when two pictures have
    one key. What is passed over is noted in a line."""
    text = literal_path(os.fspath(spec))
    if is_beton(text):
        from featcache.pictures import beton

        source: Source = beton.open_beton(text)
    else:
        is_folder = stat.S_ISDIR(file_mode(text))
        source = (
            open_folder(text, Path(text)) if is_folder else open_tars(text, expand_patterns(text))
        )
    check_keys(source)
    passed_over.log(source)
    return source


def _open_folder_or_tars(text: str) -> Source:
    if stat.S_ISDIR(file_mode(text)):
        return open_folder(text, Path(text))
    return open_tars(text, expand_patterns(text))


def is_beton(text: str) -> bool:
    """Return whether a spec names an FFCV file."""
    return text.endswith(".beton") and not stat.S_ISDIR(file_mode(text))
