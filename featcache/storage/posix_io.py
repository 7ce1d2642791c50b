"""System calls read the bytes that were asked for, or raise an error that names the file and says
what to do."""

from __future__ import annotations

import errno
import mmap
import os
import threading

from featcache.errors import UserError

FULL = (errno.EMFILE, errno.ENFILE)  # no file descriptor is left
# O_DIRECT wants offsets, sizes and memory in whole blocks; no disk asks for more than this
_ALIGN = 4096


class NoFileDescriptorError(Exception):
    """No file can be opened before another is closed."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def read_error(path: str, error: OSError) -> UserError:
    """Return a UserError that says what to do, by the error: only a missing file is the cache's own
    fault."""
    todo = {
        errno.EINVAL: "this file system does not read past the page cache (O_DIRECT); "
        "leave --direct out",
        errno.EMFILE: "this process holds too many files open; "
        "raise the limit (`ulimit -n`) and run again",
        errno.ENFILE: "this machine holds too many files open; "
        "raise its limit (fs.file-max) and run again",
        errno.EACCES: "permission denied; allow reading it and run again",
        errno.ENOENT: "No such file or directory; run `featcache verify`",
    }
    other = f"{error.strerror}; fix the disk, or run `featcache verify`"
    return UserError(f"cache file {path}: {todo.get(error.errno or 0, other)}")


def open_error(path: str, error: OSError) -> Exception:
    return NoFileDescriptorError(error) if error.errno in FULL else read_error(path, error)


def preadv(fd: int, path: str, view: memoryview, offset: int) -> int:
    try:
        return os.preadv(fd, (view,), offset)
    except OSError as error:
        raise read_error(path, error) from error


_local = threading.local()


def pread_direct(fd: int, path: str, offset: int, count: int) -> memoryview:
    """Read `count` bytes, within whole blocks, into this thread's aligned memory; they are good
    until its next read."""
    low = offset // _ALIGN * _ALIGN
    span = -(-(offset + count) // _ALIGN) * _ALIGN - low
    scratch: mmap.mmap | None = getattr(_local, "scratch", None)
    if scratch is None or len(scratch) < span:
        # From mmap, whose memory begins at a page; private, or forked workers would read into one
        # another.
        try:
            scratch = _local.scratch = mmap.mmap(
                -1, span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:
            raise read_error(path, error) from error
    memory, got = memoryview(scratch), 0
    while got < offset - low + count:
        more = preadv(fd, path, memory[got:span], low + got)
        if not more:
            raise short_file_error(path, offset + count)
        got += more
    return memory[offset - low : offset - low + count]


def short_file_error(path: str, needed: int) -> UserError:
    return UserError(f"cache file {path}: ends before byte {needed}; run `featcache verify`")
