"""The run ledger: a line of JSON for every extraction, training and evaluation, below the home.

    $FEATCACHE_HOME/runs.jsonl        of the home's owner, and of all who may write it
    $FEATCACHE_HOME/runs.d/UID.jsonl  of each other user, who writes his own file alone

It never lies inside a cache, which may be read-only or shared. Reading merges all files of the home
and of those that FEATCACHE_LEDGERS names; links are refused. A ledger that cannot be written stops
no work.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from featcache.catalog import home
from featcache.errors import UserError
from featcache.runtime.local_path import local_path
from featcache.storage.files import files_of
from featcache.storage.schema import LedgerLine, schema_problem

NAME = "runs.jsonl"
USERS = "runs.d"  # one file for each user who may not write the ledger
FURTHER = "FEATCACHE_LEDGERS"  # variable: other homes whose runs are seen here, parted by colons
USE = "use"  # command of a line that says, as a run begins, which cache it reads
_LINE_BYTES = 1 << 20
_KEPT_BYTES = 1 << 16  # of a line that we write; what is longer keeps what the account needs
_USER_FILE = re.compile(r"[0-9]{1,10}\.jsonl")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SHARED = stat.S_IWGRP | stat.S_IWOTH
_LOG = logging.getLogger(__name__)

# ------------------------------------------------------------ written


def log_run(**facts: Any) -> None:
    """Append one line to the home's ledger; a home that cannot be written is reported and stops
    nothing."""
    try:
        _append(home.home(), _line(facts))
    except OSError as error:
        where = str(home.home() / NAME)
        _LOG.warning("the run ledger %r cannot be written: %s", where, error.strerror)
    except UserError as error:  # home is no place of this machine
        _LOG.warning("the run ledger cannot be written: %s", error)


def log_use(cache: Path, **facts: Any) -> None:
    """Note that a run begins to read a cache, in the ledger of the home that the cache lies in,
    whoever's it is: there `featcache gc --unused` looks. A cache that lies in none is noted at
    home."""
    folder = cache.absolute().parent.resolve()
    if files_of(cache.absolute()).may_be_far or not _is_home(folder):
        log_run(command=USE, **facts)
        return
    try:
        _append(folder, _line({"command": USE, **facts}))
    except OSError as error:
        _LOG.warning(
            "the use of %r cannot be noted in %r: %s; `featcache gc --unused` there does not know "
            "of it",
            str(cache),
            str(folder),
            error.strerror,
        )


def _is_home(folder: Path) -> bool:
    """Tell a home from a folder that has a file of that name from another program, by its first
    line."""
    if not any(os.path.lexists(folder / name) for name in (NAME, USERS)):
        return False
    try:
        return all(next(read(path), {}) is not None for path in _files(folder, must_exist=False))
    except OSError:  # the append will tell
        return True


def _line(facts: dict[str, Any]) -> str:
    stamped = {"time": utc(time.time()), **facts}
    line = json.dumps(stamped, sort_keys=True, default=str)
    if len(line) > _KEPT_BYTES:
        kept = {name: each for name, each in stamped.items() if name in LedgerLine.model_fields}
        short = {
            name: each[:1024] if isinstance(each, str) else each for name, each in kept.items()
        }
        line = json.dumps({**short, "shortened": True}, sort_keys=True, default=str)
    return line + "\n"


def utc(seconds: float) -> str:
    """Write a time of the clock as the ledger does."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _append(folder: Path, text: str) -> None:
    """Append to the ledger of a home, or to one's own file beside it where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid == os.geteuid() and status.st_mode & _SHARED:
        _make_users_folder(folder)  # before another does, who could then remove all users' files
    if os.path.lexists(folder / NAME) or status.st_uid == os.geteuid():
        try:
            fd = home.open_lines(folder / NAME)
        except PermissionError:
            pass
        else:
            _let_others_read(fd, folder)
            home.append_to(fd, text)
            return
    _append_own(folder, text)


def _append_own(folder: Path, text: str) -> None:
    """Append to this user's own file, which nobody else can have put there in his place."""
    _make_users_folder(folder)
    inside = os.open(folder / USERS, _FOLDER)
    try:
        fd = home.open_lines(f"{os.geteuid()}.jsonl", dir_fd=inside)
    finally:
        os.close(inside)
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, f"{USERS}/{os.geteuid()}.jsonl is another user's")
    _let_others_read(fd, folder / USERS)
    home.append_to(fd, text)


def _let_others_read(fd: int, folder: Path) -> None:
    """Let all users of a folder that several write into read one's new file, whatever the umask:
    where a ledger cannot be read nothing is known to be unused."""
    mode, status = stat.S_IMODE(folder.stat().st_mode), os.fstat(fd)
    if mode & _SHARED and status.st_size == 0 and status.st_uid == os.geteuid():
        os.fchmod(fd, stat.S_IMODE(status.st_mode) | (mode & 0o044))


def _make_users_folder(folder: Path) -> None:
    """Make the folder of users' files: who may write the home may write it, and, as in /tmp,
    nobody removes another's file."""
    try:
        (folder / USERS).mkdir()
    except FileExistsError:
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    inside = os.open(folder / USERS, _FOLDER)  # no link that another put there meanwhile
    try:
        if os.fstat(inside).st_uid == os.geteuid():
            os.fchmod(inside, mode | stat.S_ISVTX if mode & _SHARED else mode)
    finally:
        os.close(inside)


# ------------------------------------------------------------ read


def homes() -> list[Path]:
    """List the homes whose ledgers are read: this one, and those that FEATCACHE_LEDGERS names.
    Raises UsageError where one is no place of this machine."""
    named = [each for each in os.environ.get(FURTHER, "").split(os.pathsep) if each]
    every = [home.home(), *(Path(local_path(each, FURTHER)) for each in named)]
    different: dict[Path, Path] = {}
    for each in every:
        different.setdefault(each.resolve(), each)
    return list(different.values())


def problem() -> tuple[Path, str] | None:
    """Return a ledger that cannot be read, and why, since then no cache is known to be unused; None
    where all can, and where this home has none."""
    for number, folder in enumerate(homes()):
        try:
            for path in _files(folder, must_exist=number > 0):
                os.close(_open(path))
        except OSError as error:
            why = f"the run ledger cannot be read: {error.strerror}; no cache is known to be unused"
            return Path(error.filename or folder), why
    return None


def runs_of(*cache_ids: str) -> list[dict[str, Any]]:
    """Return the ledgers' lines on training with a cache, by the ids that it has and had, oldest
    first, without those that showed no picture. Lines that are none of ours are passed over; a note
    counts them, once."""
    found = [
        run
        for cache_id in cache_ids
        for run in _uses(cache_id)
        if run["command"] != USE and run.get("views_shown") != 0  # absent in older lines
    ]
    return found if len(cache_ids) == 1 else sorted(found, key=lambda run: str(run["time"]))


def last_uses() -> dict[str, str]:
    """Return, of each cache by its id, when a training run last began or ended that reads it."""
    every = _training_runs(_state())
    return {cache_id: max(str(run["time"]) for run in runs) for cache_id, runs in every.items()}


def _uses(cache_id: str) -> list[dict[str, Any]]:
    return _training_runs(_state()).get(cache_id, [])


Stamp = tuple[str, int, int]  # path, mtime_ns, bytes


def _state() -> tuple[Stamp, ...]:
    """Return the files that can be looked at, and what changes as they are written to."""
    found = []
    for path in readable_files():
        try:
            status = path.lstat()
        except OSError:
            continue
        found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)


def readable_files() -> list[Path]:
    """List the files of all ledgers; a note tells of those that cannot be read."""
    found = list[Path]()
    for folder in homes():
        try:
            paths = _files(folder, must_exist=False)
        except OSError as error:
            _note_unreadable(str(error.filename or folder), str(error.strerror))
            continue
        found += [path for path in paths if _is_readable(path)]
    return found


def _is_readable(path: Path) -> bool:
    try:
        os.close(_open(path))
    except OSError as error:
        _note_unreadable(str(path), str(error.strerror))
        return False
    return True


@lru_cache(1024)
def _note_unreadable(path: str, why: str) -> None:
    _LOG.warning("the run ledger %r cannot be read: %s", path, why)


def _files(folder: Path, *, must_exist: bool) -> list[Path]:
    """List the files of a home's ledger. Raises OSError where that cannot be said."""
    found = [folder / NAME] if os.path.lexists(folder / NAME) else []
    found += [folder / USERS / name for name in _user_files(folder)]
    if not found and must_exist:
        raise FileNotFoundError(errno.ENOENT, f"no {NAME} there", str(folder))
    return found


def _user_files(folder: Path) -> list[str]:
    """List the names of users' files; a link in place of their folder is an OSError."""
    try:
        inside = os.open(folder / USERS, _FOLDER)
    except FileNotFoundError:
        return []
    try:
        with os.scandir(inside) as entries:
            return sorted(entry.name for entry in entries if _USER_FILE.fullmatch(entry.name))
    finally:
        os.close(inside)


def _open(path: Path) -> int:
    """Open a regular file, and no link to one. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return fd


@lru_cache(1)  # `ls` asks for every cache
def _training_runs(state: tuple[Stamp, ...]) -> dict[str, list[dict[str, Any]]]:
    """Read the ledgers: cache id -> their lines on training, oldest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path, _, _ in state:
        strange = 0
        for run in read(Path(path)):
            strange += run is None
            if run is not None and run["command"] in ("train", USE) and run.get("cache_id"):
                found.setdefault(run["cache_id"], []).append(run)
        note_strange(path, strange)
    for runs in found.values():
        runs.sort(key=lambda run: str(run["time"]))
    return found


def note_strange(path: str, count: int) -> None:
    """Tell how many lines of a file were passed over."""
    if count:
        _LOG.warning("%d lines of %r are none of ours; they are passed over", count, path)


def read(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the lines of a ledger's file; None for one that is none of ours."""
    try:
        fd = _open(path)
    except OSError as error:  # gone, or closed to us, since it was listed
        _note_unreadable(str(path), str(error.strerror))
        return
    with os.fdopen(fd, "rb") as file:
        while line := file.readline(_LINE_BYTES):
            yield _parse(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return what a line says; None where a process died while it wrote, or another program wrote
    it."""
    try:
        run = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return None if schema_problem(LedgerLine, run) else run
