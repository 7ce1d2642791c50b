"""A batch of byte ranges names the rows of one array to be read from one or more files, and is cut
into parts for threads.

A row's ranges go from offsets within the stored item to offsets within the row in memory, with or
without a crc32c to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class ByteRange(NamedTuple):
    """`size` bytes go from `item_offset` in a stored item to `row_offset` in the row; `column` of
    the batch's checksums belongs to them, or none (-1)."""

    item_offset: int
    row_offset: int
    size: int
    column: int = -1


class FileCheck(NamedTuple):
    """A whole file is compared with its record, once, before its bytes are believed:
    `is_intact(path, file_record(path))`."""

    is_intact: Callable[[Path, Mapping[str, Any]], bool]
    file_record: Callable[[str], Mapping[str, Any]]


class CompressedChunks(NamedTuple):
    """Files hold compressed chunks, each of so many bytes before: see `compressed_rows`. Offsets
    are those of plain rows."""

    compression: str
    chunk_bytes: int
    file_record: Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class RangeBatch:
    """Fill `rows` (n,) of `target` (rows, row bytes) uint8 from `offsets` (n,) in the files `paths`
    (f,): row i from paths[file_index[i]], file after file, and no file without a row."""

    paths: Sequence[str]
    target: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]
    file_index: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    ranges: tuple[ByteRange, ...]
    crcs: npt.NDArray[np.uint32] | None = None  # (n, columns)
    file_check: FileCheck | None = None  # of each file, before the first read of it
    chunks: CompressedChunks | None = None  # None: plain rows

    @property
    def row_bytes(self) -> int:
        return _bytes(self.ranges)

    def slice(self, low: int, high: int) -> RangeBatch:
        """Return rows number `low` to `high` - 1 of the batch."""
        first, last = int(self.file_index[low]), int(self.file_index[high - 1])
        return RangeBatch(
            self.paths[first : last + 1],
            self.target,
            self.rows[low:high],
            self.file_index[low:high] - first,
            self.offsets[low:high],
            self.ranges,
            None if self.crcs is None else self.crcs[low:high],
            self.file_check,
            self.chunks,
        )

    def split_by_files(self, max_files: int) -> Iterator[RangeBatch]:
        """Yield the same rows in parts of at most so many files."""
        if len(self.paths) <= max_files:
            yield self
            return
        for first in range(0, len(self.paths), max_files):
            low, high = np.searchsorted(self.file_index, (first, first + max_files)).tolist()
            yield self.slice(low, high)


class RowChecksumError(Exception):
    """A row's bytes are not those that were written: `row` of the target, `column` of its
    checksums."""

    def __init__(self, path: str, row: int, column: int) -> None:
        super().__init__(str(path))
        self.path, self.row, self.column = path, row, column


def split_batches(
    batches: Iterable[RangeBatch], part_bytes: int, max_files: int
) -> Iterator[RangeBatch]:
    """Cut batches into parts of about so many bytes, and of at most so many files."""
    for batch in batches:
        step = max(part_bytes // max(batch.row_bytes, 1), 1)
        for low in range(0, len(batch.rows), step):
            part = batch.slice(low, min(low + step, len(batch.rows)))
            yield from part.split_by_files(max_files)


class ContiguousRange(NamedTuple):
    """Ranges that follow each other in the file and in memory are read by one call; `checks`, from
    and to which offset of the row each of them with a checksum goes, and its column."""

    item_offset: int
    row_offset: int
    size: int
    checks: tuple[tuple[int, int, int], ...]


@lru_cache(256)
def _bytes(ranges: tuple[ByteRange, ...]) -> int:
    return sum(each.size for each in ranges)


@lru_cache(256)
def merge_neighbours(
    ranges: tuple[ByteRange, ...], max_bytes: int | None
) -> tuple[ContiguousRange, ...]:
    """Merge ranges that follow each other, up to `max_bytes` bytes."""
    out: list[ContiguousRange] = []
    for item_offset, row_offset, size, column in ranges:
        check = ((row_offset, row_offset + size, column),) if column >= 0 else ()
        last = out[-1] if out else None
        if (
            last is not None
            and (last.item_offset + last.size, last.row_offset + last.size)
            == (item_offset, row_offset)
            and (max_bytes is None or last.size + size <= max_bytes)
        ):
            out[-1] = ContiguousRange(
                last.item_offset, last.row_offset, last.size + size, (*last.checks, *check)
            )
        else:
            out.append(ContiguousRange(item_offset, row_offset, size, check))
    return tuple(out)


def contiguous_bytes(ranges: Sequence[ByteRange]) -> int:
    """Count the bytes from the first range to the end of the last, where they follow each other in
    the file; else 0."""
    joined = all(one.item_offset + one.size == other.item_offset for one, other in pairwise(ranges))
    return ranges[-1].item_offset + ranges[-1].size - ranges[0].item_offset if joined else 0
