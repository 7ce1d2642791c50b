"""A shard becomes visible by two renames, whatever store wrote it, so that a death at any moment
loses this shard at most.

A writer's folder is published by one rename, its record by a second; the record lies inside the
folder until then, so a folder that nobody finished publishing proves itself, byte by byte, to the
next process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import IdentityError, UnreadableError, UserError, raise_if_unreadable
from featcache.runtime.meter import meter
from featcache.storage import json_file, manifest, schema
from featcache.storage.files import files_of
from featcache.storage.own_folder import linked_folder, own_shards
from featcache.storage.owner import is_abandoned, is_own, split_temporary, writer_id
from featcache.storage.record import read_record
from featcache.storage.store import SHARDS, STORES, folder_path, get_store, record_path

RECORD = "record.json"
BACKUP_SUFFIX = "bad"  # of a shard that a repair has backed up
_READ_BYTES = 8 << 20


def begin_shard(cache: Path, shard: str, name: str) -> Path:
    """Make a new folder for one writer of a shard in the store `name`."""
    folder = own_shards(cache) / f"{shard}.{name}.{writer_id()}.tmp"
    try:
        # no parents: a cache that was moved away meanwhile must not come back as a stump
        folder.mkdir()
    except FileNotFoundError as error:
        raise cache_gone_error(cache) from error
    return folder


def cache_gone_error(cache: Path) -> UserError:
    return UserError(
        f"{str(cache / SHARDS)!r} is gone: the cache was moved or removed while it was written to; "
        "complete shards are where it is now, and the same command with its new path continues"
    )


def make_record(
    shard: str,
    keys: Sequence[str],
    quarantined: Sequence[Mapping[str, str]],
    files: Mapping[str, Mapping[str, Any]],
    statistics: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the record that every store writes of a shard."""
    return {
        "shard": shard,
        "rows": len(keys),
        "keys_digest": manifest.keys_digest(keys),
        "quarantined": [dict(row) for row in quarantined],
        "files": {name: dict(facts) for name, facts in files.items()},
        "statistics": {name: dict(facts) for name, facts in statistics.items()},
    }


def publish(folder: Path, cache: Path, shard: str, name: str, record: dict[str, Any]) -> None:
    """Publish a shard by two renames; the loser of a race removes its own work. The files' contents
    have been synced before."""
    # so that a shard of another cache is not taken for one of this
    if (cache / manifest.NAME).is_file():
        record["content"] = manifest.content_of(cache)
    refuse_other_views(cache, shard, record)
    json_file.write_json(folder / RECORD, record)
    for directory in sorted({path.parent for path in folder.rglob("*")}):
        json_file.sync_folder(directory)
    final = folder_path(cache, shard, name)
    if not files_of(folder).publish(folder, final, record_path(cache, shard)):
        try:
            folder.rename(final)
        except OSError:
            if not final.is_dir():
                raise
            remove_path(folder)
        _publish_record(cache, shard, name)
    meter.count("bytes_written", sum(facts["bytes"] for facts in record["files"].values()))


def refuse_other_views(cache: Path, shard: str, record: Mapping[str, Any]) -> None:
    """Raise IdentityError for a shard that is made again, and whose crops or hashes of pixels would
    change: they depend on the pictures alone, and other pictures under the same keys have
    others."""
    try:
        there = read_record(backup_path(record_path(cache, shard)))["files"]
    except UnreadableError:
        raise
    except UserError:  # it is made for the first time, or its old record is damaged
        return
    here = record["files"]
    of_views = [name for name in here if name.startswith(("pixel_hash/c", "crop/c"))]
    if changed := [name for name in of_views if name in there and here[name] != there[name]]:
        raise IdentityError(
            f"cannot repair {str(cache)!r}: the pictures given are not those of the extraction "
            f"({changed[0]} of shard {shard} would change); give those with --images SRC"
        )


def _publish_record(cache: Path, shard: str, name: str) -> None:
    folder = folder_path(cache, shard, name)
    if folder.is_symlink():
        raise UserError(f"{str(folder)!r} is a link; remove it and run the same command again")
    try:
        (folder / RECORD).rename(record_path(cache, shard))
    except FileNotFoundError:
        if not record_path(cache, shard).is_file():  # else another process was a moment faster
            raise
    json_file.sync_folder(cache / SHARDS)


def recover(cache: Path, name: str, shards: Iterable[str]) -> None:
    """Clean up what dead writers left of shards: a folder without a record is adopted when its own
    record proves every byte, and removed otherwise; unfinished folders are removed."""
    wanted = set(shards)
    shards_folder = own_shards(cache)
    # names, not Paths: this is done for each shard, among all that there are
    names = os.listdir(shards_folder) if shards_folder.is_dir() else []  # noqa: PTH208
    for name_here in sorted(each for each in names if each.partition(".")[0] in wanted):
        path = shards_folder / name_here
        shard, _, rest = name_here.partition(".")
        of = split_temporary(name_here)
        if of is not None and of[0] == f"{shard}.{name}" and is_abandoned(path):
            remove_path(path)
        elif rest == name and not record_path(cache, shard).is_file():
            _adopt(cache, shard, name)


def _adopt(cache: Path, shard: str, name: str) -> None:
    folder = folder_path(cache, shard, name)
    # of what lies behind a link nothing is taken
    record = None if folder.is_symlink() else _inner_record(folder)
    # Only now: a record that left the folder in the meantime was moved here by the process that
    # wrote it.
    if record_path(cache, shard).is_file():
        return
    if record is not None and not check_shard(cache, shard, name, record, deep=True):
        _publish_record(cache, shard, name)
    else:
        remove_path(folder)


def abort(cache: Path) -> None:
    """Remove what this process has unfinished in a cache: an interrupt may fall between any two
    lines."""
    if linked_folder(cache) or not (cache / SHARDS).is_dir():
        return
    for path in (cache / SHARDS).iterdir():
        of = split_temporary(path.name)
        if of is not None and is_own(of[1]):
            remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _inner_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json_file.read_json(folder / RECORD)
        schema.check(schema.ShardFiles, record, folder / RECORD, json_file.advice(folder / RECORD))
        return record
    except UserError:  # missing or damaged: nothing proves the bytes
        return None


def check_shard(
    cache: Path, shard: str, name: str, record: Mapping[str, Any], *, deep: bool
) -> list[str]:
    """List the problems of a shard's files: missing or of another size; with `deep`, any changed
    byte."""
    problems, folder = [], str(folder_path(cache, shard, name))
    place = files_of(folder)
    if deep:  # as they are now
        place.drop(f"{folder}/{file}" for file in record["files"])
        place.bring(f"{folder}/{file}" for file in record["files"])
    is_intact = get_store(name).is_intact
    for file, facts in record["files"].items():
        path = f"{folder}/{file}"  # text, not Path: a cache of ImageNet has 40,000 files to look at
        try:
            size = place.size(path)
            good = not deep or size != facts["bytes"] or is_intact(Path(path), facts)
        except OSError as error:
            raise_if_unreadable(path, error)
            problems.append(
                f"{path}: missing"
                if isinstance(error, FileNotFoundError)
                else f"{path}: {error.strerror}"
            )
            continue
        if size != facts["bytes"]:
            problems.append(f"{path}: {size} bytes, {facts['bytes']} recorded")
        elif not good:
            problems.append(f"{path}: checksum differs")
    return problems


def file_crc(path: Path, count: int) -> int:
    """Compute the crc32c of the first `count` bytes of a file, or of all there are."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while count and (data := file.read(min(count, _READ_BYTES))):
            crc, count = crc32c(data, crc), count - len(data)
    return crc


# ------------------------------------------------------------ what a repair does to a shard


def move_to_backup(cache: Path, shard: str, name: str) -> None:
    """Rename a shard's files and record out of sight, where `restore_backup` finds them."""
    own_shards(cache)
    present = [
        path
        for path in (record_path(cache, shard), folder_path(cache, shard, name))
        if path.exists()
    ]
    # what an earlier repair backed up has been replaced since
    if record_path(cache, shard) in present:
        remove_backup(cache, shard, name)
    for path in present:
        if backup_path(path).is_dir():  # `path` is a replacement that was never finished
            remove_path(path)
        else:
            path.rename(backup_path(path))
    files_of(cache).changed(record_path(cache, shard))
    if (cache / SHARDS).is_dir():
        json_file.sync_folder(cache / SHARDS)


def restore_backup(cache: Path, shard: str, name: str) -> None:
    """Undo `move_to_backup`, unless a new shard is complete."""
    own_shards(cache)
    if record_path(cache, shard).is_file():
        remove_backup(cache, shard, name)
        return
    for path in (folder_path(cache, shard, name), record_path(cache, shard)):
        if backup_path(path).exists():
            if path.is_dir():
                remove_path(path)
            backup_path(path).rename(path)
    files_of(cache).changed(record_path(cache, shard))


def remove_backup(cache: Path, shard: str, name: str) -> None:
    """Remove the backup of a shard."""
    own_shards(cache)
    backup_path(record_path(cache, shard)).unlink(missing_ok=True)
    remove_path(backup_path(folder_path(cache, shard, name)))


def backup_path(path: Path) -> Path:
    """Return the path under which a repair keeps what it replaces."""
    return path.with_name(f"{path.name}.{BACKUP_SUFFIX}")


def leftovers(cache: Path) -> Iterator[Path]:
    """Yield temporary files of dead writers, and backups of shards whose replacement is
    complete."""
    for folder in (cache, own_shards(cache)):
        yield from (
            path
            for path in folder.glob("*.tmp")
            if split_temporary(path.name) and not path.is_symlink() and is_abandoned(path)
        )
    for path in (cache / SHARDS).glob(f"*.{BACKUP_SUFFIX}"):
        shard, _, kind = path.name.removesuffix(f".{BACKUP_SUFFIX}").partition(".")
        if kind in ("json", *STORES) and record_path(cache, shard).is_file():
            yield path
