"""Mending a cache: what files can tell is restored, bad shards are extracted again, nothing else is touched.

A bad shard is put aside until its successor is complete; a repair that fails puts it back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featcache import extract, manifest, publish, verify, views
from featcache.errors import UserError
from featcache.images import Source
from featcache.part import added
from featcache.plan import Plan
from featcache.store import SHARDS, record_path
from featcache.teachers import Teacher

Load = Callable[[dict[str, Any]], tuple[Source, Teacher]]  # manifest -> its pictures and its teacher


def run(cache: Path, load: Load, *, workers: int = 2, progress: extract.Progress | None = None) -> dict[str, Any]:
    """Mend the cache and what was added to it. Returns the files restored and the shards extracted again; the pictures
    and the teacher are opened only when a shard or the teacher's tail needs them."""
    restored: list[str] = []
    shards: list[str] = []
    for part in (cache, *added(cache)):
        restored += _restore_manifest(part)
        about = manifest.read(part)
        problems = list(verify.problems(part, about))
        bad = sorted({problem.shard for problem in problems if problem.shard})
        if bad or any(problem.path.name in about["files"] for problem in problems):
            _extract(part, about, bad, load, workers, progress)
        elif problems:
            extract.report_quarantine(part, about)
        restored += [str(problem.path) for problem in problems if not problem.shard]
        shards += [str(record_path(part, shard)) for shard in bad]
    return {"restored": restored, "shards": shards}


def _restore_manifest(part: Path) -> list[str]:
    """The manifest from its copy, or the copy from the manifest."""
    pair = (part / manifest.NAME, part / SHARDS / manifest.COPY)
    good = [path for path in pair if not verify.json_problem(path)]
    if not good:
        raise UserError(
            f"cache {str(part)!r}: {manifest.NAME} and its copy {SHARDS}/{manifest.COPY} are both damaged; extract "
            "again into another folder"
        )
    if len(good) == 2:
        here, there = (manifest.read_json(path) for path in pair)
        if here == there:
            return []
        what = f"cannot repair {str(part)!r}: {manifest.NAME} and {SHARDS}/{manifest.COPY} are sound, but of two caches"
        todo = "remove the one that does not belong here"
        manifest.refuse(here, there, what, todo, ("fatal", "lossy", "layout"))
    source = good[0]
    target = pair[1] if source == pair[0] else pair[0]
    manifest.write_json(target, manifest.read_json(source))
    return [str(target)]


def _extract(
    part: Path,
    about: dict[str, Any],
    bad: list[str],
    load: Load,
    workers: int,
    progress: extract.Progress | None,
) -> None:
    source, teacher = load(about)
    plan = of_manifest(about, source, teacher)
    todo = "give the pictures and weights of the extraction: --images SRC, --weights FILE"
    manifest.refuse(plan.manifest(), about, f"cannot repair {str(part)!r}", todo, ("fatal", "lossy", "layout"))
    for shard in bad:
        publish.set_aside(part, shard, plan.store)
    try:
        size = about["provenance"]["batch_size"]
        extract.run(plan, part, batch_size=size, workers=workers, progress=progress)
    except BaseException:
        for shard in bad:
            publish.put_back(part, shard, plan.store)
        raise
    for shard in bad:
        publish.forget_aside(part, shard, plan.store)


def of_manifest(about: dict[str, Any], source: Source, teacher: Teacher) -> Plan:
    """The plan that a manifest came from."""
    identity = about["identity"]
    return Plan(
        source,
        teacher,
        views.from_dict(identity["policy"]),
        identity["views"],
        tuple(identity["levels"]),
        identity["order"],
        identity["codec"],
        identity["store"],
        identity["rows_per_shard"],
        identity["tokens"],
        identity.get("keep"),
        "pixels" in identity,
        identity.get("first_view", 0),
    )
