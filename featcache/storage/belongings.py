"""The files of a cache are told from a stranger's, so that nothing else is ever deleted with it.

A cache is ours when its manifest, or the manifest's copy, reads as extraction writes it. What lies
in it is ours by its name and kind: what the manifest states, shards and their records, leases, and
temporary files of the whole form HOST-PID-NONCE. Links of such names are removed as links, and
never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from featcache.errors import UnreadableError, UserError
from featcache.storage import codec_state, commit, manifest
from featcache.storage.commit import BACKUP_SUFFIX, RECORD
from featcache.storage.index_file import NAME as INDEX
from featcache.storage.owner import split_temporary
from featcache.storage.part import PARTS
from featcache.storage.store import QUARANTINE, SHARDS, get_store


def own_manifest(cache: Path) -> dict[str, Any]:
    """Read the manifest of a cache, or its copy where that alone is sound; UserError where neither
    is."""
    try:
        return manifest.read(cache)
    except UnreadableError:
        raise
    except UserError as error:
        try:
            return manifest.read_file(cache / SHARDS / manifest.COPY)
        except UserError:
            raise error from None


def foreign(cache: Path) -> Iterator[Path]:
    """Yield the files and folders in a cache, or in what was added to it, that are none of its own;
    of a folder that is none, the folder alone. UserError where the cache itself is none."""
    about = own_manifest(cache)
    files = {manifest.NAME, QUARANTINE, INDEX, *about["files"], *_root_files(about, ".")}
    for entry in _entries(cache):
        of = split_temporary(entry.name)
        if entry.is_dir(follow_symlinks=False):
            if entry.name == SHARDS:
                yield from _foreign_in_shards(Path(entry), about)
            elif entry.name == PARTS:
                for each in _entries(Path(entry)):
                    yield from _foreign_in_part(Path(each))
            elif of is not None:  # half removed
                yield from _foreign_in_part(Path(entry))
            else:
                yield Path(entry)
        elif not (
            (entry.is_symlink() and entry.name in (SHARDS, PARTS)) or _is_file_of(files, entry)
        ):
            yield Path(entry)


def _root_files(about: Mapping[str, Any], folder: str) -> set[str]:
    """Return the names of what the store writes into one of the folders above its shards."""
    store = get_store(about["identity"]["store"])
    paths = [Path(name) for name in store.root_files(manifest.shard_form(about))]
    return {path.name for path in paths if str(path.parent) == folder}


def leftovers(cache: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield what dead writers and complete repairs left in a cache, with what is foreign in each:
    only what has nothing foreign may be removed."""
    strangers = list(foreign(cache))
    for path in commit.leftovers(cache):
        yield path, [each for each in strangers if each.is_relative_to(path)]


def _foreign_in_part(path: Path) -> Iterator[Path]:
    if path.is_symlink():
        return
    try:
        yield from foreign(path)
    except UnreadableError:
        raise
    except UserError:  # nothing says that it is ours
        yield path


def _foreign_in_shards(folder: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    names, store = {shard["name"] for shard in about["shards"]}, about["identity"]["store"]
    files = {manifest.COPY, *([codec_state.COPY] if codec_state.needs_state(about) else [])}
    files |= {*(f"{name}{end}" for name in names for end in (".json", ".lease"))}
    files |= {f"{name}.json.{BACKUP_SUFFIX}" for name in names} | _root_files(about, SHARDS)
    folders = {f"{name}.{store}" for name in names}
    for entry in _entries(folder):
        of = split_temporary(entry.name)
        what = of[0] if of is not None else entry.name.removesuffix(f".{BACKUP_SUFFIX}")
        if what in folders:
            yield from foreign_in_shard(Path(entry), store)
        elif not _is_file_of(files, entry):
            yield Path(entry)


def _is_file_of(names: set[str], entry: os.DirEntry[str]) -> bool:
    """Whether this is a file, or a link, of one of these names, or is to become one."""
    of = split_temporary(entry.name)
    known = entry.name in names or (of is not None and of[0][:1] == "." and of[0][1:] in names)
    return known and (entry.is_file(follow_symlinks=False) or entry.is_symlink())


def foreign_in_shard(path: Path, store: str) -> Iterator[Path]:
    """Yield what a store does not write into the folder of a shard; a file in the place of a folder
    is foreign, a link is not."""
    if path.is_symlink():
        return
    if not path.is_dir():
        yield path
        return
    wanted = get_store(store).FILES
    for file in _files_below(path):
        name = file.relative_to(path).as_posix()
        of = split_temporary(file.name)
        if not (wanted.fullmatch(name) or name == RECORD or (of and of[0] == f".{RECORD}")):
            yield file


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder but folders that hold something; links are not followed."""
    for entry in _entries(folder):
        inside = list(_entries(Path(entry))) if entry.is_dir(follow_symlinks=False) else []
        if inside:
            yield from _files_below(Path(entry))
        elif not entry.is_dir(follow_symlinks=False):
            yield Path(entry)


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
