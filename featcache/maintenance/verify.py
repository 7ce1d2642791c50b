"""A cache is compared with its manifest: every byte of every file against its checksum.

Nothing here repairs: it names what is wrong, file by file. `recompute` asks the teacher itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from featcache.errors import UnreadableError, UserError, command_line
from featcache.extraction import target_folder
from featcache.reading.cache import Cache
from featcache.storage import (
    codec_state,
    commit,
    index,
    index_build,
    index_file,
    json_file,
    manifest,
    picture_lists,
)
from featcache.storage.files import files_of
from featcache.storage.keys import Keys, read_shard_keys
from featcache.storage.part import added_parts
from featcache.storage.record import RecordCheck, read_record
from featcache.storage.store import QUARANTINE, SHARDS, folder_path, get_store, record_path


class Problem(NamedTuple):
    """Say what is wrong with one file; `shard` where a shard must be extracted again to fix it."""

    path: Path
    text: str
    shard: str | None = None

    def __str__(self) -> str:
        return self.text


def verify_cache(
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    without: Collection[str] = (),
) -> tuple[list[str], int]:
    """Return (problems, shards checked) of a cache and what was added to it: every byte of every
    file against its checksum, but for shards that it is to be read `without`."""
    found: list[str] = []
    shards = 0
    for part in (path, *added_parts(path)):
        about = manifest.read(part)
        problems = list(part_problems(part, about, progress))
        found += [str(problem) for problem in problems if problem.shard not in without]
        # only then: it is compared with all shards
        if not any(problem.shard for problem in problems):
            found += map(str, filter(None, [index_problem(part, about)]))
        shards += len(about["shards"])
    return found or ([] if without else check_parts_agree(path)), shards


def check_parts_agree(path: Path) -> list[str]:
    """Say why files that are sound, each by itself, are not one cache; no repair could choose
    between them."""
    try:
        with Cache(path) as cache:
            for teacher in cache.teachers:  # sound bytes may still be no numbers that are used
                cache.codec_state(teacher, cache.levels_of(teacher))
            # pictures in quarantine too, whose index is not known
            listed = picture_lists.lists(cache.identity)
            if cache.quarantined or not cache.complete or picture_lists.match(listed, cache.keys):
                return []
    except UserError as error:
        return [str(error).removeprefix("cache file ")]  # of which who tells it says so
    return [
        f"cache {str(path)!r}: the keys of its shards are not those of its list of pictures, so "
        "one is of an extraction of others; remove that shard's files and its record, and run "
        "`featcache repair`"
    ]


def part_problems(
    part: Path,
    about: dict[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Problem]:
    """Yield everything that is wrong with one part, file by file."""
    backend, check = about["identity"]["store"], RecordCheck(about)
    for text in manifest.check_files(part, about):
        yield Problem(Path(text.rpartition(": ")[0]), text)
    if name := codec_state.file_name(about):
        copy = part / SHARDS / codec_state.COPY
        if what := codec_state.problem(copy, about["files"][name]):
            yield Problem(copy, f"{copy}: {what}")
    for name, data in target_folder.root_files(about).items():
        if not target_folder.is_written(part / name, data):
            how = (
                f"differs from what {manifest.NAME} says" if (part / name).is_file() else "missing"
            )
            yield Problem(part / name, f"{part / name}: {how}")
    for path in (part / SHARDS / manifest.COPY, part / QUARANTINE):
        wanted = path.name == manifest.COPY or path.is_file() or _lacks_quarantine(part, about)
        if wanted and (damage := json_problem(path)):
            yield Problem(path, damage)
        elif path.name == manifest.COPY and not _is_copy(path, about):
            yield Problem(path, f"{path}: differs from {manifest.NAME}")
        elif path.name == QUARANTINE and path.is_file() and not _is_of_records(path, part, about):
            yield Problem(
                path, f"{path}: does not list the pictures that the records of shards name"
            )
    for done, shard in enumerate(about["shards"], 1):
        record = record_path(part, shard["name"])
        if damage := json_problem(record):
            missing = f"{record}: missing; this shard is not extracted yet, or its record is lost"
            yield Problem(record, damage if record.is_file() else missing, shard["name"])
        else:
            read = json_file.read_json(record)
            if why := check.problem(shard, read):
                yield Problem(record, f"{record}: {why}", shard["name"])
            else:
                yield from _of_files(part, shard["name"], backend, read)
        progress(done, len(about["shards"]))


def index_problem(part: Path, about: dict[str, Any]) -> Problem | None:
    """Say what is wrong with the index of a part whose shards are sound; nothing of one that is
    stale, which nobody reads."""
    found = index.look(part, about)
    path = part / index_file.NAME
    if isinstance(found, index.Unused):
        return Problem(path, f"{path}: {found.why}") if found.is_damaged else None
    if found is None or index_build.build(part).is_written(path):
        return None
    return Problem(path, f"{path}: is not what the records of its shards say")


def index_notes(path: Path) -> list[str]:
    """Say which indices of a cache and of what was added to it are not read."""
    make = command_line("featcache", "index", path)
    found = {part: index.look(part, manifest.read(part)) for part in (path, *added_parts(path))}
    return [
        f"{part / index_file.NAME} is not used, {why.why}; run `{make}`"
        for part, why in found.items()
        if isinstance(why, index.Unused) and not why.is_damaged
    ]


def _of_files(part: Path, shard: str, backend: str, record: dict[str, Any]) -> Iterator[Problem]:
    found = commit.check_shard(part, shard, backend, record, deep=True)
    yield from (Problem(Path(text.rpartition(": ")[0]), text, shard) for text in found)
    if not found:
        path = record_path(part, shard)
        try:
            keys = Keys(*read_shard_keys(get_store(backend), part, record))
        except UserError as error:
            yield Problem(path, f"{path}: {error}", shard)
            return
        if manifest.keys_digest(keys) != record["keys_digest"]:
            yield Problem(path, f"{path}: its keys are not those of the shard's files", shard)
    folder = folder_path(part, shard, backend)
    files_of(folder).drop(f"{folder}/{file}" for file in record["files"])


def _lacks_quarantine(part: Path, about: dict[str, Any]) -> bool:
    """Tell whether quarantine.json is missing although every record is there and one of them has
    something for it."""
    return bool(_quarantined(part, about))


def _is_copy(path: Path, about: dict[str, Any]) -> bool:
    try:
        return manifest.read_file(path) == about
    except UnreadableError:
        raise
    except UserError:  # sound JSON, and no manifest
        return False


def _is_of_records(path: Path, part: Path, about: dict[str, Any]) -> bool:
    rows = _quarantined(part, about)
    return rows is None or (json_file.read_json(path) == {"pictures": rows} and bool(rows))


def _quarantined(part: Path, about: dict[str, Any]) -> list[dict[str, str]] | None:
    """Return what the records say, in order; None where one of them is missing or damaged."""
    rows: list[dict[str, str]] = []
    for shard in about["shards"]:
        try:
            rows += read_record(record_path(part, shard["name"]))["quarantined"]
        except UnreadableError:
            raise
        except UserError:
            return None
    return rows


def json_problem(path: Path) -> str | None:
    """Return what is wrong with a JSON of ours; an UnreadableError where that cannot be said."""
    try:
        json_file.read_json(path)
    except UnreadableError:
        raise
    except UserError as error:
        return str(error)
    return None
