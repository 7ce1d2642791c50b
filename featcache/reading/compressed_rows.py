"""Rows of an archive are read: the compressed chunks that hold a range are found by the file's
index, and decompressed into place.

To those who ask, a file of compressed chunks is one of plain rows, with the same offsets. Each
range costs the decompression of the chunks it lies in: many times the time of plain rows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import UserError
from featcache.reading.byte_ranges import CompressedChunks, RangeBatch, RowChecksumError
from featcache.storage import chunk_index, compression

# (file descriptor, path, memory, offset): fill the memory from a file
Pread = Callable[[int, str, memoryview, int], None]
Fetch = Callable[[int, int], bytes]  # so many bytes from an offset of one file
_INDEX_BYTES = 64 << 20  # of indices that are kept
Stamp = tuple[int, int, int]
_LOG = logging.getLogger(__name__)


@lru_cache
def note_archive(cache: str) -> None:
    """Say, once, that a cache is slow to read."""
    _LOG.warning("%r is an archive, and slow to read; `featcache copy` writes it out plain", cache)


class CompressedRows:
    """Reads ranges of rows from files of compressed chunks, whose indices it keeps. Safe in
    threads."""

    def __init__(self) -> None:
        self._indices: dict[str, tuple[Stamp, chunk_index.U64]] = {}

    def fill(self, batch: RangeBatch, fds: Sequence[int], pread: Pread) -> None:
        """Fill the rows of a batch that has `chunks`. Raises UserError for a damaged index,
        RowChecksumError for a row that is not what was written."""
        assert batch.chunks is not None
        files = []
        for path, fd in zip(batch.paths, fds, strict=True):
            fetch = partial(_fetch, pread, fd, path)
            entries = self._index(path, fd, batch.chunks.file_record(path), fetch)
            files.append(_File(path, batch.chunks, entries, fetch))
        crcs_of = [None] * len(batch.rows) if batch.crcs is None else batch.crcs.tolist()
        sources = zip(
            batch.rows.tolist(),
            batch.file_index.tolist(),
            batch.offsets.tolist(),
            crcs_of,
            strict=True,
        )
        for row, number, offset, crcs in sources:
            file = files[number]
            for item_offset, row_offset, size, column in batch.ranges:
                view = batch.target[row, row_offset : row_offset + size]
                if not file.read(view, offset + item_offset):
                    raise RowChecksumError(file.path, row, column)
                if crcs is not None and column >= 0 and crc32c(view.data) != crcs[column]:
                    raise RowChecksumError(file.path, row, column)

    def _index(
        self, path: str, fd: int, record: Mapping[str, Any], fetch: Fetch
    ) -> chunk_index.U64:
        """Return where the chunks of a file are (m, 2); read once, and again when the file has
        changed."""
        status = os.fstat(fd)
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        known, entries = self._indices.get(path, (None, None))
        if known == stamp and entries is not None:
            return entries
        size = chunk_index.index_bytes(record["chunks"])
        data_bytes = record["bytes"] - size
        found = None
        if data_bytes >= 0:  # else nothing is large enough to hold it
            found = chunk_index.unpack(fetch(size, data_bytes))
        if found is None or not chunk_index.is_in_order(found, data_bytes, equal=False):
            raise UserError(
                f"cache file {path}: its index of rows is not the one that was written; run "
                "`featcache verify`"
            )
        kept = list(self._indices.values())
        if sum(each.nbytes for _, each in kept) + found.nbytes > _INDEX_BYTES:
            self._indices.clear()
        self._indices[path] = (stamp, found)
        return found


def _fetch(pread: Pread, fd: int, path: str, size: int, offset: int) -> bytes:
    coded = bytearray(size)
    pread(fd, path, memoryview(coded), offset)
    return bytes(coded)


class _File:
    """One file of a batch, with the chunk that was decompressed last: of some arrays a chunk holds
    several of the wanted ranges."""

    def __init__(
        self, path: str, chunks: CompressedChunks, entries: chunk_index.U64, fetch: Fetch
    ) -> None:
        self.path, self._chunks, self._entries, self._fetch = path, chunks, entries, fetch
        self._last = -1
        self._memory = np.empty(0, np.uint8)  # of a chunk, where a part of one is wanted

    def read(self, view: npt.NDArray[np.uint8], offset: int) -> bool:
        """Fill `view` from an offset among plain rows. False where a chunk is not what was
        written."""
        done, each = 0, self._chunks.chunk_bytes
        while done < view.nbytes:
            number, begin = divmod(offset + done, each)
            count = min(each - begin, view.nbytes - done)
            if number >= len(self._entries):
                return False
            if count == each:
                if not self._decode(number, view[done : done + each]):
                    return False
            else:
                if number != self._last:
                    self._last = -1
                    self._memory = np.empty(each, np.uint8)
                    if not self._decode(number, self._memory):
                        return False
                    self._last = number
                view[done : done + count] = self._memory[begin : begin + count]
            done += count
        return True

    def _decode(self, number: int, out: npt.NDArray[np.uint8]) -> bool:
        offset, size = self._entries[number].tolist()
        # a stranger's index may claim the whole file for one chunk
        if size > self._chunks.chunk_bytes + compression.OVERHEAD:
            return False
        return compression.decode(self._chunks.compression, self._fetch(size, offset), out)
