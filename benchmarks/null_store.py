"""The store `null` keeps nothing: what an extraction costs without its writing is measured with it.

A program that ends afterwards registers it by `STORES[NAME] = null_store.__name__`, any other for
a block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from featcache.storage import commit, manifest
from featcache.storage.store import STORES, Array, ShardForm

NAME = "null"


@contextmanager
def registered() -> Iterator[None]:
    """Let a block write into it by its name."""
    STORES[NAME] = __name__
    try:
        yield
    finally:
        del STORES[NAME]


class NullWriter:
    """Counts what it is given, and publishes a record without files: a `store.ShardWriter`."""

    def __init__(self, cache: Path, shard: str, views: int) -> None:
        self.cache, self.shard, self.views = cache, shard, views
        self.folder = commit.begin_shard(cache, shard, NAME)
        self.keys: list[str] = []
        self.items = 0

    def append(self, keys: Sequence[str], items: Mapping[str, npt.NDArray[Any]]) -> None:
        self.keys.extend(keys[-self.items % self.views :: self.views])
        self.items += len(keys)

    def finish(
        self, quarantined: Sequence[Mapping[str, str]], statistics: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        record = {
            "shard": self.shard,
            "rows": len(self.keys),
            "keys_digest": manifest.keys_digest(self.keys),
            "quarantined": [dict(row) for row in quarantined],
            "files": {},
            "statistics": {name: dict(facts) for name, facts in statistics.items()},
        }
        commit.publish(self.folder, self.cache, self.shard, NAME, record)
        return record

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def writer(
    cache: Path, shard: str, arrays: Sequence[Array], views: int, form: ShardForm
) -> NullWriter:
    """Return the writer of one shard."""
    return NullWriter(cache, shard, views)


def root_files(form: ShardForm) -> dict[str, bytes]:
    return {}
