"""What is read: rows of one array from one or more files, each in one or more pieces, cut into
parts for threads.

A row's pieces go from offsets within the stored item to offsets within the row's place in memory,
with or without a crc32c to compare.
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
    """`size` bytes from `source` in an item to `place` in the row; `column` of the run's checksums,
    or -1."""

    source: int
    place: int
    size: int
    column: int = -1


class FileCheck(NamedTuple):
    """What a file must be before its bytes are believed: `sound(path, facts(path))`, asked once for
    each file."""

    sound: Callable[[Path, Mapping[str, Any]], bool]
    facts: Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class RangeBatch:
    """Rows `at` (n,) of `target` (rows, row bytes) uint8, from `offsets` (n,) in the files `paths`
    (f,): row i from paths[file[i]], file after file, without one of which there is no row."""

    paths: Sequence[str]
    target: npt.NDArray[np.uint8]
    at: npt.NDArray[np.int64]
    file: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    pieces: tuple[ByteRange, ...]
    crcs: npt.NDArray[np.uint32] | None = None  # (n, columns)
    proof: FileCheck | None = None  # that whole files are those they should be

    @property
    def row_bytes(self) -> int:
        return _bytes(self.pieces)

    def part(self, low: int, high: int) -> RangeBatch:
        first, last = int(self.file[low]), int(self.file[high - 1])
        return RangeBatch(
            self.paths[first : last + 1],
            self.target,
            self.at[low:high],
            self.file[low:high] - first,
            self.offsets[low:high],
            self.pieces,
            None if self.crcs is None else self.crcs[low:high],
            self.proof,
        )

    def by_files(self, most: int) -> Iterator[RangeBatch]:
        """The same rows in parts of at most so many files."""
        if len(self.paths) <= most:
            yield self
            return
        for first in range(0, len(self.paths), most):
            low, high = np.searchsorted(self.file, (first, first + most)).tolist()
            yield self.part(low, high)


class RowChecksumError(Exception):
    """A row's bytes are not those that were written: `row` of the target, `column` of its
    checksums."""

    def __init__(self, path: str, row: int, column: int) -> None:
        super().__init__(str(path))
        self.path, self.row, self.column = path, row, column


def split_batches(runs: Iterable[RangeBatch], part_bytes: int, files: int) -> Iterator[RangeBatch]:
    """The same rows in parts of about so many bytes, and of at most so many files."""
    for run in runs:
        step = max(part_bytes // max(run.row_bytes, 1), 1)
        for low in range(0, len(run.at), step):
            yield from run.part(low, min(low + step, len(run.at))).by_files(files)


class ContiguousRange(NamedTuple):
    """Pieces that follow each other in the file and in memory, read by one call; `parts`, from and
    to which place of the row each of them with a checksum goes, and its column."""

    source: int
    place: int
    size: int
    parts: tuple[tuple[int, int, int], ...]


@lru_cache(256)
def _bytes(pieces: tuple[ByteRange, ...]) -> int:
    return sum(piece.size for piece in pieces)


@lru_cache(256)
def merge_neighbours(
    pieces: tuple[ByteRange, ...], most: int | None
) -> tuple[ContiguousRange, ...]:
    """Neighbours together, up to `most` bytes."""
    out: list[ContiguousRange] = []
    for source, place, size, column in pieces:
        part = ((place, place + size, column),) if column >= 0 else ()
        last = out[-1] if out else None
        if (
            last is not None
            and (last.source + last.size, last.place + last.size) == (source, place)
            and (most is None or last.size + size <= most)
        ):
            out[-1] = ContiguousRange(
                last.source, last.place, last.size + size, (*last.parts, *part)
            )
        else:
            out.append(ContiguousRange(source, place, size, part))
    return tuple(out)


def contiguous_bytes(pieces: Sequence[ByteRange]) -> int:
    """Bytes from the first piece to the end of the last, where they follow each other in the file;
    else 0."""
    joined = all(one.source + one.size == other.source for one, other in pairwise(pieces))
    return pieces[-1].source + pieces[-1].size - pieces[0].source if joined else 0
