"""An extraction reports what it will do, how far it is, where it stopped, and what it did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.console import text
from featcache.console.distortion_table import distortion_lines
from featcache.errors import counted
from featcache.pictures import passed_over
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.storage.store import record_path

if TYPE_CHECKING:
    from featcache.extraction.plan import ExtractJob
    from featcache.extraction.progress import ExtractProgress


def summary(
    jobs: list[ExtractJob], out: Path | None, shards: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what is known before the work; `levels` are the first teacher's, bytes those of this
    share."""
    plan, folder = jobs[0]
    count = sum(shard["count"] for shard in shards)
    more = {each.teacher.name: {"levels": each.levels, "folder": str(path)} for each, path in jobs}
    return {
        "cache": str(out or folder),
        "id": plan.manifest()["id"],
        "pictures": len(plan.source),
        "passed_over": passed_over.as_json(plan.source),
        "views": plan.views,
        "levels": plan.levels,
        "share_pictures": count,
        "bytes": sum(each.view_bytes * each.views * count for each, _ in jobs),
        **({"teachers": more} if len(jobs) > 1 else {}),
    }


def unfinished_shards(job: ExtractJob) -> list[dict[str, Any]]:
    """Return the shards that have no record."""
    return [shard for shard in job.plan.shards if not record_path(job.out, shard["name"]).is_file()]


def stopped_text(jobs: list[ExtractJob]) -> str:
    """Say how much of a stopped extraction is kept, and how much is left."""
    left = max((unfinished_shards(job) for job in jobs), key=len)
    shards = len(jobs[0].plan.shards)
    pictures = sum(shard["count"] for shard in left)
    return (
        f"stopped: {shards - len(left)} of {counted(shards, 'shard')} of "
        f"{str(jobs[0].out)!r} are complete "
        f"and kept, {counted(pictures, 'picture is', 'pictures are')} left; the same command "
        "continues"
    )


def remaining_facts(jobs: list[ExtractJob], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what these shards still lack; another cache is refused as the work would refuse it."""
    from featcache.extraction.target_folder import existing_manifest

    for plan, folder in jobs:
        if not plan.is_new_list:  # which --append has compared already
            existing_manifest(plan.manifest(), folder)
    left = [[shard for shard in unfinished_shards(job) if shard in shards] for job in jobs]
    rows = [sum(shard["count"] for shard in each) for each in left]
    new_bytes = sum(
        job.plan.view_bytes * job.plan.views * count for job, count in zip(jobs, rows, strict=True)
    )
    new = {"new_shards": max(map(len, left)), "new_pictures": max(rows), "new_bytes": new_bytes}
    return {"shards": len(shards), "complete": not any(left), **new}


def result(jobs: list[ExtractJob], progress: ExtractProgress) -> dict[str, Any]:
    """Return what is known after the work."""
    with Cache(jobs[0].out) as cache:
        return {
            "rows": len(cache),
            "complete": not any(unfinished_shards(job) for job in jobs),
            "new_pictures": progress.pictures,
            "exif_ignored": progress.exif_ignored,
            "quarantined": cache.quarantined,
            "pictures_per_s": round(progress.rate, 2),
            "slowest": progress.slowest,
            "distortion": {
                job.plan.teacher.name: manifest.read(job.out)["provenance"].get("distortion", {})
                for job in jobs
            },
        }


def exif_note(facts: dict[str, Any]) -> str:
    """Say how many of the pictures that were extracted are turned in other programs; empty where
    none is."""
    if not facts["exif_ignored"]:
        return ""
    return (
        f"note: {facts['exif_ignored']} of {counted(facts['new_pictures'], 'picture')} "
        "have an EXIF orientation other than 1, which is not applied; --exif applies it"
    )


def cost_facts(
    jobs: list[ExtractJob], facts: dict[str, Any], batch_size: int, workers: int, processes: int
) -> dict[str, Any]:
    """Return what a dry run measures: the disk's free bytes, and the hours by one batch, None where
    no picture of it could be used, or of no `processes`, which are on other machines."""
    from featcache.extraction.target_folder import free_bytes, needed_bytes
    from featcache.extraction.trial_batch import time_batch

    if facts["complete"]:
        return {}
    free = free_bytes(jobs[0].out)
    found = {"free_bytes": free, "fits": needed_bytes(facts["new_bytes"]) <= free}
    timed = time_batch([job.plan for job in jobs], batch_size, workers) if processes else None
    views = facts["new_pictures"] * jobs[0].plan.views
    hours = None if timed is None else timed.seconds(views) / 3600 / processes
    return {**found, "new_views": views, "hours": hours}


def _cost_text(facts: dict[str, Any]) -> str:
    """Say what a dry run measured; empty where there is nothing to do."""
    if "fits" not in facts:
        return ""
    fits = "fits into" if facts["fits"] else "DOES NOT FIT into"
    space = f"{fits} the {text.format_bytes(facts['free_bytes'])} that are free"
    pace = "no picture of the first batch can be used"
    if "engine" in facts:
        pace = "the pace of its actors is not known before they work"
    if facts["hours"] is not None:
        pace = f"about {facts['hours']:.3g} hours by the pace of one batch"
    return (
        f"{counted(facts['new_pictures'], 'picture')}, "
        f"{counted(facts['new_views'], 'view')}: {space}; {pace}"
    )


def dry_run_text(facts: dict[str, Any], folder: Path) -> str:
    """Say what the extraction would write, whether it fits, and how long it takes."""
    lines = [_dry_run_line(facts, folder), *filter(None, [_cost_text(facts)])]
    return text.join_lines(lines)


def _dry_run_line(facts: dict[str, Any], folder: Path) -> str:
    whose = f"share {facts['share']} of {folder}" if facts["share"] else str(folder)
    pictures, views = (
        counted(facts["share_pictures"], "picture"),
        counted(facts["views"], "view"),
    )
    what = f"{pictures} x {views}, {text.format_bytes(facts['bytes'])}"
    if facts["complete"]:
        return f"{whose} is complete ({what}): nothing would be done"
    some = (
        ""
        if facts["new_shards"] == facts["shards"]
        else f"; {facts['shards'] - facts['new_shards']} are there"
    )
    shards = counted(facts["new_shards"], "shard")
    return f"would write {text.format_bytes(facts['new_bytes'])} in {shards} to {whose}{some}"


def summary_text(summary: dict[str, Any], jobs: list[ExtractJob]) -> str:
    count = counted(summary["rows"], "picture")
    if summary["share"]:
        count = (
            f"share {summary['share']}, {summary['share_pictures']} of "
            f"{counted(summary['pictures'], 'picture')}"
        )
    views, verb = counted(summary["views"], "view"), "added " if summary["added"] else ""
    size = text.format_bytes(summary["bytes"])
    lines = [f"{summary['cache']}: {verb}{count} x {views}, {size}"]
    if summary["appended"] and not summary["share"]:
        new = counted(summary["pictures"], "picture")
        lines = [f"{summary['cache']}: appended {new} x {views}, {size}; {count} in all"]
    if summary["new_pictures"]:
        lines.append(f"{summary['pictures_per_s']} pictures/s, slowest stage: {summary['slowest']}")
    elif summary["complete"]:
        lines.append("was complete already; nothing to do")
    for plan, _ in jobs:
        facts = summary["distortion"][plan.teacher.name]
        found = distortion_lines(plan.codec, plan.levels, facts)
        lines += [f"{plan.teacher.name}:", *found] if found and len(jobs) > 1 else found
    if not summary["complete"]:
        lines.append(
            f"this share is done; the cache has {counted(summary['rows'], 'picture')} "
            "so far, other shares "
            "complete it"
        )
    for row in summary["quarantined"][:10]:
        lines.append(f"quarantined {row['key']!r}: {row['reason']}")
    if summary["quarantined"]:
        lines.append(
            f"{len(summary['quarantined'])} in quarantine, all listed in "
            f"{summary['cache']}/quarantine.json; fixed pictures come in with a new --out"
        )
    return text.join_lines(lines)
