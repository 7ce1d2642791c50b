"""A damaged cache is repaired: what files can tell is restored, bad shards are extracted again,
nothing else is touched.

A bad shard is put aside until its successor is complete; a repair that fails puts it back.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from featcache.catalog import extract_command
from featcache.errors import UnreadableError, UserError
from featcache.extraction import extract
from featcache.extraction.picture_check import check_same_pictures
from featcache.extraction.plan import ExtractJob, Plan
from featcache.extraction.progress import ExtractProgress
from featcache.extraction.shard_queue import free_shards
from featcache.extraction.target_folder import (
    in_form,
    recorded_batch_size,
    report_quarantine,
    root_files,
    write_side_files,
)
from featcache.maintenance import derive, verify
from featcache.models.contract import Teacher
from featcache.pictures.source import Source
from featcache.storage import (
    belongings,
    codec_state,
    commit,
    index_build,
    index_file,
    manifest,
    picture_lists,
)
from featcache.storage import lease as leases
from featcache.storage.identity import refuse_mismatch
from featcache.storage.own_folder import own_shards
from featcache.storage.part import added_parts, cache_root
from featcache.storage.record import read_quarantine, read_record
from featcache.storage.store import QUARANTINE, SHARDS, record_path
from featcache.views.policy import policy_from_dict

# manifest -> its pictures and its teacher
Load = Callable[[dict[str, Any]], tuple[Source, Teacher]]
FindParent = Callable[[dict[str, Any]], Path]  # manifest -> the cache that it was derived from
Make = Callable[[dict[str, Any]], None]  # makes a shard


class _Folder(NamedTuple):
    """A part whose shards are made."""

    out: Path
    store: str


def recorded_parent(about: dict[str, Any]) -> Path:
    """Return where the cache was that a part was derived from. Raises UserError where it is no
    longer there, or a URL: no object store is asked because a manifest says so."""
    path = extract_command.parent_path(about)
    if not path or not (Path(path) / manifest.NAME).is_file():
        where = f"not at {path!r}" if path else "at no place that is recorded"
        raise UserError(
            f"it was derived from cache {about['identity']['parent']}, which is {where}; give it "
            "with --parent CACHE"
        )
    return Path(path)


def run(
    cache: Path,
    load: Load,
    *,
    parent: FindParent = recorded_parent,
    workers: int = 2,
    progress: ExtractProgress | None = None,
) -> dict[str, Any]:
    """Repair the cache and what was added to it. Returns the files restored and the shards made
    again; the pictures and the teacher, or the cache that this one was derived from, are opened
    only when a shard or the teacher's tail needs them."""
    restored: list[str] = []
    shards: list[str] = []
    for part in (cache, *added_parts(cache)):
        own_shards(part)
        restored += _restore_manifest(part)
        about = manifest.read(part)
        restored += _restore_state(part, about)
        problems = list(verify.part_problems(part, about))
        bad = sorted({problem.shard for problem in problems if problem.shard})
        if bad or any(problem.path.name in about["files"] for problem in problems):
            shown = progress or ExtractProgress()
            if extract_command.is_derived(about):
                _derive(part, about, bad, parent, shown)
            else:
                _extract(part, about, bad, load, workers, shown)
        if problems:
            write_side_files(part, root_files(about))
            if (part / QUARANTINE).is_dir():
                raise UserError(
                    f"{str(part / QUARANTINE)!r} is a folder where a file is to be, and none that "
                    "featcache made; move it away and run the same command again"
                )
            report_quarantine(part, about)
        for leftover, strangers in belongings.leftovers(part):
            if not strangers:
                commit.remove_path(leftover)
        for shard in about["shards"]:
            leases.clear_stale(part, shard["name"])
        restored += [str(problem.path) for problem in problems if not problem.shard]
        shards += [str(record_path(part, shard)) for shard in bad]
        restored += _renew_index(part, about)
    if strange := verify.check_parts_agree(cache):
        raise UserError(strange[0])
    return {"restored": restored, "shards": shards}


def _renew_index(part: Path, about: dict[str, Any]) -> list[str]:
    """Make the index anew where it is stale, damaged or wrong."""
    if verify.index_problem(part, about):
        index_build.write(part)
    elif not index_build.update(part, least=sys.maxsize):
        return []
    return [str(part / index_file.NAME)]


def _restore_manifest(part: Path) -> list[str]:
    """Restore the manifest from its copy, or the copy from the manifest."""
    pair = (part / manifest.NAME, part / SHARDS / manifest.COPY)
    if not any(path.exists() for path in pair):
        raise UserError(
            f"no cache at {str(part)!r}: neither {manifest.NAME} nor its copy is there; give the "
            "folder that `featcache extract` wrote"
        )
    good = [path for path in pair if not _manifest_problem(path)]
    if not good and not verify.json_problem(pair[0]):  # whole, and no manifest: that says why
        manifest.read_file(pair[0])
    if not good:
        raise UserError(
            f"cache {str(part)!r}: {manifest.NAME} and its copy {SHARDS}/{manifest.COPY} are both "
            "damaged; extract again into another folder"
        )
    if len(good) == 2:
        here, there = (manifest.read_file(path) for path in pair)
        if here == there:
            return []
        if picture_lists.lists_at(here["identity"], there["identity"]):  # a death while appending
            manifest.write(pair[1], here)
            return [str(pair[1])]
        what = (
            f"cannot repair {str(part)!r}: {manifest.NAME} and {SHARDS}/{manifest.COPY} are sound, "
            "but of two caches"
        )
        todo = "remove the one that does not belong here"
        refuse_mismatch(here, there, what, todo, ("fatal", "lossy", "layout"))
    source = good[0]
    target = pair[1] if source == pair[0] else pair[0]
    manifest.write(target, manifest.read_file(source))
    return [str(target)]


def _restore_state(part: Path, about: dict[str, Any]) -> list[str]:
    """Restore the state of the codec from its copy, or the copy from it."""
    name = codec_state.file_name(about)
    if not name:
        return []
    pair, facts = (part / name, part / SHARDS / codec_state.COPY), about["files"][name]
    bad = [path for path in pair if codec_state.problem(path, facts)]
    if len(bad) == 2:
        raise UserError(
            f"cache {str(part)!r}: {name} and its copy {SHARDS}/{codec_state.COPY} are both "
            "missing or damaged, and without them nothing decodes; extract again into another "
            "folder"
        )
    for path in bad:
        good = pair[1] if path == pair[0] else pair[0]
        write_side_files(part, {str(path.relative_to(part)): good.read_bytes()})
    return [str(path) for path in bad]


def _manifest_problem(path: Path) -> str | None:
    """Say why a file is no manifest that may be restored from; an UnreadableError where that
    cannot be said."""
    try:
        manifest.read_file(path)
    except UnreadableError:
        raise
    except UserError as error:
        return str(error)
    return None


def _extract(
    part: Path,
    about: dict[str, Any],
    bad: list[str],
    load: Load,
    workers: int,
    progress: ExtractProgress,
) -> None:
    source, teacher = load(about)
    plan = in_form(about, plan_from_manifest(about, source, teacher))
    plan = replace(plan, state_file=codec_state.read_file(part, about))
    wanted = plan.manifest()
    if "copied_from" in about["provenance"] and _holds(part, about, source):
        wanted["identity"]["pictures"] = about["identity"]["pictures"]
    todo = "give the pictures and weights of the extraction: --images SRC, --weights FILE"
    refuse_mismatch(
        wanted, about, f"cannot repair {str(part)!r}", todo, ("fatal", "lossy", "layout")
    )
    if wanted["arrays"] != about["arrays"]:
        raise UserError(
            f"cannot repair {str(part)!r}: its arrays are not those of its identity; extract again "
            "into another folder"
        )
    write_side_files(part, plan.side_files())
    shards = [shard for shard in about["shards"] if shard["name"] in bad]
    if lacking := [shard["name"] for shard in shards if shard not in plan.shards]:
        raise UserError(
            f"cannot repair {str(part)!r}: the pictures of shard {lacking[0]} are of another list "
            "than those given; pictures were appended to this cache: give all, --images A::B"
        )
    size = recorded_batch_size(about, extract_command.BATCH_SIZE)
    options = extract.RunOptions(batch_size=size, workers=workers, progress=progress)
    count = sum(shard["count"] for shard in shards)
    if count:
        check_same_pictures(source, cache_root(part), count, bad, first=plan.first_picture)
    progress.total += count

    def make(shard: dict[str, Any]) -> None:
        extract.extract_shard(ExtractJob(plan, part), shard, about, options)

    for shard in shards:
        _replace(part, shard, about, make, progress)


def _derive(
    part: Path,
    about: dict[str, Any],
    bad: list[str],
    parent: FindParent,
    progress: ExtractProgress,
) -> None:
    """Derive the bad shards again, from the cache that they were derived from."""
    shards = [shard for shard in about["shards"] if shard["name"] in bad]
    progress.total += sum(shard["count"] for shard in shards)
    with derive.again(part, about, parent(about)) as (side_files, write):
        write_side_files(part, side_files)

        def make(shard: dict[str, Any]) -> None:
            write(shard["name"])
            progress.pictures += shard["count"]
            progress.report(progress)

        for shard in shards:
            _replace(part, shard, about, make, progress)


def _replace(
    part: Path, shard: dict[str, Any], about: dict[str, Any], make: Make, progress: ExtractProgress
) -> None:
    """Make one shard again, so that a death in between hides no other. It is put back when no new
    one could be made."""
    name, job = shard["name"], _Folder(part, about["identity"]["store"])

    def lacks(job: _Folder, name: str, *, leased: bool) -> bool:
        """Look only once the lease is ours: another repair may have been here."""
        return not (leased and _is_good(job.out, about, shard))

    queue = free_shards([job], [name], progress.waiting, lacks=lacks)
    with contextlib.closing(queue) as free:
        for _ in free:
            try:
                commit.move_to_backup(job.out, name, job.store)
                commit.recover(job.out, job.store, [name])
                make(shard)
                commit.remove_backup(job.out, name, job.store)
            except BaseException:
                # while the lease is ours: a full disk may have no room for another
                commit.restore_backup(job.out, name, job.store)
                raise


def _is_good(part: Path, about: dict[str, Any], shard: dict[str, Any]) -> bool:
    one = {**about, "files": {}, "shards": [shard]}
    return not any(problem.shard for problem in verify.part_problems(part, one))


def _holds(part: Path, about: dict[str, Any], source: Source) -> bool:
    """Tell whether a copy of some shards has its pictures from `source`: the manifest knows the
    keys of all its rows."""
    last = max(shard["first"] + shard["count"] for shard in about["shards"])
    records = [record_path(part, shard["name"]) for shard in about["shards"]]
    out = set(_keys_of(read_quarantine, part / QUARANTINE))
    for path in records:
        out.update(_keys_of(lambda path: read_record(path)["quarantined"], path))
    if last > len(source):
        return False
    keys = [
        key
        for s in about["shards"]
        for key in source.keys[s["first"] : s["first"] + s["count"]]
        if key not in out
    ]
    return about["identity"]["pictures"] == {
        "count": len(keys),
        "keys_digest": manifest.keys_digest(keys),
    }


def _keys_of(read: Callable[[Path], list[dict[str, str]]], path: Path) -> list[str]:
    """Return the keys that a JSON lists; none where it is missing or damaged."""
    try:
        return [row["key"] for row in read(path)]
    except UnreadableError:
        raise
    except UserError:
        return []


def plan_from_manifest(about: dict[str, Any], source: Source, teacher: Teacher) -> Plan:
    """Return the plan that a manifest came from, but for its form."""
    identity = about["identity"]
    return Plan(
        source=source,
        teacher=teacher,
        policy=policy_from_dict(identity["policy"]),
        views=identity["views"],
        levels=tuple(identity["levels"]),
        order=identity["order"],
        codec=identity["codec"],
        store=identity["store"],
        rows_per_shard=identity["rows_per_shard"],
        tokens=identity["tokens"],
        keep=identity.get("keep"),
        pixels="pixels" in identity,
        first_view=identity.get("first_view", 0),
        recount="statistics" in about["provenance"],
    )
