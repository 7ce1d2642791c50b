"""A file of Zarr's sharding codec is chunks, one after the other from byte 0, and then their index.

    chunk 0 | chunk 1 | ... | (offset, bytes) of each, two u8 | crc32c of the index, u4

The order of chunks is C order, so that uncompressed ones are plain rows, which our reader finds
without the index. It is for others, and for compressed chunks. Every entry is written: the codec
reads a chunk without one as fill values.

m chunks of a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from featcache.storage import compression
from featcache.storage.row_file import RowFile
from featcache.storage.store import Array

ENTRY_BYTES = 16
CRC_BYTES = 4
U64 = npt.NDArray[np.uint64]


def chunk_item(array: Array) -> tuple[int, ...]:
    """Return what a chunk holds of an array's item: of `features` one level, of others all."""
    if array.name == "features" and array.dimensions[2:3] == ("level",):
        return (1, *array.item[1:])
    return array.item


def chunks_per_item(array: Array) -> int:
    return array.item[0] if chunk_item(array) != array.item else 1


def chunk_bytes(array: Array) -> int:
    return math.prod(chunk_item(array)) * np.dtype(array.dtype).itemsize


def index_bytes(chunks: int) -> int:
    return ENTRY_BYTES * chunks + CRC_BYTES


class ChunkFile:
    """Writes rows of a split array as chunks, compressed or not, and their index at the end."""

    def __init__(self, path: Path, array: Array, compression_name: str) -> None:
        self._array, self._compression = array, compression_name
        self._file = RowFile(path)
        self._sizes: list[int] = []

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Write items (n, *item)."""
        parts = len(rows) * chunks_per_item(self._array)
        if not self._compression:
            self._file.append(rows)
            self._sizes += [chunk_bytes(self._array)] * parts
            return
        for chunk in np.ascontiguousarray(rows).reshape(parts, *chunk_item(self._array)):
            coded = compression.encode(self._compression, chunk)
            self._file.append(np.frombuffer(coded, np.uint8))
            self._sizes.append(len(coded))

    def finish(self) -> dict[str, Any]:
        """Write the index and close; returns what the record says of the file. Its checksum is of
        all bytes; of compressed ones it leaves out the last four, since with them it would be the
        same for any index, and the index of plain rows alone follows from their size."""
        index = _packed(_entries_in_order(np.array(self._sizes, np.uint64)))
        self._file.append(np.frombuffer(index[:-CRC_BYTES], np.uint8))
        crc = self._file.crc
        self._file.append(np.frombuffer(index[-CRC_BYTES:], np.uint8))
        self._file.close()
        compressed = {"compression": self._compression} if self._compression else {}
        return {
            "bytes": self._file.bytes,
            "crc32c": f"{crc if self._compression else self._file.crc:08x}",
            "chunks": len(self._sizes),
            **compressed,
        }

    def abort(self) -> None:
        self._file.abort()


def _entries_in_order(sizes: U64) -> U64:
    """(m,) bytes of chunks -> (m, 2) where each begins, and its bytes."""
    return np.stack([np.cumsum(sizes) - sizes, sizes], 1)


def _packed(entries: U64) -> bytes:
    data = entries.astype("<u8").tobytes()
    return data + crc32c(data).to_bytes(CRC_BYTES, "little")


def unpack(tail: bytes) -> U64 | None:
    """Return the entries (m, 2) in the last `index_bytes(m)` bytes of a file; None where their
    checksum differs."""
    data, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
    if len(data) % ENTRY_BYTES or crc32c(data).to_bytes(CRC_BYTES, "little") != crc:
        return None
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def is_in_order(entries: U64, data_bytes: int, *, equal: bool) -> bool:
    """Tell whether chunks fill `data_bytes` one after the other, all of one size if `equal`. With a
    right checksum an index can still send a reader to another row."""
    offsets, sizes = entries[:, 0], entries[:, 1]
    if not len(entries):
        return data_bytes == 0
    if equal and (data_bytes % len(entries) or (sizes != data_bytes // len(entries)).any()):
        return False
    if (sizes > data_bytes).any() or (offsets > data_bytes).any():  # their sum could overflow
        return False
    ends = np.cumsum(sizes)
    return bool(int(ends[-1]) == data_bytes and (offsets == ends - sizes).all())


def is_index_sound(path: Path, facts: Mapping[str, Any]) -> bool:
    """Return whether the index of a file, of which the record states `facts`, is the one that was
    written."""
    size = index_bytes(facts["chunks"])
    data_bytes = facts["bytes"] - size
    if data_bytes < 0:
        return False
    with path.open("rb") as file:
        file.seek(data_bytes, os.SEEK_SET)
        entries = unpack(file.read(size))
    return entries is not None and is_in_order(
        entries, data_bytes, equal="compression" not in facts
    )
