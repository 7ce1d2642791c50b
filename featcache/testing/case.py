"""Write and read a shard by a store's functions, as extraction and readers call them.

n rows, V views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from featcache.storage import commit
from featcache.storage.store import SHARDS, Array, ShardForm, ShardWriter, get_store
from featcache.testing.items import ARRAYS, SHARD, STATISTICS, as_items


class StoreCase:
    """Writes and reads shards of the store `name` by its contract alone."""

    name: str
    form = ShardForm(coordinates={"level": (8, 12)}, attributes={"teacher": "t"})

    @property
    def backend(self) -> ModuleType:
        return get_store(self.name)

    def writer(
        self, cache: Path, arrays: Sequence[Array] = ARRAYS, views: int = 2, shard: str = SHARD
    ) -> ShardWriter:
        (cache / SHARDS).mkdir(parents=True, exist_ok=True)
        writer: ShardWriter = self.backend.writer(cache, shard, arrays, views, self.form)
        return writer

    def fill(
        self,
        writer: ShardWriter,
        arrays: Sequence[Array],
        data: Mapping[str, np.ndarray],
        views: int,
        cuts: Sequence[int] = (),
        keys: Sequence[str] | None = None,
    ) -> None:
        """Append all items, split at the item numbers `cuts` (rows may be split between calls)."""
        rows = len(next(iter(data.values())))
        given = [
            key
            for key in ([f"k{i}" for i in range(rows)] if keys is None else keys)
            for _ in range(views)
        ]
        items = as_items(arrays, data, views)
        edges = sorted({0, len(given), *(cut % (len(given) + 1) for cut in cuts)})
        for low, high in pairwise(edges):
            writer.append(
                given[low:high], {name: values[low:high] for name, values in items.items()}
            )

    def publish(
        self,
        cache: Path,
        data: Mapping[str, np.ndarray],
        *,
        arrays: Sequence[Array] = ARRAYS,
        views: int = 2,
        cuts: Sequence[int] = (),
        shard: str = SHARD,
        keys: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        writer = self.writer(cache, arrays, views, shard)
        self.fill(writer, arrays, data, views, cuts, keys)
        return writer.finish([], STATISTICS)

    def read(
        self, cache: Path, array: Array, views: int, rows: np.ndarray, shard: str = SHARD
    ) -> np.ndarray:
        """(V, n, *item) by plain reads at the offsets that the store tells."""
        out = np.empty((views if array.per_view else 1, len(rows), *array.item), array.dtype)
        for view in range(len(out)):
            path, offsets = self.backend.locate(cache, shard, array, views, view, rows)
            path = Path(path)
            assert offsets.dtype == np.int64
            data = path.read_bytes()
            for place, offset in enumerate(offsets.tolist()):
                item = np.frombuffer(data[offset : offset + array.item_bytes], array.dtype)
                out[view, place] = item.reshape(array.item)
        return out

    def keys(self, cache: Path, record: Mapping[str, Any]) -> list[str]:
        blob, offsets = self.backend.keys(cache, SHARD, record)
        assert (blob.dtype, offsets.dtype) == (np.uint8, np.int64)
        return [blob[low:high].tobytes().decode() for low, high in pairwise(offsets)]

    def problems(self, cache: Path, record: Mapping[str, Any], *, deep: bool = True) -> list[str]:
        return commit.check_shard(cache, SHARD, self.name, record, deep=deep)

    def settle(self, cache: Path, *shards: str) -> None:
        commit.recover(cache, self.name, shards or [SHARD])
