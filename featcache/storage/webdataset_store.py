"""The webdataset store writes one plain tar per view and shard, and a byte index beside the tars.

    shards/NAME.webdataset/vK.tar              for each row, together: STEM.features.npy,
                                               STEM.attention.npy, ...
    shards/NAME.webdataset/index.safetensors   where the numbers of each member begin, and the keys
    shards/NAME.webdataset/row_crc.npy, ...    the checksums of rows (n, V, ...), apart from what
                                               they prove; of split ones prefix_crc.vK.npy (n, ...)

Any tar reads on its own, so arrays that are not per view are in every one of them. STEM is the key,
escaped so that webdataset gives it back whole. Members have no times and no owners: the same rows
give the same bytes. A member holds an item uncompressed, in C order, behind a .npy header; the
index turns row numbers into preads.

n rows, V views, A arrays.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c
from numpy.lib import format as npy_format
from safetensors import SafetensorError
from safetensors.numpy import load, save

from featcache.errors import UserError, command_line, counted, short
from featcache.pictures.tars import escape
from featcache.storage import checksums, commit, json_file
from featcache.storage.files import files_of
from featcache.storage.posix_io import read_error
from featcache.storage.row_file import RowFile
from featcache.storage.store import SHARDS, Array, FileShape, ShardForm, ShardKeys, folder_path

NAME = "webdataset"
INDEX = "index.safetensors"
FILES = re.compile(r"v[0-9]+\.tar|index\.safetensors|[a-z]+_crc(\.v[0-9]+)?\.npy")
_END = bytes(2 * tarfile.BLOCKSIZE)  # a tar's end mark
# Random rows of ImageNet touch all 1,280 shards again and again: of each only what is asked for is
# kept, 8 KiB an array and view, at most 128 MiB; a whole index, half a megabyte, stays only while
# its neighbours are asked for.
_COLUMNS = 16384
_INDICES = 16
_NPY_BYTES = 128  # of a .npy header: numpy fills up to whole 64 bytes, and ours are never longer

Stamp = tuple[int, int, int]


class Index(NamedTuple):
    """The content of `index.safetensors`; the names of arrays are in the order of the last axis of
    `offsets`."""

    names: tuple[str, ...]
    offsets: npt.NDArray[np.int64]  # (V, n, A): first byte of an item in the tar of its view
    keys: ShardKeys


def _tar(view: int) -> str:
    return f"v{view}.tar"


class TarShardWriter:
    """See store.ShardWriter."""

    def __init__(self, cache: Path, shard: str, arrays: Sequence[Array], views: int) -> None:
        self.cache, self.shard, self.views = cache, shard, views
        in_order = sorted(arrays, key=lambda each: each.name)
        self.arrays = {array.name: array for array in in_order if array.name not in checksums.NAMES}
        self.sums = {array.name: array for array in in_order if array.name in checksums.NAMES}
        self.npy = {
            array.name: _npy_header(array.dtype, array.item) for array in self.arrays.values()
        }
        self.folder = commit.begin_shard(cache, shard, NAME)
        self.files: list[RowFile] = []
        self.offsets: list[list[int]] = [[] for _ in range(views)]
        self.keys: list[str] = []
        self.crcs: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self.sums}
        self.items = 0
        self.heads: dict[str, bytes] = {}  # of the current row: both headers of each array,
        self.shared: dict[str, bytes] = {}  # and the items that all its views have in common
        try:
            for view in range(views):
                self.files.append(RowFile(self.folder / _tar(view)))
        except BaseException:
            self.discard()
            raise

    def append(self, keys: Sequence[str], items: Mapping[str, npt.NDArray[Any]]) -> None:
        if items.keys() != self.arrays.keys() | self.sums.keys():
            raise ValueError(
                f"items of {sorted(items)} given, of {sorted((*self.arrays, *self.sums))} declared"
            )
        for name, array in self.sums.items():
            self.crcs[name].append(_checked(array, items[name], len(keys)).copy())
        raw = {
            name: _as_bytes(array, items[name], len(keys)) for name, array in self.arrays.items()
        }
        for i, key in enumerate(keys):
            view = self.items % self.views
            row = {name: values[i] for name, values in raw.items()}
            if view == 0:
                self._begin_row(key, row)
            self._append_item(view, {**row, **self.shared})
            self.items += 1

    def _begin_row(self, key: str, row: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        stem = escape(key)
        self.keys.append(key)
        self.heads = {
            name: _member(f"{stem}.{name}.npy", len(npy) + row[name].size) + npy
            for name, npy in self.npy.items()
        }
        self.shared = {
            name: row[name].tobytes() for name, array in self.arrays.items() if not array.per_view
        }

    def _append_item(self, view: int, row: Mapping[str, Any]) -> None:
        """All members of one row in one tar: one write, since most are smaller than their
        headers."""
        file, parts = self.files[view], []
        end = file.bytes
        for name, data in row.items():
            begin = end + len(self.heads[name])
            end = -(-(begin + len(data)) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            parts += [self.heads[name], data, bytes(end - begin - len(data))]
            self.offsets[view].append(begin)
        file.append(np.frombuffer(b"".join(parts), np.uint8))

    def finish(
        self, quarantined: Sequence[Mapping[str, str]], statistics: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        files = {_tar(view): _close(file) for view, file in enumerate(self.files)}
        files[INDEX] = self._write(INDEX, self._index())
        for array in self.sums.values():
            values = np.concatenate(
                [np.empty((0, *array.item), array.dtype), *self.crcs[array.name]]
            )
            values = values.reshape(len(self.keys), self.views, *array.item)
            for view in range(self.views) if array.split else [0]:
                name = _npy(array, view)
                files[name] = self._write(name, _as_npy(values[:, view] if array.split else values))
        record = commit.make_record(self.shard, self.keys, quarantined, files, statistics)
        commit.publish(self.folder, self.cache, self.shard, NAME, record)
        return record

    def _index(self) -> bytes:
        encoded = [key.encode() for key in self.keys]
        keys = ShardKeys(
            np.frombuffer(b"".join(encoded), np.uint8),
            np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        )
        offsets = np.array(self.offsets, np.int64).reshape(
            self.views, len(self.keys), len(self.arrays)
        )
        return _pack(Index(tuple(self.arrays), offsets, keys))

    def _write(self, name: str, data: bytes) -> dict[str, Any]:
        json_file.write_file(self.folder / name, data)
        return {"bytes": len(data), "crc32c": f"{crc32c(data):08x}"}

    def discard(self) -> None:
        for file in self.files:
            file.abort()
        shutil.rmtree(self.folder, ignore_errors=True)


def _checked(array: Array, values: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    values = np.ascontiguousarray(values, array.dtype)
    if values.shape != (count, *array.item):
        raise ValueError(
            f"{array.name}: items {values.shape} given, {(count, *array.item)} declared"
        )
    return values


def _as_bytes(array: Array, values: npt.NDArray[Any], count: int) -> npt.NDArray[np.uint8]:
    """(count, *item) -> (count, item bytes)."""
    return (
        _checked(array, values, count).reshape(-1).view(np.uint8).reshape(count, array.item_bytes)
    )


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy, format version 1.0."""
    out = io.BytesIO()
    npy_format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def _npy(array: Array, view: int) -> str:
    """The file of an array of checksums."""
    return f"{array.name}.v{view}.npy" if array.split else f"{array.name}.npy"


def _as_npy(values: npt.NDArray[Any]) -> bytes:
    """With a header of _NPY_BYTES, whatever the number of rows."""
    header = _npy_header(values.dtype.str, values.shape)
    assert len(header) == _NPY_BYTES, values.shape
    return header + values.tobytes()


def _member(name: str, size: int) -> bytes:
    """A tar header with time 0, owner 0 and mode 0644; POSIX.1-1988 where the name fits, else with
    a pax record."""
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT if name.isascii() else tarfile.PAX_FORMAT)
    except ValueError:  # too long
        return info.tobuf(tarfile.PAX_FORMAT)


def _close(file: RowFile) -> dict[str, Any]:
    file.append(np.frombuffer(_END, np.uint8))
    file.close()
    return {"bytes": file.bytes, "crc32c": f"{file.crc:08x}"}


def writer(
    cache: Path, shard: str, arrays: Sequence[Array], views: int, form: ShardForm
) -> TarShardWriter:
    """See store.Store.writer; tars have no room for what `form` says."""
    return TarShardWriter(cache, shard, arrays, views)


# ------------------------------------------------------------ the index


def _pack(index: Index) -> bytes:
    tensors: dict[str, npt.NDArray[Any]] = {"offsets": index.offsets}
    tensors.update(key=index.keys.blob, key_offsets=index.keys.offsets)
    about = json.dumps({"arrays": index.names, "crc32c": f"{_crc(index):08x}"}, sort_keys=True)
    # One entry of metadata: of several, safetensors changes the order from run to run.
    return save(tensors, {"index": about})


def _crc(index: Index) -> int:
    """Compute the crc32c of names, shapes and numbers: whatever could send a read to another
    offset."""
    crc = crc32c(json.dumps([index.names, index.offsets.shape]).encode())
    for values in (index.offsets, index.keys.offsets, index.keys.blob):
        crc = crc32c(values.tobytes(), crc)
    return crc


def _unpack(path: str | Path, data: bytes) -> Index:
    """The index in the bytes of its file, if all of it is as it was written."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["index"])
        tensors = load(data)
        index = Index(
            tuple(about["arrays"]),
            tensors["offsets"],
            ShardKeys(tensors["key"], tensors["key_offsets"]),
        )
        if any(type(name) is not str for name in index.names):
            raise ValueError("a name is no text")
        given, crc = about["crc32c"], f"{_crc(index):08x}"
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise _damaged(path, "it is not the index of a shard") from error
    dtypes = [values.dtype for values in (index.offsets, index.keys.blob, index.keys.offsets)]
    rows = index.keys.offsets.size - 1
    if (
        given != crc
        or dtypes != [np.int64, np.uint8, np.int64]
        or index.offsets.shape[1:] != (rows, len(index.names))
    ):
        raise _damaged(path, f"its checksum is {short(given)}, its content has {crc}")
    return index


def _damaged(path: str | Path, why: str) -> UserError:
    cache = Path(path).parent.parent.parent
    return UserError(
        f"cache file {path} is damaged: {why}; run `{command_line('featcache', 'verify', cache)}`"
    )


@lru_cache(_INDICES)
def _load(path: str, stamp: Stamp) -> Index:
    """The index in a file; the stamp tells it from one that lay there before the shard was
    extracted again."""
    return _unpack(path, Path(path).read_bytes())


@lru_cache(_COLUMNS)
def _column(
    path: str, stamp: Stamp, views: int, view: int, name: str, item_bytes: int = 0
) -> npt.NDArray[np.int64]:
    """(n,) offsets of one array's items in the tar of one view, all within it."""
    index = _load(path, stamp)
    if name not in index.names or len(index.offsets) != views:
        held = f"{counted(len(index.offsets), 'view')} of {', '.join(index.names)}"
        raise _damaged(
            path, f"it holds {held}, and {name} of {counted(views, 'view')} is looked for"
        )
    column = index.offsets[view, :, index.names.index(name)].copy()
    tar = Path(path).with_name(_tar(view))
    tar_bytes = files_of(tar).size(str(tar))
    if len(column) and not 0 <= column.min() <= column.max() <= tar_bytes - item_bytes:
        raise _damaged(path, f"its offsets of {name} lie outside of {tar.name}")
    return column


def locate(
    cache: Path, shard: str, array: Array, views: int, view: int, rows: npt.NDArray[np.int64]
) -> tuple[str, npt.NDArray[np.int64]]:
    """See store.Store.locate."""
    folder = f"{cache}/{SHARDS}/{shard}.{NAME}"
    if array.name in checksums.NAMES:
        items = rows if array.split else rows * views + view
        return f"{folder}/{_npy(array, view)}", _NPY_BYTES + items * array.item_bytes
    index = f"{folder}/{INDEX}"
    files_of(folder).bring([index])
    try:
        status = os.stat(index)  # noqa: PTH116
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        column = _column(index, stamp, views, view, array.name, array.item_bytes)
    except OSError as error:
        raise read_error(index, error) from error
    if len(rows) and rows.max() >= len(column):
        raise _damaged(
            index, f"it has {counted(len(column), 'row')}, row {rows.max()} is looked for"
        )
    return f"{folder}/{_tar(view)}", column[rows]


def keys(cache: Path, shard: str, record: Mapping[str, Any]) -> ShardKeys:
    """See store.Store.keys."""
    path, facts = folder_path(cache, shard, NAME) / INDEX, record["files"][INDEX]
    data = path.read_bytes() if path.is_file() else b""
    if len(data) != facts["bytes"] or f"{crc32c(data):08x}" != facts["crc32c"]:
        raise UserError(
            f"cache file {path}: its checksum differs; run "
            f"`{command_line('featcache', 'verify', cache)}`"
        )
    return _unpack(path, data).keys


def key_files(record: Mapping[str, Any]) -> list[str]:
    """See store.Store.key_files."""
    return [INDEX]


def is_intact(path: Path, facts: Mapping[str, Any]) -> bool:
    """See store.Store.is_intact."""
    return f"{commit.file_crc(path, path.stat().st_size):08x}" == facts["crc32c"]


def file_shapes(
    arrays: Sequence[Array], views: int, form: ShardForm
) -> dict[str, FileShape | None]:
    """See store.Store.file_shapes."""
    shapes: dict[str, FileShape | None] = {INDEX: None}
    shapes |= {_tar(view): None for view in range(views)}
    for array in arrays:
        if array.name in checksums.NAMES:
            items = 1 if array.split else views
            for view in range(views) if array.split else [0]:
                shapes[_npy(array, view)] = FileShape(_NPY_BYTES, items * array.item_bytes)
    return shapes


def root_files(form: ShardForm) -> dict[str, bytes]:
    """See store.Store.root_files."""
    return {}
