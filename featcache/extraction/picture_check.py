"""Before rows are added to a cache, pictures of the rows that it has are looked at again.

Names alone would let other pictures under the same keys finish a cache, repair it, or give it a
second teacher. A few pictures of all shards are decoded and rendered, one for every SHARE that are
to be extracted, so that it costs a few per cent at most. What is added to rows that are there is
compared with them row by row: sizes, and pixels of the views that both have, for some bytes a view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import IdentityError, UserError
from featcache.extraction.rows import Batch
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.reading.join import I64
from featcache.reading.pixel_check import SAME_PICTURE
from featcache.reading.sample_check import SAMPLE, PictureCheck
from featcache.storage.keys import Keys, read_shard_keys
from featcache.storage.store import get_store

SHARE, LEAST = 32, 8  # pictures to extract for each that is looked at; at least so many are
_ADVICE = "give the pictures of the extraction: --images SRC"


def check_same_pictures(
    source: Source, out: Path, extracted: int, without: Collection[str] = (), *, first: int = 0
) -> None:
    """Raise IdentityError unless a sample of the pictures whose rows the cache at `out` has, but
    for shards that are damaged (`without`), is of the same pictures in `source`.

    `extracted` pictures are to follow; `first` of the cache's come before those of `source`. Small
    differences, which another version of a decoder makes, are let pass, and so are pictures that
    can no longer be decoded: their rows are there. A cache that cannot be opened is told of by
    those who write to it.
    """
    try:
        cache = Cache(out, partial=bool(without))
    except UserError:
        return
    with cache:
        rows = _sound_rows(cache, without)
        whole = PictureCheck(cache, source, rows, rows)
        most = min(SAMPLE, max(extracted // SHARE, LEAST))
        sample = rows[whole.sample(0, most)].tolist()
        found = [(_index(source, cache, row, first), row) for row in sample]
        pairs = np.array([pair for pair in found if pair[0] >= 0], np.int64).reshape(-1, 2)
        check = PictureCheck(
            cache, source, pairs[:, 0], pairs[:, 1], SAME_PICTURE, _ADVICE, skip_unusable=True
        )
        check.check_pixels(np.arange(len(pairs)), 0)


def _sound_rows(cache: Cache, without: Collection[str]) -> I64:
    """Return the rows of the shards that are not left out."""
    sound = [name not in without for name in cache.shard_names]
    return np.flatnonzero(np.repeat(sound, np.diff(cache.shard_starts)))


def _index(source: Source, cache: Cache, row: int, before: int) -> int:
    """Return the number of a row's picture in the source, whose first is the cache's number
    `before`, found among those of its shard; -1 where it is not there."""
    number = int(np.searchsorted(cache.shard_starts, row, "right")) - 1
    name = cache.shard_names[number]
    shard = next(each for each in cache.manifest["shards"] if each["name"] == name)
    key = next(key for key, here in _rows_of_shard(cache, number).items() if here == row)
    first = shard["first"] - before
    keys = list(source.keys[first : first + shard["count"]]) if first >= 0 else []
    return first + keys.index(key) if key in keys else -1


def _rows_of_shard(cache: Cache, number: int) -> dict[str, int]:
    """Return key -> row of one shard; the keys of others may be damaged, and are not read."""
    record = cache.records[number]
    keys = Keys(*read_shard_keys(get_store(cache.identity["store"]), cache.path, record))
    first = int(cache.shard_starts[number])
    return {key: first + i for i, key in enumerate(keys)}


# ------------------------------------------------------------ row by row


@dataclass(frozen=True)
class StoredViews:
    """Compares what is rendered for a part with the views that its cache has of the same rows."""

    cache: Cache

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.cache.shard_names)}

    def rows(self, shard: str) -> dict[str, int]:
        """Return key -> row of a shard; nothing where the cache itself does not have it yet."""
        number = self._numbers.get(shard)
        return {} if number is None else _rows_of_shard(self.cache, number)

    def check(self, batch: Batch, rows: dict[str, int], first_view: int) -> None:
        """Raise IdentityError unless the views of a batch, numbered from `first_view`, are of the
        pictures that the cache has at these rows."""
        known = [(picture, view) for picture, view in batch if picture.key in rows]
        at = np.array([rows[picture.key] for picture, _ in known], np.int64)
        sizes = self.cache.read(at, 0, ("source_size",))["source_size"]
        for (picture, _), size in zip(known, sizes.tolist(), strict=True):
            if list(picture.source_size) != size:
                here = "{} x {} pixels".format(*picture.source_size)
                raise _other(picture.key, f"it has {here}, {size[0]} x {size[1]} in the cache")
        both = [i for i, (_, view) in enumerate(known) if first_view + view < self.cache.views]
        views = np.array([first_view + known[i][1] for i in both], np.int64)
        stored = self.cache.read(at[both], views, ("pixel_hash",))["pixel_hash"]
        for i, view, there in zip(both, views.tolist(), stored.tolist(), strict=True):
            picture, own = known[i]
            if int(picture.hashes[own]) != there:
                self._check_thumbnail(picture.key, int(at[i]), view, picture.thumbnails[own])

    def _check_thumbnail(self, key: str, row: int, view: int, seen: npt.NDArray[np.uint8]) -> None:
        stored = self.cache.read([row], view, ("thumbnail",))["thumbnail"][0]
        difference = np.abs(seen.astype(int) - stored.astype(int)).mean()
        if difference > SAME_PICTURE:
            means = f"block means differ by {difference:.1f} levels of 255"
            raise _other(key, f"view {view} is not that of the cache ({means})")


def _other(key: str, why: str) -> IdentityError:
    return IdentityError(
        f"picture {key!r}: {why}; likely another picture under this key; {_ADVICE}"
    )


@contextlib.contextmanager
def stored_views(folders: Collection[Path], root: Path) -> Iterator[StoredViews | None]:
    """Yield what parts that are added to the cache `root` are compared with; None where nothing but
    the cache itself is extracted."""
    if all(folder == root for folder in folders):
        yield None
        return
    with Cache(root) as cache:
        yield StoredViews(cache)
