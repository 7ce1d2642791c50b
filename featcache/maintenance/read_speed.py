"""The raw read speed of a folder's disk is measured: a file without a name is written there and
read past the page cache, within two seconds and 256 MiB."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from featcache.runtime import signals

BYTES = 256 << 20
SECONDS = 1.0  # of writing, and again of reading
_BLOCK = 4 << 20
_THREADS = 4  # as many as `featcache.open` reads with
_FREE_SHARE = 10  # at most one part in so many of what is free is written
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ReadSpeed:
    """Hold how many bytes were read in how many seconds; `direct` is False where the file system
    may have answered from memory."""

    bytes: int
    seconds: float
    direct: bool

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / max(self.seconds, 1e-9)


def measure(folder: Path) -> ReadSpeed:
    """Measure how fast four threads read a file in a folder. Raises OSError where the folder cannot
    be written, or has no room for some blocks."""
    with scratch_file(folder) as fd:
        size = _fill(fd, min(BYTES, shutil.disk_usage(folder).free // _FREE_SHARE))
        direct = _pass_page_cache(fd)
        try:
            return _read(fd, size, direct)
        except OSError:
            if not direct:
                raise
        _set_direct(fd, on=False)  # some file systems take the flag, and refuse to read
        return _read(fd, size, False)


@contextlib.contextmanager
def scratch_file(folder: Path) -> Iterator[int]:
    """Open an empty file in a folder that has no name, so that it is gone with this process,
    however that ends. Raises OSError where the folder cannot be written."""
    fd = _open_nameless(folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    # this file system makes none without a name: no signal comes between its two calls
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *signals.NOTICES})
    try:
        fd, path = tempfile.mkstemp(prefix=".doctor-", dir=folder)
        Path(path).unlink()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return fd


def _fill(fd: int, most_bytes: int) -> int:
    """Write blocks that no file system can compress, to the disk itself; return the bytes."""
    block, size, end = os.urandom(_BLOCK), 0, time.monotonic() + SECONDS
    try:
        while size + _BLOCK <= most_bytes and time.monotonic() < end:
            if os.pwrite(fd, block, size) < _BLOCK:
                break
            os.fdatasync(fd)
            size += _BLOCK
    except OSError as error:
        if error.errno not in _FULL:
            raise
    if not size:
        raise OSError(errno.ENOSPC, f"no room for {_BLOCK >> 20} MiB")
    return size


def _pass_page_cache(fd: int) -> bool:
    """Take a file out of memory, and return whether its reads go to the disk from now on."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        _set_direct(fd, on=True)
    except OSError:
        return False
    return True


def _set_direct(fd: int, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def _read(fd: int, size: int, direct: bool) -> ReadSpeed:
    offsets, lock = iter(range(0, size, _BLOCK)), threading.Lock()
    start = time.monotonic()

    def work() -> int:
        """Read blocks that no other thread reads, into memory that begins at a page."""
        got = 0
        with mmap.mmap(-1, _BLOCK) as memory:
            while time.monotonic() < start + SECONDS:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    break
                got += os.preadv(fd, [memory], offset)
        return got

    with ThreadPoolExecutor(_THREADS, "featcache-doctor") as pool:
        total = sum(each.result() for each in [pool.submit(work) for _ in range(_THREADS)])
    return ReadSpeed(total, time.monotonic() - start, direct)
