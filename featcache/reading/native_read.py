"""Many byte ranges of a file are read into memory, and their crc32c compared, by one call that
holds no lock of the interpreter.

A thread that reads 90 kB by os.preadv is back after ten microseconds and waits for the interpreter,
which another thread has just then: with two threads, short reads take a fifth longer than the same
calls made from here. Checking a range between two reads waits twice as often, while its bytes leave
the core's own cache.

n rows, g merged ranges of a row, m parts of them that have a checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core.typing import signature

from featcache.reading.byte_ranges import ByteRange, RangeBatch, RowChecksumError, merge_neighbours
from featcache.reading.crc32c_jit import CHECKS, _crc32c
from featcache.runtime.jit import compiled

I64 = npt.NDArray[np.int64]
_MAX_CALL_BYTES = 32 << 20  # bytes of a call, during which a process does not answer to Ctrl-C

_pread = types.ExternalFunction(
    "pread", signature(types.int64, types.int32, types.uintp, types.uintp, types.int64)
)


@compiled
def _read(files, memory, width, rows, file_index, offsets, merged, i):  # type: ignore[no-untyped-def]  # numba infers the types
    """Read merged range i; False where it came short."""
    item_offset, row_offset, size = merged[i % len(merged)]
    i_row = i // len(merged)
    fd = np.int32(files[file_index[i_row]])
    address = np.uint64(memory + rows[i_row] * width + row_offset)
    return _pread(fd, address, np.uint64(size), offsets[i_row] + item_offset) == size  # type: ignore[call-overload]


@compiled
def _first_mismatch(memory, width, rows, parts, until, crcs, i):  # type: ignore[no-untyped-def]
    """The first part of merged range i whose bytes differ from its checksum, or -1."""
    i_row, i_range = i // (len(until) - 1), i % (len(until) - 1)
    for part in range(until[i_range], until[i_range + 1]):
        row_offset, size, column = parts[part]
        address = np.uint64(memory + rows[i_row] * width + row_offset)
        if _crc32c(address, size) != crcs[i_row, column]:
            return part
    return -1


@compiled
def _read_all(files, memory, width, rows, file_index, offsets, merged, low, high):  # type: ignore[no-untyped-def]
    for i in range(low, high):
        if not _read(files, memory, width, rows, file_index, offsets, merged, i):
            return i, -1
    return high, -1


@compiled
def _read_checked(  # type: ignore[no-untyped-def]
    files, memory, width, rows, file_index, offsets, merged, low, high, parts, until, crcs
):
    for i in range(low, high):
        if not _read(files, memory, width, rows, file_index, offsets, merged, i):
            return i, -1
        part = _first_mismatch(memory, width, rows, parts, until, crcs, i)
        if part >= 0:
            return i, part
    return high, -1


def compile_loops() -> None:
    """Compile, or load what was compiled: both open files of their own, for which there may be no
    file descriptor later."""
    none, merged, until = np.zeros(0, np.int64), np.zeros((1, 3), np.int64), np.zeros(2, np.int64)
    source = np.zeros(0, np.int32), 0, 0, none, none, none, merged, 0, 0
    _read_all(*source)
    if CHECKS:
        _read_checked(*source, merged, until, np.zeros((0, 0), np.uint32))
        _first_mismatch(0, 0, none, merged, until, np.zeros((0, 0), np.uint32), 0)


class _RangeTable(NamedTuple):
    """The ranges of a row as arrays: `merged` (g, 3) item offset, row offset and size; `parts`
    (m, 3) row offset, size and column of what has a checksum, those of each merged range up to
    `until` (g + 1,); a row's bytes from `low` to `high` are written."""

    merged: I64
    parts: I64
    until: I64
    low: int
    high: int


@lru_cache(256)
def _range_table(ranges: tuple[ByteRange, ...], max_bytes: int | None) -> _RangeTable:
    neighbours = merge_neighbours(ranges, max_bytes)
    merged = np.array([each[:3] for each in neighbours], np.int64)
    parts = np.array(
        [(low, high - low, column) for each in neighbours for low, high, column in each.checks],
        np.int64,
    )
    until = np.cumsum([0, *(len(each.checks) for each in neighbours)])
    low, high = merged[:, 1].min(), (merged[:, 1] + merged[:, 2]).max()
    return _RangeTable(merged, parts.reshape(-1, 3), until, int(low), int(high))


def read_ranges(
    files: Sequence[int],
    batch: RangeBatch,
    checked_bytes: int,
    fallback: Callable[[int, memoryview, int], None],
) -> None:
    """Fill a batch from its open `files` (f,); where it has checksums by about `checked_bytes`,
    which are compared while a core's own cache holds them. `fallback(file, view, offset)` fills
    what a call did not read whole. Raises RowChecksumError for a wrong checksum."""
    table = _range_table(batch.ranges, None if batch.crcs is None else checked_bytes)
    rows, width = batch.target.shape
    if not batch.target.flags.carray:
        raise ValueError("memory must be contiguous and writable")
    if batch.rows.min() < 0 or batch.rows.max() >= rows or table.low < 0 or table.high > width:
        raise IndexError(
            f"rows {batch.rows.min()} ... {batch.rows.max()}, "
            f"bytes {table.low} ... {table.high} of {rows, width}"
        )
    memory = batch.target.ctypes.data, width, batch.rows
    checks = table.parts, table.until, batch.crcs
    source = np.array(files, np.int32), *memory, batch.file_index, batch.offsets, table.merged
    i, end = 0, len(batch.rows) * len(table.merged)
    step = max(_MAX_CALL_BYTES // int(table.merged[:, 2].max()), 1)
    while i < end:
        high = min(i + step, end)
        i, part = (
            _read_all(*source, i, high)
            if batch.crcs is None
            else _read_checked(*source, i, high, *checks)
        )
        i_row, i_range = divmod(i, len(table.merged))
        if part < 0 and i < high:
            item_offset, row_offset, size = table.merged[i_range].tolist()
            first = int(batch.rows[i_row]) * width + row_offset
            view = batch.target.reshape(-1).data[first : first + size]
            fallback(int(batch.file_index[i_row]), view, int(batch.offsets[i_row]) + item_offset)
            part = -1 if batch.crcs is None else _first_mismatch(*memory, *checks, i)
            i += 1
        if part >= 0:
            path = batch.paths[batch.file_index[i_row]]
            raise RowChecksumError(path, int(batch.rows[i_row]), int(table.parts[part][2]))
