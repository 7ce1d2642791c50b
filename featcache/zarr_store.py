"""The Zarr v3 store: one group per shard, uncompressed C-order chunks with Zarr's crc32c codec.

`features` is chunked (n, 1, L, T, D), one file per view; every other array is one chunk. A chunk file is therefore
plain rows and four checksum bytes: any Zarr library reads it, and so does one pread. Metadata is written by
zarr-python, rows by us, as they come, with a running checksum.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from featcache import manifest
from featcache.errors import UserError
from featcache.store import SHARDS, Array, record_path

_RECORD = "record.json"
_READ_BYTES = 8 << 20


def _folder(cache: Path, shard: str) -> Path:
    return cache / SHARDS / f"{shard}.zarr"


def _chunk(array: Array, view: int) -> str:
    """Chunk (0, view, 0, ...) of a split array, chunk (0, 0, ...) of another."""
    rank = 1 + array.per_view + len(array.item)
    numbers = [0] * rank
    if array.split:
        numbers[1] = view
    return f"{array.name}/c." + ".".join(map(str, numbers))


class _RowFile:
    """A chunk file that grows by rows: bytes so far, and their crc32c."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("wb", buffering=0)
        self.bytes = 0
        self.crc = 0

    def append(self, rows: npt.NDArray[Any]) -> None:
        view = np.ascontiguousarray(rows).reshape(-1).data.cast("B") if rows.size else memoryview(b"")
        self.crc = crc32c.crc32c(view, self.crc)
        self.bytes += len(view)
        while view:  # a raw file may take less than it is given
            view = view[self.file.write(view) :]

    def close(self) -> dict[str, Any]:
        self.file.write(self.crc.to_bytes(4, "little"))
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self.bytes + 4, "crc32c": f"{self.crc:08x}"}


class ZarrShardWriter:
    """See store.ShardWriter."""

    def __init__(self, cache: Path, shard: str, arrays: Sequence[Array], views: int) -> None:
        self.cache, self.shard, self.views = cache, shard, views
        self.arrays = {array.name: array for array in arrays}
        self.folder = cache / SHARDS / f"{shard}.zarr.{manifest.owner()}.tmp"
        self.folder.mkdir(parents=True)
        self.files = {
            (array.name, view): _RowFile(self.folder / _chunk(array, view))
            for array in arrays
            for view in (range(views) if array.split else [0])
        }
        self.ranges: dict[str, tuple[float, float]] = {}
        self.items = 0

    def append(self, items: Mapping[str, npt.NDArray[Any]], ranges: Mapping[str, tuple[float, float]]) -> None:
        count = 0
        for name, values in items.items():
            array, count = self.arrays[name], len(values)
            values = np.asarray(values, array.dtype)
            if values.shape[1:] != array.item:
                raise ValueError(f"{name}: items {values.shape[1:]} given, {array.item} declared")
            if array.split:
                for view in range(self.views):
                    self.files[name, view].append(values[(view - self.items) % self.views :: self.views])
            else:
                self.files[name, 0].append(values)
            if count:
                self._widen(name, ranges[name] if name in ranges else (values.min().item(), values.max().item()))
        self.items += count

    def append_rows(self, items: Mapping[str, npt.NDArray[Any]]) -> None:
        for name, values in items.items():
            values = np.asarray(values, self.arrays[name].dtype)
            self.files[name, 0].append(values)
            if values.size:
                self._widen(name, (values.min().item(), values.max().item()))

    def _widen(self, name: str, new: tuple[float, float]) -> None:
        low, high = self.ranges.get(name, new)
        self.ranges[name] = (min(low, new[0]), max(high, new[1]))

    def finish(self, keys: Sequence[str], quarantined: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        encoded = [key.encode() for key in keys]
        self.append_rows({"key": np.frombuffer(b"".join(encoded), np.uint8)})
        self.append_rows({"key_offsets": np.cumsum([0, *map(len, encoded)])})
        files = {_chunk(self.arrays[name], view): file.close() for (name, view), file in self.files.items()}
        files.update(self._write_metadata(len(keys), sum(map(len, encoded))))
        record = {
            "shard": self.shard,
            "rows": len(keys),
            "keys_digest": manifest.keys_digest(keys),
            "quarantined": [dict(row) for row in quarantined],
            "files": files,
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
        }
        manifest.write_json(self.folder / _RECORD, record)
        _publish(self.folder, self.cache, self.shard)
        return record

    def _write_metadata(self, rows: int, key_bytes: int) -> dict[str, Any]:
        """zarr.json of the group and of every array, by zarr-python; arrays without rows have no chunk."""
        import zarr
        from zarr.codecs import Crc32cCodec

        group = zarr.create_group(self.folder, zarr_format=3)
        for array in self.arrays.values():
            count = {"key": key_bytes, "key_offsets": rows + 1}.get(array.name, rows)
            shape = (count, *([self.views] if array.per_view else []), *array.item)
            chunks = (max(count, 1), *([1 if array.split else self.views] if array.per_view else []), *array.item)
            group.create_array(
                array.name,
                shape=shape,
                chunks=chunks,
                dtype=array.dtype,
                filters=None,
                compressors=[Crc32cCodec()],
                fill_value=float("nan") if np.dtype(array.dtype).kind == "f" else 0,
                chunk_key_encoding={"name": "default", "separator": "."},
                dimension_names=array.dimensions,
                config={"write_empty_chunks": True},
            )
        names = ["zarr.json", *(f"{name}/zarr.json" for name in self.arrays)]
        return {name: _describe(self.folder / name) for name in names}

    def discard(self) -> None:
        for file in self.files.values():
            file.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32c": f"{crc32c.crc32c(data):08x}"}


def _publish(folder: Path, cache: Path, shard: str) -> None:
    """Two renames; the loser of a race removes its own work and keeps what is there."""
    for directory in sorted({path.parent for path in folder.rglob("*")}):
        manifest.sync_folder(directory)
    try:
        folder.rename(_folder(cache, shard))
    except OSError:
        if not _folder(cache, shard).is_dir():
            raise
        shutil.rmtree(folder)
    _publish_record(cache, shard)


def _publish_record(cache: Path, shard: str) -> None:
    try:
        (_folder(cache, shard) / _RECORD).rename(record_path(cache, shard))
    except FileNotFoundError:
        if not record_path(cache, shard).is_file():  # else another process was a moment faster
            raise
    manifest.sync_folder(cache / SHARDS)


def writer(cache: Path, shard: str, arrays: Sequence[Array], views: int) -> ZarrShardWriter:
    return ZarrShardWriter(cache, shard, arrays, views)


def locate(
    cache: Path, shard: str, array: Array, views: int, view: int, rows: npt.NDArray[np.int64]
) -> tuple[Path, npt.NDArray[np.int64]]:
    """See store.Store.locate."""
    path = _folder(cache, shard) / _chunk(array, view)
    if array.split or not array.per_view:
        return path, rows * array.item_bytes
    return path, (rows * views + view) * array.item_bytes


def check(cache: Path, shard: str, record: Mapping[str, Any], *, deep: bool) -> list[str]:
    """See store.Store.check. The recorded crc32c is of a chunk's rows, without the four bytes that repeat it."""
    problems = []
    for name, facts in record["files"].items():
        path = _folder(cache, shard) / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{path}: missing")
        elif size != facts["bytes"]:
            problems.append(f"{path}: {size} bytes, {facts['bytes']} recorded")
        elif deep and not _sound(path, size, facts["crc32c"], chunk=not name.endswith("zarr.json")):
            problems.append(f"{path}: checksum differs")
    return problems


def _sound(path: Path, size: int, recorded: str, *, chunk: bool) -> bool:
    crc, left = 0, size - 4 if chunk else size
    with path.open("rb", buffering=0) as file:
        while left:
            data = file.read(min(left, _READ_BYTES))
            if not data:
                return False
            crc, left = crc32c.crc32c(data, crc), left - len(data)
        tail = file.read(4) if chunk else crc.to_bytes(4, "little")
    return f"{crc:08x}" == recorded and tail == crc.to_bytes(4, "little")


def settle(cache: Path, shard: str) -> None:
    """A folder without a record is adopted when its own record proves every byte, and removed otherwise."""
    for leftover in (cache / SHARDS).glob(f"{shard}.zarr.*.tmp"):
        if not manifest.alive(leftover.name.removesuffix(".tmp").split(".zarr.", 1)[1]):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = _folder(cache, shard)
    if not folder.is_dir():
        return
    record = _inner_record(folder)
    # Only now: a record that left the folder since is_dir() was moved here by the process that wrote it.
    if record_path(cache, shard).is_file():
        return
    if record is not None and not check(cache, shard, record, deep=True):
        _publish_record(cache, shard)
    else:
        shutil.rmtree(folder)


def _inner_record(folder: Path) -> dict[str, Any] | None:
    try:
        return manifest.read_json(folder / _RECORD)
    except UserError:  # missing or damaged: nothing proves the bytes
        return None
