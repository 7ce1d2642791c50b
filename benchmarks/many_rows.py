"""A cache of very many rows is written by the store's own writer: true keys, records and checksums
behind tiny features, 1,024 rows a shard.

What was written stays: the same call goes on where it was, and a complete cache is taken as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UserError
from featcache.storage import checksums, commit, manifest
from featcache.storage.statistics import FeatureStatistics, Statistics
from featcache.storage.store import SHARDS, Array, get_store, record_path
from featcache.views import pixel_path
from featcache.views.policy import Policy

SHARD_ROWS = 1024
STORE = "zarr"
_TOKENS, _WIDTH = 3, 8  # [CLS] and two patches
_ROW_VIEW = ("row", "view")
_DIMENSIONS = (*_ROW_VIEW, "level", "token", "channel")


def key(row: int) -> str:
    """Return the key of a row: as long as those of ImageNet are."""
    return f"n{row * 7919 % 1000:08d}/n{row * 7919 % 1000:08d}_{row}"


def _arrays() -> list[Array]:
    plain = [
        Array("features", "<f2", (1, _TOKENS, _WIDTH), _DIMENSIONS, split=True),
        Array("attention", "<f4", (_TOKENS - 1,), (*_ROW_VIEW, "patch")),
        Array("mask_order", "|u1", (_TOKENS - 1,), (*_ROW_VIEW, "rank")),
    ]
    return [*plain, *checksums.checksum_arrays(plain, 1, _TOKENS, ranked=False)]


def _about(rows: int) -> dict[str, Any]:
    identity = {
        "teacher": {"name": "benchmark", "patches": _TOKENS - 1, "width": _WIDTH, "depth": 1},
        "levels": [1],
        "eps": 1e-5,
        "order": "attentive",
        "codec": "fp16",
        "tokens": "raster",
        "policy": Policy().as_dict(),
        "pixel_path": pixel_path.PIXEL_PATH,
        "views": 1,
        "pictures": {"count": rows, "keys_digest": manifest.keys_digest(map(key, range(rows)))},
        "rows_per_shard": SHARD_ROWS,
        "store": STORE,
    }
    shards = [
        {"name": f"{i:06d}", "first": first, "count": min(SHARD_ROWS, rows - first)}
        for i, first in enumerate(range(0, rows, SHARD_ROWS))
    ]
    arrays = {array.name: array.as_dict() for array in _arrays()}
    return manifest.make(identity, {"weights": "registered", "source": ""}, arrays, shards, {})


def _items(first: int, count: int) -> dict[str, Any]:
    """Return the items of rows: features that tell which row they are of."""
    numbers = np.arange(first, first + count)
    features = np.zeros((count, 1, _TOKENS, _WIDTH), "<f2")
    features[:, 0, 0, :4] = (numbers[:, None] >> (8 * np.arange(4))) & 255
    items: dict[str, Any] = {
        "features": features,
        "attention": np.full((count, _TOKENS - 1), 1 / _TOKENS, "<f4"),
        "mask_order": np.tile(np.arange(_TOKENS - 1, dtype=np.uint8), (count, 1)),
    }
    return {**items, **checksums.compute_checksums(_arrays(), items)}


def row_numbers(features: Any) -> Any:
    """Return the numbers (n,) of the rows that features (n, 1, T, D) are of."""
    return (features[:, 0, 0, :4].astype(np.int64) << (8 * np.arange(4))).sum(1)


def write_rows(path: Path, rows: int, log: Callable[[str], None]) -> None:
    """Write a cache of so many rows, or what is missing of it. Files are not synced: a machine that
    fails meanwhile is not what is measured."""
    if not (path / manifest.NAME).is_file():
        (path / SHARDS).mkdir(parents=True, exist_ok=True)
        manifest.write(path / manifest.NAME, _about(rows))
    about = manifest.read(path)
    if about["identity"]["pictures"]["count"] != rows:
        raise UserError(f"{str(path)!r} holds another cache; give another --work")
    left = [s for s in about["shards"] if not record_path(path, s["name"]).is_file()]
    if left:
        commit.recover(path, STORE, [shard["name"] for shard in left])
    with _unsynced():
        _write_shards(path, about, left, log)


def _write_shards(
    path: Path, about: dict[str, Any], left: list[dict[str, Any]], log: Callable[[str], None]
) -> None:
    form, arrays, start = manifest.shard_form(about), _arrays(), time.perf_counter()
    for done, shard in enumerate(left):
        first, count = shard["first"], shard["count"]
        items, known = _items(first, count), Statistics()
        known.add(items, FeatureStatistics(0.0, 255.0, np.zeros((count, 1), np.float32)))
        writer = get_store(STORE).writer(path, shard["name"], arrays, 1, form)
        writer.append([key(row) for row in range(first, first + count)], items)
        writer.finish([], known.summary())
        if done + 1 in (20, 200) or (done + 1) % 1000 == 0:
            each = (time.perf_counter() - start) / (done + 1)
            minutes = each * (len(left) - done - 1) / 60
            log(f"{done + 1} of {len(left)} shards written, {minutes:.1f} min left")


class _unsynced:
    """Let nothing be synced."""

    def __enter__(self) -> None:
        self._fsync, os.fsync = os.fsync, lambda fd: None

    def __exit__(self, *_: object) -> None:
        os.fsync = self._fsync


def sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the number of files below a folder, and their bytes on disk."""
    files = total = 0
    for folder, _, names in os.walk(path):
        files += len(names)
        total += sum(os.lstat(f"{folder}/{name}").st_blocks * 512 for name in names)
    yield from (("files", files), ("disk_bytes", total))
