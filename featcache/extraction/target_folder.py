"""The folder that is written to is begun, continued or refused, for extractions and transfers.

Nothing here needs torch: a copy starts without it.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import UserError, command_line, counted
from featcache.storage import codec_state, commit, identity, json_file, manifest, picture_lists
from featcache.storage.files import files_of
from featcache.storage.own_folder import own_shards
from featcache.storage.record import read_record
from featcache.storage.store import QUARANTINE, get_store, record_path

if TYPE_CHECKING:
    from featcache.extraction.plan import ExtractJob, Plan

_LOG = logging.getLogger(__name__)
_SPARE_BYTES = 64 << 20  # what a disk should keep beyond the cache


@dataclass(frozen=True)
class Wording:
    """Hold the words of messages that differ between commands."""

    option: str  # what names the folder, as in `--out 'c'`
    other_cache: str  # what to do where the folder holds another cache
    other_form: str  # what to do where it is the same cache, written otherwise
    smaller: str  # what to do where the disk is too small
    show_fixes: bool  # whether the options of `featcache extract` lead to the cache that is there


EXTRACT = Wording(
    option="--out ",
    other_cache="these options continue the cache that is there, another --out makes a new one, "
    "--add adds to this one",
    other_form="give another folder",
    smaller="fewer --views or --levels, or another disk",
    show_fixes=True,
)


def in_form_of(cache: Path, plan: Plan) -> Plan:
    """Return the plan in the format of the cache at `cache`, where one is there: a cache is
    continued and added to as it was begun."""
    if not (cache / manifest.NAME).is_file():
        return plan
    return in_form(manifest.read(cache), plan)


def in_form(there: Mapping[str, Any], plan: Plan) -> Plan:
    """Return the plan in the form of the cache that has the manifest `there`: format, whether it
    keeps digests of files, and its lists of pictures where the plan's are some of them."""
    plan = replace(
        plan,
        format=there["format"],
        compression=there.get("compression", ""),
        file_digests="file_digest" in there["arrays"],
    )
    lists = picture_lists.lists(there["identity"])
    found = None if len(lists) == 1 else picture_lists.find_run(lists, plan.source.keys)
    if found is None:
        return plan
    return replace(plan, cache_lists=tuple(lists), own_lists=found)


def prepare_folder(plan: Plan, out: Path, batch_size: int) -> dict[str, Any]:
    """Make the folder, or check that the cache in it is the same one; returns its manifest. The
    batch size is noted in it, since real networks give other bits at another."""
    wanted = plan.manifest()
    wanted["provenance"]["batch_size"] = batch_size
    wanted = existing_manifest(wanted, out) or wanted
    check_space(out, _missing_bytes(plan, out), EXTRACT, _shard_bytes(plan))
    begin_folder(out, wanted, plan.side_files())
    return wanted


def recorded_batch_size(about: Mapping[str, Any], default: int) -> int:
    """Return the batch size that a cache was begun with; the default, with a note, where its
    manifest records none."""
    size: int | None = about["provenance"].get("batch_size")
    if size is not None:
        return size
    _LOG.warning(
        "the cache records no batch size, %d is taken: real networks may give other last bits",
        default,
    )
    return default


def existing_manifest(
    wanted: dict[str, Any], out: Path, words: Wording = EXTRACT
) -> dict[str, Any] | None:
    """Return the manifest of the cache at `out` where it is the wanted one, None where nothing is
    there; another cache and other files are refused."""
    if not (out / manifest.NAME).is_file():
        if not _holds_files(out, wanted):
            return None
        if not (out / manifest.NAME).is_file():  # else another process began it in this moment
            raise UserError(
                f"{words.option}{str(out)!r} exists and is no cache; give an empty or new folder"
            )
    there = manifest.read(out)
    what, grades = f"{str(out)!r} holds another cache", ("fatal", "lossy", "layout")
    identity.refuse_mismatch(
        wanted, there, what, words.other_cache, grades, show_fixes=words.show_fixes
    )
    if _form(wanted) != _form(there):
        raise UserError(
            f"{words.option}{str(out)!r} holds the same cache as {_form(there)}, not as "
            f"{_form(wanted)}; {words.other_form}"
        )
    # they follow from the identity, unless somebody changed them
    for field in ("arrays", "shards"):
        if wanted[field] != there[field]:
            raise UserError(
                f"{words.option}{str(out)!r} holds a cache whose {field} are not those of its "
                "identity; give an empty or new folder"
            )
    return there


def _form(about: Mapping[str, Any]) -> str:
    """Describe how a cache's shards are written."""
    archive = "an archive, " if "compression" in about else ""
    return f"{archive}format {about['format']}"


def _holds_files(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Tell whether something is there that a cache may not be written over; the state of a codec,
    which is there before the manifest, is looked at by who takes it."""
    if files_of(out).holds_others():
        return True
    if not out.is_dir():
        return out.exists()
    names = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if codec_state.needs_state(wanted):
        ending = codec_state.ending(wanted)
        states = {f"{name.removesuffix('.safetensors')}{ending}" for name in wanted["files"]}
        names = [name for name in names if name not in states]
    return bool(names)


def begin_folder(
    out: Path, wanted: dict[str, Any], side_files: Mapping[str, bytes], words: Wording = EXTRACT
) -> None:
    """Write manifest and copy before any shard, so that a process that dies from here on leaves a
    cache to continue; then the files beside them."""
    shards = own_shards(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / manifest.NAME, shards / manifest.COPY):
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            manifest.write(path, wanted)
    for folder in (out, shards):
        json_file.sweep(folder)
    # another process may have begun it in this moment, or another version before
    about = existing_manifest(wanted, out, words) or wanted
    copy = codec_state.copy_of(about, side_files)
    write_side_files(out, {**_noted(about, side_files), **copy, **root_files(about)})


def _noted(about: Mapping[str, Any], side_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Leave out files that are not those of the manifest: an earlier version told less of some
    teachers' ends, and what it wrote stays."""
    facts = manifest.file_facts(side_files)
    return {
        name: data
        for name, data in side_files.items()
        if about["files"].get(name, facts[name]) == facts[name]
    }


def root_files(about: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what the store of a cache has beside all shards, by paths in the cache."""
    found: dict[str, bytes] = get_store(about["identity"]["store"]).root_files(
        manifest.shard_form(about)
    )
    return found


def write_side_files(out: Path, side_files: Mapping[str, bytes]) -> None:
    """Write what is missing or differs of the files beside the manifest."""
    for name, data in side_files.items():
        if (out / name).is_dir():
            raise UserError(
                f"{str(out / name)!r} is a folder where a file is to be, and none that featcache "
                "made; move it away and run the same command again"
            )
        if not is_written(out / name, data):
            json_file.write_file(out / name, data)


def is_written(path: Path, data: bytes) -> bool:
    """Tell whether a file holds these bytes; its size first, since a stranger's may be huge."""
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


# ------------------------------------------------------------ the disk


def check_disk_space(jobs: Sequence[ExtractJob]) -> None:
    """Raise UserError where there is no room for what is missing of all jobs together. The first
    folder's disk holds the others."""
    missing = sum(_missing_bytes(*job) for job in jobs)
    check_space(jobs[0].out, missing, EXTRACT, sum(_shard_bytes(job.plan) for job in jobs))


def _missing_bytes(plan: Plan, out: Path) -> int:
    missing = [shard for shard in plan.shards if not record_path(out, shard["name"]).is_file()]
    return plan.view_bytes * plan.views * sum(shard["count"] for shard in missing)


def _shard_bytes(plan: Plan) -> int:
    """Return the bytes of the largest shard."""
    return plan.view_bytes * plan.views * max((shard["count"] for shard in plan.shards), default=0)


def free_bytes(out: Path) -> int:
    """Return the free bytes of the disk that `out` is on, or will be."""
    disk = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    return shutil.disk_usage(disk).free


def needed_bytes(missing_bytes: int) -> int:
    """Return what must be free for so much more, with what a disk should keep."""
    return missing_bytes + _SPARE_BYTES


def check_space(out: Path, missing_bytes: int, words: Wording, shard_bytes: int = 0) -> None:
    """Raise UserError where the disk of `out` has no room for so much more; of a cache in an object
    store, where this machine has none for `shard_bytes`."""
    needed, free = needed_bytes(missing_bytes), free_bytes(out)
    is_far = files_of(out).may_be_far
    if is_far and missing_bytes and needed_bytes(shard_bytes) > free:
        raise UserError(
            f"{words.option}{str(out)!r}: a shard is made on this machine before it is uploaded, "
            f"and needs {needed_bytes(shard_bytes) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "set XDG_CACHE_HOME to a folder of a larger disk, or give smaller --rows-per-shard"
        )
    if not is_far and missing_bytes and needed > free:
        raise UserError(
            f"{words.option}{str(out)!r}: the cache needs {needed / 1e9:.1f} GB more, "
            f"{free / 1e9:.1f} GB are free; {words.smaller}"
        )


def disk_full_error(
    error: BaseException, folders: Mapping[Path, dict[str, Any]], words: Wording = EXTRACT
) -> UserError | None:
    """Return the error for people where a disk is full or a quota reached, else None. `folders`
    with their manifests; the first is named, the shards of all are counted."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    records = [
        record_path(out, shard["name"])
        for out, wanted in folders.items()
        for shard in wanted["shards"]
    ]
    done = sum(path.is_file() for path in records)
    return UserError(
        f"{words.option}{str(next(iter(folders)))!r}: {error.strerror}; {done} of "
        f"{counted(len(records), 'shard is', 'shards are')} complete and kept; make room "
        "and run the same command again, it continues"
    )


# ------------------------------------------------------------ the quarantine


def report_quarantine(out: Path, wanted: dict[str, Any]) -> None:
    """Write quarantine.json once all shards are complete; a UserError where no picture could be
    used."""
    paths = [record_path(out, shard["name"]) for shard in wanted["shards"]]
    if not all(path.is_file() for path in paths):  # the shares of others are still to come
        return
    records = [read_record(path) for path in paths]
    rows = write_quarantine(out, records)
    if rows and not sum(record["rows"] for record in records):
        raise UserError(
            f"none of {counted(len(rows), 'picture')} could be used, the first {rows[0]['key']!r}: "
            f"{rows[0]['reason']}; all are listed in {out / QUARANTINE}; repair them, "
            f"remove this cache of no rows with `{command_line('featcache', 'rm', out)}`, and run "
            "the same command again"
        )


def write_quarantine(out: Path, records: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Write quarantine.json beside the manifest, or remove it where every picture could be used;
    returns its pictures."""
    path, rows = out / QUARANTINE, [row for record in records for row in record["quarantined"]]
    if rows and not _is_written(path, {"pictures": rows}):
        json_file.write_json(path, {"pictures": rows})
    elif not rows and path.is_file():  # only then: a complete cache may be read-only
        commit.remove_path(path)
        files_of(path).changed(path)
    return rows


def _is_written(path: Path, value: dict[str, Any]) -> bool:
    """Whether a JSON of ours is there already."""
    try:
        return json_file.read_json(path) == value
    except UserError:
        return False
