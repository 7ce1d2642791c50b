"""The folder that is written to: begun, continued or refused; disk space; the quarantine report."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.extraction.plan import ExtractJob, Plan
from featcache.storage import commit, identity, json_file, manifest
from featcache.storage.store import QUARANTINE, SHARDS, record_path


def disk_full_error(error: BaseException, out: Path, wanted: dict[str, Any]) -> UserError | None:
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    done = sum(record_path(out, shard["name"]).is_file() for shard in wanted["shards"])
    return UserError(
        f"--out {str(out)!r}: {error.strerror}; {done} of {len(wanted['shards'])} shards are "
        "complete and kept; make room and run the same command again, it continues"
    )


def report_quarantine(out: Path, wanted: dict[str, Any]) -> None:
    """quarantine.json beside the manifest, where a picture could not be used; an error where none
    could."""
    paths = [record_path(out, shard["name"]) for shard in wanted["shards"]]
    if not all(path.is_file() for path in paths):  # the shares of others are still to come
        return
    records = [json_file.read_json(path) for path in paths]
    rows = [row for record in records for row in record["quarantined"]]
    if not rows:
        commit.remove_path(out / QUARANTINE)
    elif not _is_written(out / QUARANTINE, {"pictures": rows}):
        json_file.write_json(out / QUARANTINE, {"pictures": rows})
    if rows and not sum(record["rows"] for record in records):
        raise UserError(
            f"none of {len(rows)} pictures could be used, the first {rows[0]['key']!r}: "
            f"{rows[0]['reason']}; all are listed in {out / QUARANTINE}"
        )


def _is_written(path: Path, value: dict[str, Any]) -> bool:
    """Whether a JSON of ours is there already: a complete cache may be read-only."""
    try:
        return json_file.read_json(path) == value
    except UserError:
        return False


_SPARE_BYTES = 64 << 20  # what a disk should keep beyond the cache


def prepare_folder(plan: Plan, out: Path, batch_size: int) -> dict[str, Any]:
    """Make the folder, or check that the cache in it is the same one; returns its manifest. The
    batch size is noted in it, since real networks give other bits at another."""
    wanted = plan.manifest()
    wanted["provenance"]["batch_size"] = batch_size
    if there := existing_manifest(wanted, out):
        wanted = there
    _check_space(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / manifest.NAME, out / SHARDS / manifest.COPY):
        # before any shard, so that a process that dies from here on leaves a cache to continue
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            json_file.write_json(path, wanted)
    for folder in (out, out / SHARDS):
        json_file.sweep(folder)
    write_side_files(plan, out)
    return wanted


def write_side_files(plan: Plan, out: Path) -> None:
    """What is missing or differs of the files beside the manifest."""
    for name, data in plan.side_files().items():
        if not (out / name).is_file() or (out / name).read_bytes() != data:
            json_file.write_file(out / name, data)


def existing_manifest(wanted: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """The manifest of the cache at `out` where it is the wanted one, None where nothing is there;
    another cache and other files are refused."""
    if (out / manifest.NAME).is_file():
        there = manifest.read(out)
        todo = (
            "these options continue the cache that is there, another --out makes a new one, "
            "--add adds to this one"
        )
        grades = ("fatal", "lossy", "layout")
        identity.refuse_mismatch(
            wanted, there, f"{str(out)!r} holds another cache", todo, grades, show_fixes=True
        )
        return there
    if out.exists() and (
        not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())
    ):
        raise UserError(f"--out {str(out)!r} exists and is no cache; give an empty or new folder")
    return None


def _check_space(plan: Plan, out: Path) -> None:
    """Is there room for the shards that are missing?"""
    check_disk_space([ExtractJob(plan, out)])


def check_disk_space(jobs: Sequence[ExtractJob]) -> None:
    """Is there room for what is missing of all of them? The first folder's disk holds the
    others."""
    out = jobs[0].out
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    missing = [
        plan.view_bytes * plan.views * shard["count"]
        for plan, folder in jobs
        for shard in plan.shards
        if not record_path(folder, shard["name"]).is_file()
    ]
    needed, free = sum(missing) + (_SPARE_BYTES if missing else 0), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"--out {str(out)!r}: the cache needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB "
            "are free; fewer --views or --levels, or another disk"
        )
