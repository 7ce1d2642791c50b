"""A store keeps rows of named arrays in shards, appended once, then read by byte ranges: this is
its contract.

Rows of a shard arrive as *items*, one per (row, view), views of a row together. A store decides
which file holds what; it must be able to say where an item's bytes lie, plain and in C order,
because the reader preads them. n rows, V views.

A shard is complete when `shards/NAME.json`, its record, exists. A writer works under a name of its
own, and the record travels inside its folder until the very end, so that one rename publishes the
data and one publishes the record:

    NAME.STORE.HOST-PID-NONCE.tmp/  ->  NAME.STORE/ (holds record.json)
                                    ->  NAME.json (record.json moved out)

Whatever moment a process dies at, the next one removes the temporary folder, or adopts the renamed
one. All stores share `commit`; a store writes the files, says where items lie, and
checks a file.

The meaning of a format never changes: a cache is continued, repaired and added to in its own.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, near

STORES = {
    "zarr": "featcache.storage.zarr_store",
    "webdataset": "featcache.storage.webdataset_store",
}
SHARDS = "shards"
PARTS = "parts"  # folder of what was added to a cache
QUARANTINE = "quarantine.json"
FORMATS = (3, 4)  # that are read and written; the last is that of new caches
FORMAT = FORMATS[-1]
COMPRESSIONS = ("blosc",)


@dataclass(frozen=True)
class Array:
    """Describes one named array: its item, and how items are laid out.

    `per_view`: an item for each (row, view), else for each row. `split`: one file per view (the big
    arrays), so that a view can be read or added without touching the others.
    """

    name: str
    dtype: str
    item: tuple[int, ...]
    dimensions: tuple[str, ...]
    per_view: bool = True
    split: bool = False

    @cached_property
    def item_bytes(self) -> int:
        return math.prod(self.item) * np.dtype(self.dtype).itemsize

    def as_dict(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "item": list(self.item),
            "dimensions": list(self.dimensions),
            "per_view": self.per_view,
            "split": self.split,
        }


def array_from_dict(name: str, fields: Mapping[str, Any]) -> Array:
    """Make an Array from what `Array.as_dict` gave."""
    item, dimensions = tuple(fields["item"]), tuple(fields["dimensions"])
    return Array(name, fields["dtype"], item, dimensions, fields["per_view"], fields["split"])


@dataclass(frozen=True)
class ShardForm:
    """Says how the files of a shard are written beside what its arrays say; a manifest decides it.

    `compression` of the rows of split arrays, none by default. The others are for other libraries,
    where a store has room for them: `coordinates`, dimension -> its numbers, such as those of
    levels; `attributes` of every shard; `created_by`, of the cache.
    """

    format: int = FORMAT
    compression: str = ""
    coordinates: Mapping[str, Sequence[int]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    created_by: str = ""


class ShardKeys(NamedTuple):
    """The keys of a shard's rows lie in one block of bytes: key i is blob[offsets[i]:offsets[i +
    1]], UTF-8."""

    blob: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]


class FileShape(NamedTuple):
    """The bytes of a shard's file follow from its rows, unless they are compressed; so do the
    chunks that a file with an index has, and `chunks` is None of one without."""

    fixed: int
    per_row: int
    chunks: int | None = None
    compression: str = ""

    def facts(self, rows: int) -> dict[str, Any]:
        """Return what the record states of the file of so many rows, but for its checksum."""
        return {
            **({} if self.compression else {"bytes": self.fixed + rows * self.per_row}),
            **({} if self.chunks is None else {"chunks": rows * self.chunks}),
            **({"compression": self.compression} if self.compression else {}),
        }


class ShardWriter(Protocol):
    """Streams one shard. Memory stays flat: items go to their files as they come."""

    def append(self, keys: Sequence[str], items: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append items (m, *item) of every array, and the m keys they belong to, in (row, view)
        order; a row may be split between calls. An array that is not per view is given for every
        item too; that of view 0 counts."""
        ...

    def finish(
        self, quarantined: Sequence[Mapping[str, str]], statistics: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Close, sync and publish; returns the record. A shard that another process published
        meanwhile stays."""
        ...

    def discard(self) -> None:
        """Remove everything written so far."""
        ...


class Store(Protocol):
    """A store's module provides these functions. A shard's files lie below `shards/NAME.STORE/`;
    the record names them all, with their bytes and the crc32c that `is_intact` compares. `FILES`
    fits the path of each below that folder: a file that it does not fit is a stranger's."""

    FILES: re.Pattern[str]

    @staticmethod
    def writer(
        cache: Path, shard: str, arrays: Sequence[Array], views: int, form: ShardForm
    ) -> ShardWriter: ...

    @staticmethod
    def locate(
        cache: Path, shard: str, array: Array, views: int, view: int, rows: npt.NDArray[np.int64]
    ) -> tuple[str, npt.NDArray[np.int64]]:
        """Return the file that holds an array's items of one view, and the byte offset of each of
        `rows` in it.

        Called for every shard of every batch, so the path is text, which is ten times cheaper to
        make than a Path.
        """
        ...

    @staticmethod
    def keys(cache: Path, shard: str, record: Mapping[str, Any]) -> ShardKeys:
        """Read the keys of a shard, checked against the record's checksums."""
        ...

    @staticmethod
    def key_files(record: Mapping[str, Any]) -> list[str]:
        """Return the names of the files of a shard that `keys` reads."""
        ...

    @staticmethod
    def is_intact(path: Path, facts: Mapping[str, Any]) -> bool:
        """Return whether every byte of a file is as recorded."""
        ...

    @staticmethod
    def file_shapes(
        arrays: Sequence[Array], views: int, form: ShardForm
    ) -> dict[str, FileShape | None]:
        """Name all files of a shard, with what follows of them from the rows alone."""
        ...

    @staticmethod
    def root_files(form: ShardForm) -> dict[str, bytes]:
        """Return the files that a store has beside all shards, by their paths in the cache; they
        say nothing that the manifest does not."""
        ...


def hash_dtype(format: int) -> str:
    """Return what `pixel_hash` is stored as; signed since format 4, for readers that know no
    unsigned numbers of 64 bits. Its bytes are the same."""
    return "<i8" if format >= 4 else "<u8"


def get_store(name: str) -> ModuleType:
    """Return the module of a store by the name in the manifest."""
    if name not in STORES:
        raise UserError(
            f"unknown store {name!r}: {near(name, STORES)}; a newer version of featcache may know "
            "it"
        )
    return importlib.import_module(STORES[name])


def record_path(cache: Path, shard: str) -> Path:
    return cache / SHARDS / f"{shard}.json"


def folder_path(cache: Path, shard: str, name: str) -> Path:
    """Return the folder of a shard's files in the store `name`."""
    return cache / SHARDS / f"{shard}.{name}"
