"""`featcache doctor` looks at the home: whether it can be written, how fast its disk reads, and the
caches in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from featcache.errors import UsageError
from featcache.maintenance.check_machine import disk, nearest
from featcache.maintenance.finding import BROKEN, NOTE, Finding, error_text, gigabytes
from featcache.maintenance.read_speed import measure, scratch_file

_SLOW = 50e6  # bytes a second; a student of CLIP-B/16's targets reads more
_CACHES_S = 3.0  # records of many shards on a slow disk
_ELSEWHERE = "allow it, or set FEATCACHE_HOME to a folder that can be written"


def home_folder() -> list[Finding]:
    """Tell the free disk of the home, whether it can be written, and how fast it is read. Raises
    UsageError where FEATCACHE_HOME names no place of this machine."""
    from featcache.catalog import home

    return [disk("disk of the home", home.home()), *_folder(home.home())]


def _folder(home: Path) -> list[Finding]:
    there = nearest(home)
    facts: dict[str, Any] = {"path": str(home), "exists": there == home.absolute()}
    if not there.is_dir():
        told = f"{str(there)!r} is no folder"
        return [Finding("home", told, BROKEN, "set FEATCACHE_HOME to a folder", facts)]
    try:
        with scratch_file(there):
            pass
    except OSError as error:
        told = f"{str(there)!r} cannot be written: {error.strerror}"
        return [Finding("home", told, BROKEN, _ELSEWHERE, facts)]
    made = "" if facts["exists"] else ": the first extraction makes it"
    return [Finding("home", f"{str(home)!r}{made}", facts=facts), _read_speed(there)]


def _read_speed(folder: Path) -> Finding:
    what = "read speed of the home"
    try:
        speed = measure(folder)
    except OSError as error:
        return Finding(what, f"not measured: {error_text(error)}", NOTE, "free some room")
    facts = {
        "bytes_per_s": round(speed.bytes_per_s),
        "bytes": speed.bytes,
        "seconds": round(speed.seconds, 3),
        "direct": speed.direct,
    }
    told = f"{gigabytes(speed.bytes_per_s)}/s ({speed.bytes >> 20} MiB in {speed.seconds:.2f} s"
    told += ")" if speed.direct else "; not surely past the page cache)"
    if speed.bytes_per_s < _SLOW:
        advice = "training may wait: stage a cache on a local disk (`featcache copy`)"
        return Finding(what, told, NOTE, advice, facts)
    return Finding(what, told, facts=facts)


def caches() -> list[Finding]:
    """Tell how many caches lie in the home and their bytes, and each that is damaged."""
    from featcache.catalog import home
    from featcache.catalog.listing import describe

    try:
        paths, end = home.caches(), time.monotonic() + _CACHES_S
    except (UsageError, NotADirectoryError):  # said of the home above
        return []
    found: list[dict[str, Any]] = []
    for path in paths:
        if time.monotonic() > end:
            break
        found.append(describe(path, {}))  # of which uses are not asked
    damaged = [facts for facts in found if "damaged" in facts]
    return [_count(len(paths), found, len(damaged)), *map(_damaged, damaged)]


def _count(total: int, found: list[dict[str, Any]], damaged: int) -> Finding:
    size = sum(facts.get("bytes", 0) for facts in found)
    facts = {"caches": total, "looked_at": len(found), "bytes": size, "damaged": damaged}
    told = f"{total}, {gigabytes(size)}, {damaged} damaged"
    if len(found) == total:
        return Finding("caches", told, facts=facts)
    told = f"{total}; of {len(found)} looked at in time: {gigabytes(size)}, {damaged} damaged"
    return Finding("caches", told, NOTE, "`featcache ls` looks at all", facts)


def _damaged(facts: dict[str, Any]) -> Finding:
    advice = "copy it here again, or move it away and extract again"
    told = f"{facts['path']!r}: {facts['damaged']}"
    return Finding("damaged cache", told, BROKEN, advice, {"path": facts["path"]})
