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
    """The parts of a field's teacher, which NAME leaves out where it is the cache's own."""
    teacher = name.rpartition("/")[0] or parts[0].teacher
    return [part for part in parts if part.teacher == teacher]


@dataclass(frozen=True)
class ReadPlan:
    """Rows (n,) of a cache's parts, where they lie, and which of them are checked."""

    parts: Sequence[Part]
    rows: I64
    locations: RowLocations
    checked: npt.NDArray[np.bool_]  # (n,)

    def checksum_batches(
        self, fields: Sequence[str], tokens: int | None
    ) -> tuple[Tables, list[RangeBatch]]:
        """(part number, array) -> (n, columns) of the checksum arrays that `fields` need, and the
        reads that fill them; rows that are not checked stay unset."""
        tables: dict[tuple[int, str], npt.NDArray[np.uint32]] = {}
        runs: list[RangeBatch] = []
        for i, part in enumerate(self.parts) if self.checked.any() else []:
            at, _, views = self.locations
            here = self.locations.those(self.checked[at] & part.holds(views))
            proof = FileCheck(part.store.sound, part.facts)
            for array in sorted(
                {
                    crc_array(part, name, tokens)
                    for name in fields
                    if part in parts_of(self.parts, name)
                }
            ):
                pieces = _crc_ranges(part, array, tokens)
                table = tables[i, array] = np.empty(
                    (len(self.rows), sum(piece.size for piece in pieces) // 4), np.uint32
                )
                runs += range_batches(
                    part,
                    part.arrays[array],
                    table.view(np.uint8),
                    self.rows,
                    here,
                    pieces,
                    proof=proof,
                )
        return tables, runs

    def field_batches(
        self,
        name: str,
        spec: Array,
        target: npt.NDArray[Any],
        levels: tuple[int, ...],
        tokens: int,
        tables: Tables,
    ) -> list[RangeBatch]:
        """The reads that fill `target` (n, *item) with one field."""
        plain, parts = name.rpartition("/")[2], parts_of(self.parts, name)
        flat = (
            target.reshape(len(self.rows), -1).view(np.uint8)
            if target.size
            else np.empty((len(self.rows), 0), np.uint8)
        )
        at, _, views = self.locations
        left = np.ones(len(at), bool)  # by location: what no part before has given
        runs: list[RangeBatch] = []
        for i, part in enumerate(self.parts):
            pieces = (
                byte_ranges(part, plain, levels, tokens)
                if part in parts and plain in part.arrays
                else ()
            )
            if not pieces:
                continue
            held = left & part.holds(views)
            if not checksums.has_levels(spec):
                left &= ~held
            stored, table = part.arrays[plain], tables.get((i, crc_array(part, plain, tokens)))
            checked = self.checked[at] if table is not None else np.zeros(len(at), bool)
            for where, crcs in ((held & checked, table), (held & ~checked, None)):
                here = self.locations.those(where)
                runs += range_batches(part, stored, flat, self.rows, here, pieces, crcs)
        return runs


def _crc_ranges(part: Part, array: str, tokens: int | None) -> tuple[ByteRange, ...]:
    """The range of an item of a checksum array: all of it, of `prefix_crc` (T, L) the numbers of
    the wanted length."""
    spec = part.arrays[array]
    if array != "prefix_crc":
        return (ByteRange(0, 0, spec.item_bytes),)
    level_bytes = 4 * spec.item[1]
    return (ByteRange(((tokens or 0) - 1) * level_bytes, 0, level_bytes),)
