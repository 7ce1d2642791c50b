"""Caches live, and runs are logged, below `$FEATCACHE_HOME`, by default `./caches`.

The run ledger lies here and never inside a cache, which may be read-only or shared.
"""

from __future__ import annotations

import json
import logging
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from featcache.errors import UsageError, UserError
from featcache.pictures.regular_file import open_regular
from featcache.runtime.local_path import local_path
from featcache.storage import manifest
from featcache.storage.schema import LedgerLine, schema_problem

LEDGER = "runs.jsonl"
_LINE_BYTES = 1 << 20  # a line has less than a thousand
_LOG = logging.getLogger(__name__)


def home() -> Path:
    """Return the folder of caches and of the ledger. Raises UsageError where the variable names no
    place of this machine."""
    return Path(local_path(os.environ.get("FEATCACHE_HOME") or "caches", "FEATCACHE_HOME"))


def caches() -> list[Path]:
    """List the folders below home that hold a manifest, by name; a note tells of those that cannot
    be looked into. Raises UsageError where home is a file."""
    if home().is_file():
        raise UsageError(f"FEATCACHE_HOME {str(home())!r} is a file; it names a folder of caches")
    try:
        found = sorted(home().iterdir())
    except FileNotFoundError:
        return []
    # hidden ones are half removed
    return [path for path in found if not path.name.startswith(".") and _holds_manifest(path)]


def _holds_manifest(folder: Path) -> bool:
    try:
        (folder / manifest.NAME).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        note_passed_over(folder, str(error.strerror))
        return False
    return True


def note_passed_over(path: Path, why: str) -> None:
    """Tell, once, that something below home is left out, and why."""
    _note_once(str(path), why)


@lru_cache(1024)
def _note_once(path: str, why: str) -> None:
    _LOG.warning("%r is passed over: %s", path, why)


def log_run(**facts: Any) -> None:
    """Append one line to the run ledger; a home that cannot be written is reported and stops
    nothing."""
    line = json.dumps(
        {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts},
        sort_keys=True,
        default=str,
    )
    try:
        append(home() / LEDGER, line + "\n")
    except OSError as error:
        _LOG.warning(
            "the run ledger %r cannot be written: %s", str(home() / LEDGER), error.strerror
        )
    except UserError as error:  # home is no place of this machine
        _LOG.warning("the run ledger cannot be written: %s", error)


def append(path: Path, text: str, *, follow: bool = True) -> None:
    """Append whole lines to a file of ours, made where there is none; a link in its place is an
    OSError unless it is to be followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a pipe that nobody reads is an error, and not waited for
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags | (0 if follow else os.O_NOFOLLOW), 0o666), "a") as file:
        file.write(text if _ends_a_line(path) else f"\n{text}")


def _ends_a_line(path: Path) -> bool:
    """Tell whether a file ends with a whole line; it does not where a disk became full within one,
    or its writer was killed, and the next line must not be lost with it."""
    try:
        fd = open_regular(path)
    except OSError:  # no file that can be looked at
        return True
    try:
        size = os.fstat(fd).st_size
        return size == 0 or os.pread(fd, 1, size - 1) == b"\n"
    finally:
        os.close(fd)


def runs_of(cache_id: str) -> list[dict[str, Any]]:
    """Return the ledger's lines on training with a cache, oldest first. Lines that are none of ours
    are passed over; a note counts them, once."""
    path = home() / LEDGER
    try:
        status = path.stat()
        return _training_runs(str(path), status.st_mtime_ns, status.st_size).get(cache_id, [])
    except FileNotFoundError:
        return []
    except OSError as error:
        _LOG.warning("the run ledger %r cannot be read: %s", str(path), error.strerror)
        return []


def ledger_problem() -> str:
    """Say why the ledger, which tells what is in use, cannot be read; empty where it can, and where
    there is none."""
    try:
        os.close(open_regular(str(home() / LEDGER)))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"the run ledger cannot be read: {error.strerror}; no cache is known to be unused"
    return ""


@lru_cache(1)  # `ls` asks for every cache
def _training_runs(path: str, mtime_ns: int, size: int) -> dict[str, list[dict[str, Any]]]:
    """Read the ledger: cache id -> its lines on training."""
    found: dict[str, list[dict[str, Any]]] = {}
    passed_over = 0
    with os.fdopen(open_regular(path), "rb") as file:
        while line := file.readline(_LINE_BYTES):
            run = _parse(line)
            passed_over += run is None
            if run is not None and run["command"] == "train" and run.get("cache_id"):
                found.setdefault(run["cache_id"], []).append(run)
    if passed_over:
        _LOG.warning("%d lines of %r are none of ours; they are passed over", passed_over, path)
    return found


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return what a line says; None where a process died while it wrote, or another program wrote
    it."""
    try:
        run = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return None if schema_problem(LedgerLine, run) else run
