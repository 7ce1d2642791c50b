"""The bytes that a read asks for are located: rows of the request by file, ranges within an item,
batches over the files of a part.

n rows asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.reading.byte_ranges import ByteRange, CompressedChunks, FileCheck, RangeBatch
from featcache.storage import checksums
from featcache.storage.chunk_index import chunk_bytes
from featcache.storage.keys import I64
from featcache.storage.part import FileRows, Part
from featcache.storage.store import Array


class RowLocations(NamedTuple):
    """The positions in a request are sorted by file, with the shard and view of each."""

    positions: I64
    shards: I64
    views: I64

    def select(self, mask: npt.NDArray[np.bool_]) -> RowLocations:
        return self if mask.all() else RowLocations(*(each[mask] for each in self))


def locate_rows(starts: I64, rows: I64, views: I64) -> RowLocations:
    """Locate the rows and views (n,) of a request; shard i begins at row starts[i]."""
    shards = np.searchsorted(starts, rows, side="right") - 1
    positions = np.lexsort((rows, views, shards))
    return RowLocations(positions, shards[positions], views[positions])


def range_batches(
    part: Part,
    spec: Array,
    target: npt.NDArray[np.uint8],
    rows: I64,
    locations: RowLocations,
    ranges: tuple[ByteRange, ...],
    crcs: npt.NDArray[np.uint32] | None = None,
    file_check: FileCheck | None = None,
) -> list[RangeBatch]:
    """Make one batch of an array's items at these locations, or none where there are no rows."""
    positions, shards, views = locations
    if not len(positions):
        return []
    first = np.flatnonzero(np.append(True, (np.diff(shards) != 0) | (np.diff(views) != 0)))
    counts = np.diff(first, append=len(positions))
    files = FileRows(shards[first], views[first], counts)
    paths, offsets = part.locate_all(spec, files, rows[positions])
    file_index = np.repeat(np.arange(len(first)), counts)
    return [
        RangeBatch(
            paths,
            target,
            positions,
            file_index,
            offsets,
            ranges,
            None if crcs is None else crcs[positions],
            file_check,
            _chunks(part, spec),
        )
    ]


def _chunks(part: Part, spec: Array) -> CompressedChunks | None:
    """Describe the chunks of an archive's array, None of one that lies plain."""
    if not (part.compression and spec.split):
        return None
    return CompressedChunks(part.compression, chunk_bytes(spec), part.file_record)


def byte_ranges(
    part: Part, name: str, levels: tuple[int, ...], tokens: int
) -> tuple[ByteRange, ...]:
    """Return the ranges to read of one item: of the wanted levels that this part holds, or the
    whole."""
    spec = part.arrays[name]
    first = checksums.side_columns(part.arrays.values()).get(name, 0)
    if not checksums.has_levels(spec):
        return (ByteRange(0, 0, spec.item_bytes, first),)
    level_bytes = spec.item_bytes // spec.item[0]
    wanted_bytes = level_bytes // spec.item[1] * tokens
    here = [(i, part.levels.index(level)) for i, level in enumerate(levels) if level in part.levels]
    return tuple(
        ByteRange(stored * level_bytes, i * wanted_bytes, wanted_bytes, first + stored)
        for i, stored in here
    )


def crc_array(part: Part, name: str, tokens: int | None) -> str:
    """Name the array that holds the checksums of a field read by its first `tokens`."""
    name = name.rpartition("/")[2]
    if name != "features":
        return "side_crc"
    partial = tokens is not None and 0 < tokens < part.arrays[name].item[1]
    return "prefix_crc" if partial and "prefix_crc" in part.arrays else "row_crc"
