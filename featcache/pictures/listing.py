"""The files below a folder are listed: through links, but no folder within itself, and without
hidden ones."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from featcache.errors import UserError
from featcache.pictures.passed_over import (
    EMPTY,
    HIDDEN,
    NO_FILE,
    NOWHERE,
    UNLISTED,
    UPWARD,
    Tally,
    is_hidden,
)
from featcache.pictures.source import SUFFIXES

_MOST_WAYS = 64  # links that lead to one folder; folders that link to each other would have no end

Identity = tuple[int, int]  # device and number of a folder


class _Folder(NamedTuple):
    path: str
    prefix: str  # its path below the root, with a slash; empty for the root
    above: frozenset[Identity]


@dataclass
class Listing:
    """Hold the files of a folder by kind, as paths below it, and what was passed over."""

    pictures: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


def list_folder(spec: str) -> Listing:
    """List what lies below a folder, in no order. Raises UserError where a part of it cannot be
    listed."""
    found, folders = Listing(), [_Folder(spec, "", frozenset())]
    ways: dict[Identity, int] = {}
    while folders:
        folder = folders.pop()
        try:
            folders.extend(_list_one(folder, found, ways))
        except OSError as error:
            raise UserError(
                f"pictures {spec!r}: {error.filename or folder.path!r} cannot be listed: "
                f"{error.strerror or error}; nothing is left out in silence: make it readable, or "
                "take it out"
            ) from error
    return found


def _list_one(folder: _Folder, found: Listing, ways: dict[Identity, int]) -> Iterator[_Folder]:
    """Sort one folder's files, and yield the folders in it."""
    about = Path(folder.path).stat()
    here = (about.st_dev, about.st_ino)
    if here in folder.above:
        found.tally.add(UPWARD, folder.prefix.rstrip("/"))
        return
    ways[here] = ways.get(here, 0) + 1
    if ways[here] > _MOST_WAYS:
        raise OSError(errno.ELOOP, f"more than {_MOST_WAYS} links lead to it", folder.path)
    with os.scandir(folder.path) as entries:
        is_empty = True
        for entry in entries:
            is_empty = False
            name = folder.prefix + entry.name
            if is_hidden(entry.name):
                _count_hidden(entry, name, found.tally)
            elif _is_folder(entry):
                yield _Folder(entry.path, f"{name}/", folder.above | {here})
            else:
                _sort_file(entry, name, found)
    if is_empty and folder.prefix:
        found.tally.add(EMPTY, folder.prefix.rstrip("/"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether a folder, or a link to one, is there; costs a system call for links alone."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _sort_file(entry: os.DirEntry[str], name: str, found: Listing) -> None:
    # a Path a file would cost as much as all else
    suffix = os.path.splitext(entry.name)[1]  # noqa: PTH122
    is_picture, is_tar = suffix.lower() in SUFFIXES, suffix == ".tar"
    if _is_file(entry):
        kind = found.pictures if is_picture else found.tars if is_tar else found.others
        kind.append(name)
    elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
        found.tally.add(NOWHERE, name)
    elif is_picture or is_tar:
        found.tally.add(NO_FILE, name)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _count_hidden(entry: os.DirEntry[str], name: str, tally: Tally) -> None:
    """Count the pictures that a hidden file is, or a hidden folder holds."""
    if not entry.is_dir(follow_symlinks=False):
        if entry.name.lower().endswith(tuple(SUFFIXES)):
            tally.add(HIDDEN, name)
        return
    cut = len(entry.path) - len(name)
    refused = lambda error: tally.add(UNLISTED, str(error.filename)[cut:])  # noqa: E731
    for path, _, names in os.walk(entry.path, onerror=refused):
        for each in names:
            if each.lower().endswith(tuple(SUFFIXES)):
                tally.add(HIDDEN, f"{path}/{each}"[cut:])
