"""Files are kept open between reads and shared by threads, within a bound on file descriptors.

The file that was used longest ago is closed first, and none that is being read. All pools of a
process share its bound, and each closes idle files of the others where no file descriptor is left.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from featcache.storage.posix_io import FULL, NoFileDescriptorError, open_error, read_error

_MAX_OPEN_FILES = 16384
_PATIENCE_S = 1.0  # for a file descriptor, when nobody reads


@dataclass(eq=False, slots=True)
class OpenFile:
    """An open file, and how many read from it just now."""

    path: str
    fd: int
    users: int = 0

    def close(self) -> None:
        with contextlib.suppress(OSError):  # nothing was written that could be lost
            os.close(self.fd)


class FilePool:
    """Opens files with `flags`. Safe in several threads and after a fork; holds at most `limit`
    files open, besides those that are read at the moment."""

    def __init__(self, flags: int) -> None:
        self.limit = min(_raise_descriptor_limit() // 2, _MAX_OPEN_FILES)
        self._flags = flags
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        """A new lock: at first, and in a forked child, where no other thread uses a file any
        more."""
        # a pool that is collected closes its files, in any thread, between any two lines
        self._lock = threading.RLock()
        for file in self._files.values():
            file.users = 0

    @property
    def share(self) -> int:
        """Return the number of files that this pool may hold open beside the other pools."""
        return self.limit // max(len(_pools), 1)

    def acquire(self, paths: Sequence[str]) -> list[OpenFile]:
        """Open files to read from; they stay open until `release`, and afterwards until the bound
        needs the file descriptors of those that were used longest ago."""
        acquired: list[OpenFile] = []
        try:
            for path in paths:
                acquired.append(self._find(path) or self._open(path))
        except BaseException:
            self.release(acquired)
            raise
        return acquired

    def _find(self, path: str) -> OpenFile | None:
        with self._lock:
            if file := self._files.get(path):
                file.users += 1
                self._files.move_to_end(path)
            return file

    def _open(self, path: str) -> OpenFile:
        """Opening may take long on a file system far away, and holds no lock."""
        fresh = OpenFile(path, self._open_descriptor(path))
        with self._lock:
            file = self._files.setdefault(path, fresh)
            file.users += 1
            if file is fresh:
                self._evict(self.share)
            else:  # another thread opened it meanwhile
                fresh.close()
        return file

    def _open_descriptor(self, path: str) -> int:
        """A full table of open files may be full of ours, of any pool: those that nobody reads
        from are closed."""
        try:
            return os.open(path, self._flags)
        except OSError as error:
            if error.errno not in FULL:
                raise read_error(path, error) from error
        self._evict_all()
        try:
            return os.open(path, self._flags)
        except OSError as error:
            raise open_error(path, error) from error

    def release(self, files: Sequence[OpenFile]) -> None:
        """Give back what `acquire` gave; a file that was closed meanwhile is closed for good."""
        with self._lock:
            for file in files:
                file.users -= 1
                if not file.users and self._files.get(file.path) is not file:
                    file.close()

    def wait_for_descriptor(self, path: str, read: Callable[[], None]) -> None:
        """Call `read` until it finds the file descriptors that it needs, which others give back.

        Raises UserError for `path` when it finds none although nobody has been reading for a
        while.
        """
        end = time.monotonic() + _PATIENCE_S
        while True:
            self._evict_all()
            try:
                return read()
            except NoFileDescriptorError as error:
                if any(file.users for pool in list(_pools) for file in list(pool._files.values())):
                    end = time.monotonic() + _PATIENCE_S
                if time.monotonic() > end:
                    raise read_error(path, error.error) from error
                time.sleep(0.005)

    def _evict_all(self) -> None:
        """Close the idle files of all pools; a pool that is locked just now is left alone, or two
        could wait for each other."""
        with self._lock:
            self._evict(0)
        for other in list(_pools):
            if other is not self and other._lock.acquire(blocking=False):
                try:
                    other._evict(0)
                finally:
                    other._lock.release()

    def _evict(self, keep: int) -> None:
        """Close what was used longest ago until `keep` are open; under the lock."""
        idle = (file for file in self._files.values() if not file.users)
        for file in list(islice(idle, max(len(self._files) - keep, 0))):
            self._files.pop(file.path).close()

    def close(self) -> None:
        """Close all files; `acquire` opens them again. What another thread reads from is closed
        when it is released."""
        with self._lock:
            files, self._files = self._files, OrderedDict()
            for file in files.values():
                if not file.users:
                    file.close()


_pools: weakref.WeakSet[FilePool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._start()


os.register_at_fork(after_in_child=_after_fork)


def _raise_descriptor_limit() -> int:
    """Files this process may hold open, after asking for as many as it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft if soft > 0 else 2 * _MAX_OPEN_FILES
