"""Regular files are opened and read, and nothing else: a named pipe would be waited for without
end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from featcache.pictures.source import PictureError

LARGEST_BYTES = 2_000_000_000  # of a picture; the largest that Pillow opens are smaller


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor. Raises OSError at anything else,
    without waiting for it."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
    return fd


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a whole file. Raises OSError, and PictureError where it's too large for a picture."""
    fd = open_regular(path)
    try:
        return _pread(fd, 0, check_size(os.fstat(fd).st_size), path)
    finally:
        os.close(fd)


def read_range(
    path: str | os.PathLike[str],
    offset: int,
    size: int,
    segments: Sequence[tuple[int, int]] | None = None,
) -> bytes:
    """Read bytes of a file; of a sparse member its `segments` (place in it, bytes), which lie one
    after the other from `offset` on, with zeros between. Raises as `read_file` does."""
    # One open a read: no descriptor to share between threads or to lose over a fork, and 10 us
    # beside a decode. A pipe fails at pread.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if segments is None:
            return _pread(fd, offset, check_size(size), path)
        out = bytearray(check_size(size))
        for begin, count in segments:
            out[begin : begin + count] = _pread(fd, offset, count, path)
            offset += count
        return bytes(out)
    finally:
        os.close(fd)


def check_size(size: int) -> int:
    """Return the bytes of a picture. Raises PictureError where they are too many."""
    if size > LARGEST_BYTES:
        raise PictureError(f"{size} bytes: a picture has at most {LARGEST_BYTES}")
    return size


def _pread(fd: int, offset: int, size: int, path: str | os.PathLike[str]) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) < size:
        raise OSError(errno.EIO, "ends within it", os.fspath(path))
    return data
