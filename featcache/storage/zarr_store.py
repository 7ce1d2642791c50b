"""The Zarr v3 store writes one group per shard: plain rows in C order from byte 0 of each file.

A split array, such as `features`, is one file per view; any other is one file, a chunk with Zarr's
crc32c behind it. Since format 4 a split file has Zarr's index of its rows behind them
(`chunk_index`): other libraries then read a row for a row's bytes; before, it was one chunk as
well. Any Zarr library reads all of them, and so does one pread. Metadata is written by zarr-python,
rows by us, as they come, with a running checksum.

A compressed shard is an archive: the same, but for the chunks of split arrays.
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
from featcache.storage import commit, zarr_metadata
from featcache.storage.chunk_index import (
    CRC_BYTES,
    ENTRY_BYTES,
    ChunkFile,
    chunks_per_item,
    is_index_sound,
)
from featcache.storage.row_file import RowFile
from featcache.storage.store import (
    SHARDS,
    Array,
    FileShape,
    ShardForm,
    ShardKeys,
    folder_path,
)
from featcache.storage.zarr_metadata import DOCUMENT, SHARDED

NAME = "zarr"
FILES = re.compile(r"(\w+/)?zarr\.json|\w+/c(\.[0-9]+)+", re.ASCII)
KEY_OFFSETS = Array("key_offsets", "<i8", (), ("row_edge",), per_view=False)
# since format 4, beside bytes and offsets: tensorstore reads no strings
_KEY_STRINGS = "key/c.0"

root_files = zarr_metadata.root_files


def _key_bytes(form: ShardForm) -> Array:
    name = "key_bytes" if form.format >= SHARDED else "key"
    return Array(name, "|u1", (), ("byte",), per_view=False)


def _chunk(array: Array, view: int) -> str:
    """Return chunk (0, view, 0, ...) of a split array, chunk (0, 0, ...) of another."""
    zeros = ".0" * (array.per_view + len(array.item))
    return f"{array.name}/c.0.{view}{zeros[2:]}" if array.split else f"{array.name}/c.0{zeros}"


class ZarrShardWriter:
    """See store.ShardWriter."""

    def __init__(
        self, cache: Path, shard: str, arrays: Sequence[Array], views: int, form: ShardForm
    ) -> None:
        self.cache, self.shard, self.views, self.form = cache, shard, views, form
        self.arrays = {array.name: array for array in arrays}
        self.folder = commit.begin_shard(cache, shard, NAME)
        self.files: dict[tuple[str, int], ChunkFile | _PlainFile] = {}
        self.keys: list[str] = []
        self.items = 0
        try:
            for array in arrays:
                for view in range(views) if array.split else [0]:
                    self.files[array.name, view] = self._open(array, view)
        except BaseException:
            self.discard()
            raise

    def _open(self, array: Array, view: int) -> ChunkFile | _PlainFile:
        path = self.folder / _chunk(array, view)
        if zarr_metadata.is_chunked(array, self.form):
            return ChunkFile(path, array, self.form.compression)
        return _PlainFile(path)

    def append(self, keys: Sequence[str], items: Mapping[str, npt.NDArray[Any]]) -> None:
        if items.keys() != self.arrays.keys():
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
        files = {
            _chunk(self.arrays[name], view): file.finish()
            for (name, view), file in self.files.items()
        }
        files.update(self._write_labels())
        record = commit.make_record(self.shard, self.keys, quarantined, files, statistics)
        commit.publish(self.folder, self.cache, self.shard, NAME, record)
        return record

    def _write_labels(self) -> dict[str, Any]:
        """Write keys, coordinates, and the metadata of all arrays; returns what the record says of
        the files."""
        encoded = [key.encode() for key in self.keys]
        blob = _key_bytes(self.form)
        labels: dict[Array, npt.NDArray[Any]] = {
            blob: np.frombuffer(b"".join(encoded), np.uint8),
            KEY_OFFSETS: np.cumsum([0, *map(len, encoded)], dtype=np.int64),
            **{
                array: np.array(self.form.coordinates[array.name], np.int64)
                for array in zarr_metadata.coordinate_arrays([*self.arrays.values()], self.form)
            },
        }
        chunks = {_chunk(array, 0): values for array, values in labels.items()}
        if self.form.format >= SHARDED:
            chunks[_KEY_STRINGS] = np.frombuffer(_as_strings(encoded), np.uint8)
        files = {name: self._write_chunk(name, values) for name, values in chunks.items()}
        lengths = {array.name: len(values) for array, values in labels.items()}
        documents = zarr_metadata.shard_metadata(
            [*self.arrays.values(), *labels], self.views, self.form, len(encoded), lengths
        )
        return files | {name: _write(self.folder / name, data) for name, data in documents.items()}

    def _write_chunk(self, name: str, values: npt.NDArray[Any]) -> dict[str, Any]:
        file = self.files[name, 0] = _PlainFile(self.folder / name)
        file.append(values)
        return file.finish()

    def discard(self) -> None:
        for file in self.files.values():
            file.abort()
        shutil.rmtree(self.folder, ignore_errors=True)


class _PlainFile(RowFile):
    """Writes an array of one chunk, and four bytes of Zarr's crc32c codec."""

    def finish(self) -> dict[str, Any]:
        """Close; returns what the record says. Its checksum is of the rows alone: with the four
        bytes it would be the same for any rows."""
        crc = self.crc
        self.append(np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8))
        self.close()
        return {"bytes": self.bytes, "crc32c": f"{crc:08x}"}


def _as_strings(encoded: Sequence[bytes]) -> bytes:
    """Write texts as Zarr's vlen-utf8 codec does: how many, then the length and bytes of each."""
    parts = [part for text in encoded for part in (len(text).to_bytes(4, "little"), text)]
    return b"".join([len(encoded).to_bytes(4, "little"), *parts])


def _write(path: Path, data: bytes) -> dict[str, Any]:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32c": f"{crc32c(data):08x}"}


def writer(
    cache: Path, shard: str, arrays: Sequence[Array], views: int, form: ShardForm
) -> ZarrShardWriter:
    return ZarrShardWriter(cache, shard, arrays, views, form)


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
    for name, dtype in zip(key_files(record), ("|u1", KEY_OFFSETS.dtype), strict=True):
        path = folder_path(cache, shard, NAME) / name
        facts = record["files"][name]
        data = path.read_bytes()[:-4] if path.is_file() else b""
        if len(data) != facts["bytes"] - 4 or f"{crc32c(data):08x}" != facts["crc32c"]:
            raise UserError(
                f"cache file {path}: its checksum differs; run "
                f"`{command_line('featcache', 'verify', cache)}`"
            )
        parts.append(np.frombuffer(data, dtype))
    return ShardKeys(*parts)


def key_files(record: Mapping[str, Any]) -> list[str]:
    """See store.Store.key_files: bytes, and offsets."""
    # by format: where there is the first, the second holds strings
    blob = next(name for name in ("key_bytes/c.0", "key/c.0") if name in record["files"])
    return [blob, _chunk(KEY_OFFSETS, 0)]


def is_intact(path: Path, facts: Mapping[str, Any]) -> bool:
    """See store.Store.is_intact. The recorded crc32c is of all bytes of documents and of files of
    plain rows with an index; of others it leaves out the last four, which are a checksum."""
    whole = path.name == DOCUMENT or ("chunks" in facts and "compression" not in facts)
    crc = commit.file_crc(path, facts["bytes"] - (0 if whole else CRC_BYTES))
    if whole or "chunks" in facts:
        indexed = "chunks" not in facts or is_index_sound(path, facts)
        return f"{crc:08x}" == facts["crc32c"] and indexed
    with path.open("rb") as file:
        file.seek(facts["bytes"] - CRC_BYTES)
        tail = file.read(CRC_BYTES)
    return f"{crc:08x}" == facts["crc32c"] and tail == crc.to_bytes(CRC_BYTES, "little")


def file_shapes(
    arrays: Sequence[Array], views: int, form: ShardForm
) -> dict[str, FileShape | None]:
    """See store.Store.file_shapes."""
    labels = [_key_bytes(form), KEY_OFFSETS, *zarr_metadata.coordinate_arrays(arrays, form)]
    strings = ["key"] if form.format >= SHARDED else []
    names = [*(array.name for array in (*arrays, *labels)), *strings]
    shapes: dict[str, FileShape | None] = {DOCUMENT: None}
    shapes |= {f"{name}/{DOCUMENT}": None for name in names}
    for array in arrays:
        for view in range(views) if array.split else [0]:
            shapes[_chunk(array, view)] = _shape(array, views, form)
    edge = KEY_OFFSETS.item_bytes
    blob, offsets, *coordinates = (_chunk(array, 0) for array in labels)
    shapes |= {blob: None, offsets: FileShape(CRC_BYTES + edge, edge)}
    for array, name in zip(labels[2:], coordinates, strict=True):
        count = len(form.coordinates[array.name])
        shapes[name] = FileShape(CRC_BYTES + count * array.item_bytes, 0)
    return {**shapes, **({_KEY_STRINGS: None} if strings else {})}


def _shape(array: Array, views: int, form: ShardForm) -> FileShape:
    if not zarr_metadata.is_chunked(array, form):
        items = views if array.per_view and not array.split else 1
        return FileShape(CRC_BYTES, items * array.item_bytes)
    chunks = chunks_per_item(array)
    row_bytes = array.item_bytes + ENTRY_BYTES * chunks
    return FileShape(CRC_BYTES, row_bytes, chunks, form.compression)
