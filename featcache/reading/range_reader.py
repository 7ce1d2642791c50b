"""Byte ranges of many files are read into memory by a few threads, and their checksums compared as
the bytes come, through the page cache or past it.

Threads take slices of batches (`byte_ranges`) until none is left; reads and crc32c leave the
interpreter's lock while they work, and through the page cache many ranges are read without it
(`native_read`). `file_pool` keeps the files open.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import UsageError, UserError
from featcache.reading.byte_ranges import (
    FileCheck,
    RangeBatch,
    RowChecksumError,
    contiguous_bytes,
    merge_neighbours,
    split_batches,
)
from featcache.reading.file_pool import FilePool
from featcache.storage.posix_io import (
    FULL,
    NoFileDescriptorError,
    open_error,
    pread_direct,
    preadv,
    read_error,
    short_file_error,
)

IO = ("auto", "buffered", "streaming", "direct")
_SMALL = 4096  # items up to this are read many at a time where they lie close
_CLOSE = 8  # such items of a file, and more, are worth one read of all that is between them
_SPAN = 256 << 10  # how far apart the first and last of such items may lie
_HOT = 512 << 10  # bytes read at once where they are checked: still in a core's own cache then
_PARTS = 4  # of a read, for each thread
_INLINE = 1 << 20  # less than this is read by the caller alone


class RangeReader:
    """Reads batches of byte ranges. Safe in several threads and after a fork."""

    def __init__(self, threads: int | None = None, io: str = "buffered") -> None:
        if io not in IO[1:]:
            raise UsageError(f"io {io!r}: one of {', '.join(IO)} is allowed")
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise UsageError(f"threads {threads!r}: a whole number, at least 1, is needed")
        # Past the page cache a thread waits for the disk, then copies: more of them keep both busy.
        cores = len(os.sched_getaffinity(0))
        self.threads = threads or (2 * min(4, cores) if io == "direct" else min(4, cores))
        self.io = io
        self._files = FilePool(os.O_RDONLY | (os.O_DIRECT if io == "direct" else 0))
        # path -> (inode, mtime_ns) when its proof held
        self._proven: dict[str, tuple[int, int]] = {}
        self._by_machine_code = False  # from the first large read on
        self._start()
        _readers.add(self)

    def _start(self) -> None:
        """A new lock and no threads: at first, and in a forked child, whose other threads are not
        there any more."""
        # a cache that is collected closes its reader, in any thread, between any two lines
        self._lock = threading.RLock()
        self._executor: ThreadPoolExecutor | None = None

    def read(self, runs: Sequence[RangeBatch]) -> None:
        """Fill every run. Raises UserError for a missing or short file, BadRow for a wrong
        checksum."""
        total = sum(run.row_bytes * len(run.at) for run in runs)
        files = max(self._files.share // self.threads, 1)
        if total < _INLINE:
            self._work(split_batches(runs, _INLINE, files))
            return
        if self.io == "buffered" and not self._by_machine_code:
            self._by_machine_code = _load_machine_code()
        if self.threads == 1:
            self._work(split_batches(runs, total, files))
            return
        parts = deque(split_batches(runs, total // (_PARTS * self.threads), files))
        with self._lock:
            executor = self._executor = self._executor or ThreadPoolExecutor(
                self.threads - 1, "featcache-read"
            )
        others: list[Future[None]] = []
        # closed in this moment by another thread: then we read alone
        with contextlib.suppress(RuntimeError):
            for _ in range(self.threads - 1):
                others.append(executor.submit(self._work, _drain(parts)))
        try:
            self._work(_drain(parts))
        finally:
            parts.clear()  # after an error nobody starts another part
            errors = [error for other in others if (error := other.exception())]
        if errors:
            raise errors[0]

    def _work(self, parts: Iterator[RangeBatch]) -> None:
        for run in parts:
            try:
                self._read_run(run)
            except NoFileDescriptorError:
                if len(run.paths) == 1:
                    self._read_alone(run)
                else:
                    self._work(run.by_files(len(run.paths) // 2))

    def _read_run(self, run: RangeBatch) -> None:
        files = self._files.acquire(run.paths)
        try:
            if run.proof:
                for file in files:
                    self._prove(file.path, file.fd, run.proof)
            self._fill(run, [file.fd for file in files])
        finally:
            self._files.release(files)

    def _read_alone(self, run: RangeBatch) -> None:
        """A run of one file, with file descriptors that others give back. Its proof, which opens it
        once more, comes first."""
        path = run.paths[0]

        def read() -> None:
            if run.proof:
                self._prove(path, path, run.proof)
            self._read_run(run)

        self._files.wait_for_descriptor(path, read)

    def _prove(self, path: str, file: int | str, proof: FileCheck) -> None:
        """Once for each file, and again when it has changed or another has taken its place."""
        try:
            status = os.stat(file)  # noqa: PTH116
            stamp = (status.st_ino, status.st_mtime_ns)
            if self._proven.get(path) == stamp:
                return
            facts = proof.facts(path)
            sound = status.st_size == facts["bytes"] and proof.sound(Path(path), facts)
        except OSError as error:
            raise open_error(path, error) from error
        if status.st_size < facts["bytes"]:
            raise short_file_error(path, facts["bytes"])
        if not sound:
            raise UserError(
                f"cache file {path}: its bytes are not those that were recorded; run `featcache "
                "verify`"
            )
        self._proven[path] = stamp

    def _fill(self, run: RangeBatch, fds: Sequence[int]) -> None:
        if run.row_bytes <= _SMALL and len(run.at) >= _CLOSE * len(run.paths):
            for part, fd in zip(run.by_files(1), fds, strict=True):
                if not self._fill_together(part, fd):
                    self._fill_apart(part, [fd])
        else:
            self._fill_apart(run, fds)

    def _fill_apart(self, run: RangeBatch, fds: Sequence[int]) -> None:
        """Range after range: by machine code where there is much to read, and it can."""
        if self._by_machine_code:
            from featcache.reading import crc32c_jit, native_read

            if crc32c_jit.CHECKS or (crc32c_jit.READS and run.crcs is None):
                # By hand: a signal cut it short, or the file is: then an error.
                native_read.read_ranges(
                    fds,
                    run,
                    _HOT,
                    lambda file, *where: self._pread(fds[file], run.paths[file], *where),
                )
                return
        memory = run.target.reshape(-1).data
        width = run.target.shape[1]
        groups = merge_neighbours(run.pieces, _HOT if run.crcs is not None else None)
        checks: list[Any] = run.crcs.tolist() if run.crcs is not None else [None] * len(run.at)
        plain = self.io == "buffered"
        first, whole = (
            run.pieces[0].source,
            contiguous_bytes(run.pieces) if self.io == "direct" else 0,
        )
        rows = zip(run.at.tolist(), run.file.tolist(), run.offsets.tolist(), checks, strict=True)
        for row, file, offset, crcs in rows:
            base, fd, path = row * width, fds[file], run.paths[file]
            block = pread_direct(fd, path, offset + first, whole) if whole else None
            for source, place, size, parts in groups:
                view = memory[base + place : base + place + size]
                if block is not None:
                    view[:] = block[source - first :][:size]
                elif not plain or preadv(fd, path, view, offset + source) != size:
                    self._pread(fd, path, view, offset + source)
                if crcs is None:
                    continue
                for low, high, column in parts:
                    whole_view = high - low == size
                    if (
                        crc32c(view if whole_view else memory[base + low : base + high])
                        != crcs[column]
                    ):
                        raise RowChecksumError(path, row, column)

    def _fill_together(self, run: RangeBatch, fd: int) -> bool:
        """Small items of a file that lie close: one read of all that is between them, then a
        gather. False where they don't."""
        low, high = int(run.offsets.min()), int(run.offsets.max())
        first, last = (
            min(piece.source for piece in run.pieces),
            max(piece.source + piece.size for piece in run.pieces),
        )
        span = high - low + last - first
        if span > max(_SPAN, 4 * run.row_bytes * len(run.at)):
            return False
        memory = np.empty(span, np.uint8)
        self._pread(fd, run.paths[0], memory.data, low + first)
        for source, place, size, _ in run.pieces:
            columns = (run.offsets - low)[:, None] + np.arange(
                source - first, source - first + size
            )
            run.target[run.at, place : place + size] = memory[columns]
        if run.crcs is not None:
            for row, crcs in zip(run.at.tolist(), run.crcs.tolist(), strict=True):
                view = run.target[row].data
                for _, place, count, column in run.pieces:
                    if column >= 0 and crc32c(view[place : place + count]) != crcs[column]:
                        raise RowChecksumError(run.paths[0], row, column)
        return True

    def _pread(self, fd: int, path: str, view: memoryview, offset: int) -> None:
        """Fill `view` from the file; what is short or missing is an error, never zeros."""
        if self.io == "direct":
            view[:] = pread_direct(fd, path, offset, len(view))
            return
        start, count = offset, len(view)
        while view:
            got = preadv(fd, path, view, offset)
            if not got:
                raise short_file_error(path, offset + len(view))
            view, offset = view[got:], offset + got
        if self.io == "streaming":
            try:
                os.posix_fadvise(fd, start, count, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise read_error(path, error) from error

    def close(self) -> None:
        """Close all files; the next read opens them again. What another thread reads from is closed
        when it is done."""
        with self._lock:
            executor, self._executor = self._executor, None
        self._files.close()
        if executor is not None:
            executor.shutdown(wait=True)


def _load_machine_code() -> bool:
    """Load the compiled loops. False where no file descriptor is left to load them by: ranges are
    then read one by one, until the next large read."""
    try:
        with _loading:
            from featcache.reading import native_read  # which a few small reads do without

            native_read.compile_loops()
    except OSError as error:
        if error.errno in FULL:
            return False
        raise UserError(
            f"machine code for reading cannot be kept: {error}; make room there, or name a folder "
            "with NUMBA_CACHE_DIR"
        ) from error
    return True


_readers: weakref.WeakSet[RangeReader] = weakref.WeakSet()


def _after_fork() -> None:
    for reader in list(_readers):
        reader._start()


os.register_at_fork(after_in_child=_after_fork)
# a fork waits until no thread loads a module, or its child would wait for ever
_loading = threading.Lock()
os.register_at_fork(
    before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
)


def _drain(parts: deque[RangeBatch]) -> Iterator[RangeBatch]:
    while True:
        try:
            yield parts.popleft()
        except IndexError:
            return
