"""Rows of files in an object store are read by ranges, many at once, and their checksums compared;
or fetched ahead of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from featcache.reading.byte_ranges import (
    ContiguousRange,
    RangeBatch,
    RowChecksumError,
    merge_neighbours,
)
from featcache.storage.files import Files, files_of


def read_far(batch: RangeBatch, place: Files) -> None:
    """Fill the rows of a batch of one file; what a stage holds and is not as it was written is
    fetched again. Raises RowChecksumError where the file itself is damaged."""
    try:
        _fill(batch, place)
    except RowChecksumError:
        _, starts, lengths = _pieces(batch)
        if not place.distrust(batch.paths[0], starts, lengths):
            raise
        _fill(batch, place)


def _fill(batch: RangeBatch, place: Files) -> None:
    merged, starts, lengths = _pieces(batch)
    pieces = iter(place.read_ranges(batch.paths[0], starts, lengths))
    for i, row in enumerate(batch.rows.tolist()):
        memory = batch.target[row]
        for each in merged:
            memory[each.row_offset : each.row_offset + each.size] = np.frombuffer(
                next(pieces), np.uint8
            )
            if batch.crcs is None:
                continue
            for low, high, column in each.checks:
                if crc32c(memory[low:high].data) != batch.crcs[i, column]:
                    raise RowChecksumError(batch.paths[0], row, column)


def fetch(batches: Sequence[RangeBatch]) -> bool:
    """Have fetched what `read_far` would read; False where there is no room for some of it."""
    far: dict[Files, list[tuple[str, int, int]]] = {}
    for batch in batches:
        place = files_of(batch.paths[0]) if batch.paths else None
        if place is None or not place.may_be_far:
            continue
        if batch.file_check or batch.chunks:
            place.bring(batch.paths)
            continue
        for part in batch.split_by_files(1):
            path = part.paths[0]
            if place.is_far(path):
                _, starts, lengths = _pieces(part)
                far.setdefault(place, []).extend(
                    (path, *each) for each in zip(starts, lengths, strict=True)
                )
    done = [place.fetch(wanted) for place, wanted in far.items()]
    return all(done)


def _pieces(batch: RangeBatch) -> tuple[tuple[ContiguousRange, ...], list[int], list[int]]:
    """Return the ranges of a row, and where those of all rows begin, with their lengths."""
    merged = merge_neighbours(batch.ranges, None)
    first = np.array([each.item_offset for each in merged])
    starts = (batch.offsets[:, None] + first).ravel().tolist()
    return merged, starts, [each.size for each in merged] * len(batch.rows)
