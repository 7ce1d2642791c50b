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
from featcache.reading.compressed_rows import CompressedRows
from featcache.reading.far_ranges import read_far
from featcache.reading.file_pool import FilePool
from featcache.runtime.meter import meter
from featcache.storage.files import files_of
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


def choose_io(io: str, cache_bytes: int) -> str:
    """Return the kind of reads for a cache of so many bytes: `auto` is streaming where memory
    cannot hold them. Raises UsageError for a kind that is not in IO."""
    if io not in IO:
        raise UsageError(f"io {io!r}: one of {', '.join(IO)} is allowed")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ("streaming" if cache_bytes > memory else "buffered") if io == "auto" else io


_SMALL_ITEM_BYTES = 4096  # items up to this are read many at a time where they lie close
_GATHER_ITEMS = 8  # such items of a file, and more, are worth one read of all that is between them
_GATHER_SPAN_BYTES = 256 << 10  # from the first to the last of such items, at most
# read at once where checksums are compared: the bytes are still in a core's own cache then
_CHECKED_BYTES = 512 << 10
_PARTS_PER_THREAD = 4  # of a read
_INLINE_BYTES = 1 << 20  # less than this is read by the caller alone


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
        self._compressed = CompressedRows()
        # path -> (inode, mtime_ns) when it was as recorded
        self._checked_files: dict[str, tuple[int, int]] = {}
        self._loops_compiled = False  # from the first large read on
        self._start()
        _readers.add(self)

    def _start(self) -> None:
        """A new lock and no threads: at first, and in a forked child, whose other threads are not
        there any more."""
        # a cache that is collected closes its reader, in any thread, between any two lines
        self._lock = threading.RLock()
        self._executor: ThreadPoolExecutor | None = None

    def read(self, batches: Sequence[RangeBatch]) -> None:
        """Fill the target of every batch. Raises UserError for a missing or short file,
        RowChecksumError for a wrong checksum."""
        total = sum(batch.row_bytes * len(batch.rows) for batch in batches)
        self._read(batches, total)
        meter.count("bytes_read", total)

    def _read(self, batches: Sequence[RangeBatch], total: int) -> None:
        files = max(self._files.share // self.threads, 1)
        if total < _INLINE_BYTES:
            self._read_parts(split_batches(batches, _INLINE_BYTES, files))
            return
        if self.io == "buffered" and not self._loops_compiled:
            self._loops_compiled = _load_compiled_loops()
        if self.threads == 1:
            self._read_parts(split_batches(batches, total, files))
            return
        parts = deque(split_batches(batches, total // (_PARTS_PER_THREAD * self.threads), files))
        with self._lock:
            executor = self._executor = self._executor or ThreadPoolExecutor(
                self.threads - 1, "featcache-read"
            )
        others: list[Future[None]] = []
        # closed in this moment by another thread: then we read alone
        with contextlib.suppress(RuntimeError):
            for _ in range(self.threads - 1):
                others.append(executor.submit(self._read_parts, _drain(parts)))
        try:
            self._read_parts(_drain(parts))
        finally:
            parts.clear()  # after an error nobody starts another part
            errors = [error for other in others if (error := other.exception())]
        if errors:
            raise errors[0]

    def _read_parts(self, parts: Iterator[RangeBatch]) -> None:
        for batch in parts:
            try:
                self._read_batch(batch)
            except NoFileDescriptorError:
                if len(batch.paths) == 1:
                    self._read_alone(batch)
                else:
                    self._read_parts(batch.split_by_files(len(batch.paths) // 2))

    def _read_batch(self, batch: RangeBatch) -> None:
        if files_of(batch.paths[0]).may_be_far and self._read_far(batch):
            return
        files = self._files.acquire(batch.paths)
        try:
            if batch.file_check:
                for file in files:
                    self._check_file(file.path, file.fd, batch.file_check)
            self._fill(batch, [file.fd for file in files])
        finally:
            self._files.release(files)

    def _read_far(self, batch: RangeBatch) -> bool:
        """Read what no file here holds from where it is; False where all of it is here now. Small
        files that are compared whole are brought, and so are archives."""
        place = files_of(batch.paths[0])
        if batch.file_check or batch.chunks:
            place.bring(batch.paths)
            return False
        if not any(map(place.is_far, batch.paths)):
            return False
        for part in batch.split_by_files(1):
            if place.is_far(part.paths[0]):
                read_far(part, place)
            else:
                self._read_batch(part)
        return True

    def _read_alone(self, batch: RangeBatch) -> None:
        """Read a batch of one file with file descriptors that others give back. The check of the
        whole file, which opens it once more, comes first."""
        path = batch.paths[0]

        def read() -> None:
            if batch.file_check:
                self._check_file(path, path, batch.file_check)
            self._read_batch(batch)

        self._files.wait_for_descriptor(path, read)

    def _check_file(self, path: str, file: int | str, check: FileCheck) -> None:
        """Compare a file with its record, once, and again when it has changed or was replaced."""
        try:
            status = os.stat(file)  # noqa: PTH116
            stamp = (status.st_ino, status.st_mtime_ns)
            if self._checked_files.get(path) == stamp:
                return
            record = check.file_record(path)
            intact = status.st_size == record["bytes"] and check.is_intact(Path(path), record)
        except OSError as error:
            raise open_error(path, error) from error
        if status.st_size < record["bytes"]:
            raise short_file_error(path, record["bytes"])
        if not intact:
            raise UserError(
                f"cache file {path}: its bytes are not those that were recorded; run `featcache "
                "verify`"
            )
        self._checked_files[path] = stamp

    def _fill(self, batch: RangeBatch, fds: Sequence[int]) -> None:
        if batch.chunks is not None:
            self._compressed.fill(batch, fds, self._pread)
            return
        many = len(batch.rows) >= _GATHER_ITEMS * len(batch.paths)
        if not many or batch.row_bytes > _SMALL_ITEM_BYTES:
            self._fill_by_range(batch, fds)
            return
        for part, fd in zip(batch.split_by_files(1), fds, strict=True):
            if not self._fill_by_gather(part, fd):
                self._fill_by_range(part, [fd])

    def _fill_by_range(self, batch: RangeBatch, fds: Sequence[int]) -> None:
        """Read range after range: by compiled loops where there is much to read, and they can."""
        if self._loops_compiled:
            from featcache.reading import crc32c_jit, native_read

            if crc32c_jit.CHECKS or (crc32c_jit.READS and batch.crcs is None):
                # The fallback reads on where a signal cut a read short; a short file is an error.
                native_read.read_ranges(
                    fds,
                    batch,
                    _CHECKED_BYTES,
                    lambda file, *where: self._pread(fds[file], batch.paths[file], *where),
                )
                return
        memory = batch.target.reshape(-1).data
        width, rows = batch.target.shape[1], batch.rows.tolist()
        merged = merge_neighbours(batch.ranges, _CHECKED_BYTES if batch.crcs is not None else None)
        crcs_of: list[Any] = batch.crcs.tolist() if batch.crcs is not None else [None] * len(rows)
        buffered = self.io == "buffered"
        first = batch.ranges[0].item_offset
        whole = contiguous_bytes(batch.ranges) if self.io == "direct" else 0
        sources = zip(rows, batch.file_index.tolist(), batch.offsets.tolist(), crcs_of, strict=True)
        for row, file, offset, crcs in sources:
            base, fd, path = row * width, fds[file], batch.paths[file]
            block = pread_direct(fd, path, offset + first, whole) if whole else None
            for item_offset, row_offset, size, checks in merged:
                view = memory[base + row_offset : base + row_offset + size]
                if block is not None:
                    view[:] = block[item_offset - first :][:size]
                elif not buffered or preadv(fd, path, view, offset + item_offset) != size:
                    self._pread(fd, path, view, offset + item_offset)
                if crcs is None:
                    continue
                for low, high, column in checks:
                    part = view if high - low == size else memory[base + low : base + high]
                    if crc32c(part) != crcs[column]:
                        raise RowChecksumError(path, row, column)

    def _fill_by_gather(self, batch: RangeBatch, fd: int) -> bool:
        """Read small items of a file that lie close by one read of all that is between them, then a
        gather. False where they don't."""
        low, high = int(batch.offsets.min()), int(batch.offsets.max())
        first = min(each.item_offset for each in batch.ranges)
        last = max(each.item_offset + each.size for each in batch.ranges)
        span = high - low + last - first
        if span > max(_GATHER_SPAN_BYTES, 4 * batch.row_bytes * len(batch.rows)):
            return False
        memory = np.empty(span, np.uint8)
        self._pread(fd, batch.paths[0], memory.data, low + first)
        for item_offset, row_offset, size, _ in batch.ranges:
            begin = item_offset - first
            columns = (batch.offsets - low)[:, None] + np.arange(begin, begin + size)
            batch.target[batch.rows, row_offset : row_offset + size] = memory[columns]
        if batch.crcs is not None:
            for row, crcs in zip(batch.rows.tolist(), batch.crcs.tolist(), strict=True):
                view = batch.target[row].data
                for _, row_offset, size, column in batch.ranges:
                    if column >= 0 and crc32c(view[row_offset : row_offset + size]) != crcs[column]:
                        raise RowChecksumError(batch.paths[0], row, column)
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


def _load_compiled_loops() -> bool:
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
