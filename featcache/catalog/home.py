"""Caches live, and runs are logged (`ledger`), below `$FEATCACHE_HOME`, by default `./caches`."""

from __future__ import annotations

import errno
import logging
import os
import stat
from functools import lru_cache
from pathlib import Path

from featcache.errors import UsageError
from featcache.runtime.local_path import local_path
from featcache.storage import manifest

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


def append(path: Path, text: str) -> None:
    """Append whole lines to a file of ours, by one write, made where there is none. Raises OSError
    where it is no file, or a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_to(open_lines(path), text)


def open_lines(path: str | Path, dir_fd: int | None = None) -> int:
    """Open a file of lines to be added to and return its descriptor; a link, whoever made it, is
    an OSError, and a pipe is not waited for."""
    flags = os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags, 0o666, dir_fd=dir_fd)
    except PermissionError:  # that may be written and not be read
        return os.open(path, os.O_WRONLY | flags, 0o666, dir_fd=dir_fd)


def append_to(fd: int, text: str) -> None:
    """Append whole lines by one write, so that those of others stay whole, and close the file.
    Raises OSError where it is no regular file, or not all could be written."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        data = (text if _ends_a_line(fd) else f"\n{text}").encode(errors="surrogateescape")
        if os.write(fd, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def _ends_a_line(fd: int) -> bool:
    """Tell whether a file ends with a whole line; it does not where a disk became full within one,
    or its writer was killed, and the next line must not be lost with it."""
    size = os.fstat(fd).st_size
    try:
        return size == 0 or os.pread(fd, 1, size - 1) == b"\n"
    except OSError:  # that may not be read
        return True
