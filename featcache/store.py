"""The contract of a store: rows of named arrays in shards, appended once, then read by byte ranges.

Rows of a shard arrive as *items*, one per (row, view), views of a row together. A store decides which file holds what;
it must be able to say where an item's bytes lie, plain and in C order, because the reader preads them. n rows, V views.

A shard is complete when `shards/NAME.json`, its record, exists. A writer works under a name of its own, and the record
travels inside its folder until the very end, so that one rename publishes the data and one publishes the record:

    NAME.zarr.HOST-PID-NONCE.tmp/  ->  NAME.zarr/ (holds record.json)  ->  NAME.json (record.json moved out)

Whatever moment a process dies at, the next one removes the temporary folder, or adopts the renamed one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

STORES = {"zarr": "featcache.zarr_store"}
SHARDS = "shards"
QUARANTINE = "quarantine.json"


@dataclass(frozen=True)
class Array:
    """One named array: what an item is, and how items are laid out.

    `per_view`: an item for each (row, view), else for each row. `split`: one file per view (the big arrays), so that a
    view can be read or added without touching the others.
    """

    name: str
    dtype: str
    item: tuple[int, ...]
    dimensions: tuple[str, ...]
    per_view: bool = True
    split: bool = False

    @property
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


def array(name: str, fields: Mapping[str, Any]) -> Array:
    """The inverse of `Array.as_dict`."""
    item, dimensions = tuple(fields["item"]), tuple(fields["dimensions"])
    return Array(name, fields["dtype"], item, dimensions, fields["per_view"], fields["split"])


class ShardWriter(Protocol):
    """Streams one shard. Memory stays flat: items go to their files as they come."""

    def append(self, items: Mapping[str, npt.NDArray[Any]], ranges: Mapping[str, tuple[float, float]]) -> None:
        """Items (m, *item) of every per-view array, in (row, view) order; rows may be split between calls.

        `ranges` gives (min, max) of arrays for which computing it here would cost too much (`features`).
        """
        ...

    def append_rows(self, items: Mapping[str, npt.NDArray[Any]]) -> None:
        """Items (m, *item) of the arrays that are not per view."""
        ...

    def finish(self, keys: Sequence[str], quarantined: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """Close, sync and publish; returns the record. A shard that another process published meanwhile stays."""
        ...

    def discard(self) -> None:
        """Remove everything written so far."""
        ...


class Store(Protocol):
    """What a store's module provides."""

    @staticmethod
    def writer(cache: Path, shard: str, arrays: Sequence[Array], views: int) -> ShardWriter: ...

    @staticmethod
    def locate(
        cache: Path, shard: str, array: Array, views: int, view: int, rows: npt.NDArray[np.int64]
    ) -> tuple[Path, npt.NDArray[np.int64]]:
        """The file that holds an array's items of one view, and the byte offset of each of `rows` in it."""
        ...

    @staticmethod
    def check(cache: Path, shard: str, record: Mapping[str, Any], *, deep: bool) -> list[str]:
        """What is wrong with a shard's files: missing or of another size; with `deep`, any changed byte."""
        ...

    @staticmethod
    def settle(cache: Path, shard: str) -> None:
        """Adopt or remove what dead writers left of a shard that has no record."""
        ...


def store(name: str) -> ModuleType:
    """The module of a store by the name in the manifest."""
    return importlib.import_module(STORES[name])


def record_path(cache: Path, shard: str) -> Path:
    return cache / SHARDS / f"{shard}.json"
