"""Kept features are removed as caches are: renamed first, then deleted, and only where nothing in
their folder is a stranger's."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from featcache.catalog import kept_features
from featcache.errors import UserError
from featcache.storage import json_file
from featcache.storage.owner import is_abandoned, split_temporary, writer_id

_ID = re.compile(r"[0-9a-f]{32}")
_DAY_S = 86400.0
_SOME_BYTES = 1 << 20  # of about.json that is looked at: a few hundred are written


def is_kept(path: Path) -> bool:
    """Tell whether a folder is one of kept features, whole or damaged, by its name, the folder it
    lies in, and what its about.json says."""
    about = path / kept_features.ABOUT
    if path.is_symlink() or about.is_symlink() or not about.is_file():
        return False
    if not _ID.fullmatch(path.name) or path.resolve().parent.name != kept_features.FOLDER:
        return False
    try:
        with about.open("rb") as file:
            return f'"{kept_features.KIND}"'.encode() in file.read(_SOME_BYTES)
    except OSError:
        return False


def check_removable(path: Path) -> None:
    """Raise UserError for a folder that holds what featcache did not write."""
    if strangers := kept_features.foreign(path):
        raise UserError(
            f"{str(path)!r} holds what featcache did not write: {strangers[0].name!r}; nothing is "
            "removed; move that away and run the same command again"
        )


def remove(path: Path) -> None:
    """Remove kept features. Raises UserError where something else lies in their folder."""
    check_removable(path)
    gone = path.parent / f".{path.name}.{writer_id()}.tmp"
    path.rename(gone)
    json_file.sync_folder(gone.parent)
    delete(gone)


def delete(folder: Path) -> None:
    """Delete our own files of a folder, and the folder where nothing else is in it."""
    for name in (kept_features.DATA, kept_features.ABOUT):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def leftovers() -> Iterator[tuple[Path, list[Path]]]:
    """Yield what dead processes left of features that were being written or removed, and what is a
    stranger's in each."""
    top = kept_features.folder()
    if top.is_symlink() or not top.is_dir():
        return
    for path in sorted(top.iterdir()):
        split = split_temporary(path.name)
        if not split or not _ID.fullmatch(split[0].removeprefix(".")):
            continue
        if path.is_dir() and not path.is_symlink() and is_abandoned(path):
            yield path, kept_features.foreign(path)


def unused(days: float) -> Iterator[Path]:
    """Yield kept features that no evaluation used for so many days."""
    for path in kept_features.items():
        used = (path / kept_features.ABOUT).stat().st_mtime
        if is_kept(path) and not kept_features.foreign(path) and time.time() - used > days * _DAY_S:
            yield path
