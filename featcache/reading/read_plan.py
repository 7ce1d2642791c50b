"""The byte ranges of one read are planned: checksums of the rows to be checked, then each field.

n rows asked for, L levels, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.reading.byte_ranges import ByteRange, FileCheck, RangeBatch
from featcache.reading.locations import RowLocations, byte_ranges, crc_array, range_batches
from featcache.storage import checksums
from featcache.storage.keys import I64
from featcache.storage.part import Part
from featcache.storage.store import Array

Tables = Mapping[tuple[int, str], npt.NDArray[np.uint32]]


def parts_of(parts: Sequence[Part], name: str) -> list[Part]:
    """Return the parts of a field's teacher, which NAME leaves out where it is the cache's own."""
    teacher = name.rpartition("/")[0] or parts[0].teacher
    return [part for part in parts if part.teacher == teacher]


@dataclass(frozen=True)
class ReadPlan:
    """Plans the reads of rows (n,) of a cache's parts, by their locations and which of them are
    checked."""

    parts: Sequence[Part]
    rows: I64
    locations: RowLocations
    checked: npt.NDArray[np.bool_]  # (n,)

    def checksum_batches(
        self, fields: Sequence[str], tokens: int | None
    ) -> tuple[Tables, list[RangeBatch]]:
        """Return the checksum arrays that `fields` need, (part number, array) -> (n, columns), and
        the batches that fill them; rows that are not checked stay unset."""
        tables: dict[tuple[int, str], npt.NDArray[np.uint32]] = {}
        batches: list[RangeBatch] = []
        for i, part in enumerate(self.parts) if self.checked.any() else []:
            positions, _, views = self.locations
            here = self.locations.select(self.checked[positions] & part.holds(views))
            file_check = FileCheck(part.store.is_intact, part.file_record)
            for array in sorted(
                {
                    crc_array(part, name, tokens)
                    for name in fields
                    if part in parts_of(self.parts, name)
                }
            ):
                ranges = _crc_ranges(part, array, tokens)
                table = tables[i, array] = np.empty(
                    (len(self.rows), sum(each.size for each in ranges) // 4), np.uint32
                )
                batches += range_batches(
                    part,
                    part.arrays[array],
                    table.view(np.uint8),
                    self.rows,
                    here,
                    ranges,
                    file_check=file_check,
                )
        return tables, batches

    def field_batches(
        self,
        name: str,
        spec: Array,
        target: npt.NDArray[Any],
        levels: tuple[int, ...],
        tokens: int,
        tables: Tables,
    ) -> list[RangeBatch]:
        """Return the batches that fill `target` (n, *item) with one field."""
        plain, parts = name.rpartition("/")[2], parts_of(self.parts, name)
        flat = (
            target.reshape(len(self.rows), -1).view(np.uint8)
            if target.size
            else np.empty((len(self.rows), 0), np.uint8)
        )
        positions, _, views = self.locations
        left = np.ones(len(positions), bool)  # by location: rows that no part before has filled
        batches: list[RangeBatch] = []
        for i, part in enumerate(self.parts):
            ranges = (
                byte_ranges(part, plain, levels, tokens)
                if part in parts and plain in part.arrays
                else ()
            )
            if not ranges:
                continue
            held = left & part.holds(views)
            if not checksums.has_levels(spec):
                left &= ~held
            stored, table = part.arrays[plain], tables.get((i, crc_array(part, plain, tokens)))
            checked = self.checked[positions] & (table is not None)
            for where, crcs in ((held & checked, table), (held & ~checked, None)):
                here = self.locations.select(where)
                batches += range_batches(part, stored, flat, self.rows, here, ranges, crcs)
        return batches


def _crc_ranges(part: Part, array: str, tokens: int | None) -> tuple[ByteRange, ...]:
    """The range of an item of a checksum array: all of it, of `prefix_crc` (T, L) the numbers of
    the wanted length."""
    spec = part.arrays[array]
    if array != "prefix_crc":
        return (ByteRange(0, 0, spec.item_bytes),)
    level_bytes = 4 * spec.item[1]
    return (ByteRange(((tokens or 0) - 1) * level_bytes, 0, level_bytes),)
