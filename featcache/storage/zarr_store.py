"""The Zarr v3 store writes one group per shard, uncompressed C-order chunks with Zarr's crc32c
codec.

`features` is chunked (n, 1, L, T, D), one file per view; every other array is one chunk. A chunk
file is therefore plain rows and four checksum bytes: any Zarr library reads it, and so does one
pread. Metadata is written by zarr-python, rows by us, as they come, with a running checksum.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import UserError, command_line
from featcache.storage import commit
from featcache.storage.row_file import RowFile
from featcache.storage.store import SHARDS, Array, FileSize, ShardKeys, folder_path

NAME = "zarr"
_CRC_BYTES = 4  # of Zarr's crc32c codec, behind the rows
FILES = re.compile(r"(\w+/)?zarr\.json|\w+/c(\.[0-9]+)+", re.ASCII)
KEY = Array("key", "|u1", (), ("byte",), per_view=False)
KEY_OFFSETS = Array("key_offsets", "<i8", (), ("row_edge",), per_view=False)


def _chunk(array: Array, view: int) -> str:
    """Return chunk (0, view, 0, ...) of a split array, chunk (0, 0, ...) of another."""
    zeros = ".0" * (array.per_view + len(array.item))
    return f"{array.name}/c.0.{view}{zeros[2:]}" if array.split else f"{array.name}/c.0{zeros}"


class ZarrShardWriter:
    """See store.ShardWriter."""

    def __init__(self, cache: Path, shard: str, arrays: Sequence[Array], views: int) -> None:
        self.cache, self.shard, self.views = cache, shard, views
        self.arrays = {array.name: array for array in (*arrays, KEY, KEY_OFFSETS)}
        self.folder = commit.begin_shard(cache, shard, NAME)
        self.files: dict[tuple[str, int], RowFile] = {}
        self.keys: list[str] = []
        self.items = 0
        try:
            for array in self.arrays.values():
                for view in range(views) if array.split else [0]:
                    self.files[array.name, view] = RowFile(self.folder / _chunk(array, view))
        except BaseException:
            self.discard()
            raise

    def append(self, keys: Sequence[str], items: Mapping[str, npt.NDArray[Any]]) -> None:
        if items.keys() != self.arrays.keys() - {KEY.name, KEY_OFFSETS.name}:
            raise ValueError(f"items of {sorted(items)} given, {sorted(self.arrays)} declared")
        first = [(view - self.items) % self.views for view in range(self.views)]
        for name, values in items.items():
            array = self.arrays[name]
            values = np.asarray(values, array.dtype)
            if values.shape != (len(keys), *array.item):
                raise ValueError(
                    f"{name}: items {values.shape} given, {(len(keys), *array.item)} declared"
                )
            if array.split:
                for view in range(self.views):
                    self.files[name, view].append(values[first[view] :: self.views])
            else:
                self.files[name, 0].append(
                    values if array.per_view else values[first[0] :: self.views]
                )
        self.keys.extend(keys[first[0] :: self.views])
        self.items += len(keys)

    def finish(
        self, quarantined: Sequence[Mapping[str, str]], statistics: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        if self.items % self.views:
            raise ValueError(
                f"shard {self.shard}: the last row has {self.items % self.views} of {self.views} "
                "views"
            )
        encoded = [key.encode() for key in self.keys]
        self.files["key", 0].append(np.frombuffer(b"".join(encoded), np.uint8))
        self.files["key_offsets", 0].append(np.cumsum([0, *map(len, encoded)], dtype=np.int64))
        files = {
            _chunk(self.arrays[name], view): _close(file)
            for (name, view), file in self.files.items()
        }
        files.update(self._write_metadata(len(self.keys), sum(map(len, encoded))))
        record = commit.make_record(self.shard, self.keys, quarantined, files, statistics)
        commit.publish(self.folder, self.cache, self.shard, NAME, record)
        return record

    def _write_metadata(self, rows: int, key_bytes: int) -> dict[str, Any]:
        """Write zarr.json of the group and of every array, by zarr-python; arrays without rows have
        no chunk."""
        import zarr
        from zarr.codecs import Crc32cCodec
        from zarr.storage import MemoryStore

        # in memory: zarr would make a folder again that was moved away meanwhile
        made: dict[str, Any] = {}
        group = zarr.create_group(MemoryStore(made), zarr_format=3)
        for array in self.arrays.values():
            count = {"key": key_bytes, "key_offsets": rows + 1}.get(array.name, rows)
            shape = (count, *([self.views] if array.per_view else []), *array.item)
            chunks = (
                count,
                *([1 if array.split else self.views] if array.per_view else []),
                *array.item,
            )
            group.create_array(
                array.name,
                shape=shape,
                chunks=tuple(max(edge, 1) for edge in chunks),
                dtype=array.dtype,
                filters=None,
                compressors=[Crc32cCodec()],
                fill_value=float("nan") if np.dtype(array.dtype).kind == "f" else 0,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=array.dimensions,
                config={"write_empty_chunks": True},
            )
        names = ["zarr.json", *(f"{name}/zarr.json" for name in self.arrays)]
        return {name: _write(self.folder / name, made[name].to_bytes()) for name in names}

    def discard(self) -> None:
        for file in self.files.values():
            file.abort()
        shutil.rmtree(self.folder, ignore_errors=True)


def _close(file: RowFile) -> dict[str, Any]:
    """Add the four bytes of Zarr's crc32c codec; the recorded checksum is of the rows before
    them."""
    crc = file.crc
    file.append(np.frombuffer(crc.to_bytes(4, "little"), np.uint8))
    file.close()
    return {"bytes": file.bytes, "crc32c": f"{crc:08x}"}


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32c": f"{crc32c(data):08x}"}


def writer(cache: Path, shard: str, arrays: Sequence[Array], views: int) -> ZarrShardWriter:
    return ZarrShardWriter(cache, shard, arrays, views)


def locate(
    cache: Path, shard: str, array: Array, views: int, view: int, rows: npt.NDArray[np.int64]
) -> tuple[str, npt.NDArray[np.int64]]:
    """See store.Store.locate."""
    path = f"{cache}/{SHARDS}/{shard}.{NAME}/{_chunk(array, view)}"
    if array.split or not array.per_view:
        return path, rows * array.item_bytes
    return path, (rows * views + view) * array.item_bytes


def keys(cache: Path, shard: str, record: Mapping[str, Any]) -> ShardKeys:
    """See store.Store.keys."""
    parts = []
    for array in (KEY, KEY_OFFSETS):
        path = folder_path(cache, shard, NAME) / _chunk(array, 0)
        facts = record["files"][_chunk(array, 0)]
        data = path.read_bytes()[:-4] if path.is_file() else b""
        if len(data) != facts["bytes"] - 4 or f"{crc32c(data):08x}" != facts["crc32c"]:
            raise UserError(
                f"cache file {path}: its checksum differs; run "
                f"`{command_line('featcache', 'verify', cache)}`"
            )
        parts.append(np.frombuffer(data, array.dtype))
    return ShardKeys(*parts)


def is_intact(path: Path, facts: Mapping[str, Any]) -> bool:
    """See store.Store.is_intact. The recorded crc32c is of a chunk's rows, without the four bytes
    that repeat it."""
    if path.name == "zarr.json":
        return f"{commit.file_crc(path, facts['bytes']):08x}" == facts["crc32c"]
    crc = commit.file_crc(path, facts["bytes"] - 4)
    with path.open("rb") as file:
        file.seek(facts["bytes"] - 4)
        tail = file.read(4)
    return f"{crc:08x}" == facts["crc32c"] and tail == crc.to_bytes(4, "little")


def file_sizes(arrays: Sequence[Array], views: int) -> dict[str, FileSize | None]:
    """See store.Store.file_sizes."""
    every = (*arrays, KEY, KEY_OFFSETS)
    sizes: dict[str, FileSize | None] = {"zarr.json": None}
    sizes |= {f"{array.name}/zarr.json": None for array in every}
    for array in arrays:
        items = views if array.per_view and not array.split else 1
        for view in range(views) if array.split else [0]:
            sizes[_chunk(array, view)] = FileSize(_CRC_BYTES, items * array.item_bytes)
    edge = KEY_OFFSETS.item_bytes
    return {
        **sizes,
        _chunk(KEY, 0): None,
        _chunk(KEY_OFFSETS, 0): FileSize(_CRC_BYTES + edge, edge),
    }
