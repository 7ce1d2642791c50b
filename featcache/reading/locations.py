"""Where what a read asks for lies: places in the request by file, pieces of items, runs over the
files of a part.

n rows asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.reading.byte_ranges import ByteRange, FileCheck, RangeBatch
from featcache.storage import checksums
from featcache.storage.keys import I64
from featcache.storage.part import FileRows, Part
from featcache.storage.store import Array


class RowLocations(NamedTuple):
    """Places in a request, sorted by file, and the shard and view of each."""

    at: I64
    shards: I64
    views: I64

    def those(self, mask: npt.NDArray[np.bool_]) -> RowLocations:
        return self if mask.all() else RowLocations(*(each[mask] for each in self))


def locate_rows(starts: I64, rows: I64, views: I64) -> RowLocations:
    """Rows and views (n,) of a request -> their locations; shard i begins at row starts[i]."""
    shards = np.searchsorted(starts, rows, side="right") - 1
    at = np.lexsort((rows, views, shards))
    return RowLocations(at, shards[at], views[at])


def range_batches(
    part: Part,
    spec: Array,
    target: npt.NDArray[np.uint8],
    rows: I64,
    places: RowLocations,
    pieces: tuple[ByteRange, ...],
    table: npt.NDArray[np.uint32] | None = None,
    proof: FileCheck | None = None,
) -> list[RangeBatch]:
    """One run of an array's items at these places, unless there are none."""
    at, shards, views = places
    if not len(at):
        return []
    first = np.flatnonzero(np.append(True, (np.diff(shards) != 0) | (np.diff(views) != 0)))
    counts = np.diff(first, append=len(at))
    paths, offsets = part.locate_all(spec, FileRows(shards[first], views[first], counts), rows[at])
    file = np.repeat(np.arange(len(first)), counts)
    return [
        RangeBatch(
            paths, target, at, file, offsets, pieces, None if table is None else table[at], proof
        )
    ]


def byte_ranges(
    part: Part, name: str, levels: tuple[int, ...], tokens: int
) -> tuple[ByteRange, ...]:
    """What is read of one item: those of the wanted levels that this part holds, or the whole."""
    spec = part.arrays[name]
    first = checksums.side_columns(part.arrays.values()).get(name, 0)
    if not checksums.has_levels(spec):
        return (ByteRange(0, 0, spec.item_bytes, first),)
    level_bytes = spec.item_bytes // spec.item[0]
    wanted = level_bytes // spec.item[1] * tokens
    here = [
        (place, part.levels.index(level))
        for place, level in enumerate(levels)
        if level in part.levels
    ]
    return tuple(
        ByteRange(slot * level_bytes, place * wanted, wanted, first + slot) for place, slot in here
    )


def crc_array(part: Part, name: str, tokens: int | None) -> str:
    """The array that holds the checksums of a field read by its first `tokens`."""
    name = name.rpartition("/")[2]
    if name != "features":
        return "side_crc"
    partial = tokens is not None and 0 < tokens < part.arrays[name].item[1]
    return "prefix_crc" if partial and "prefix_crc" in part.arrays else "row_crc"
