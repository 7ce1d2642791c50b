"""Before rows are added to a cache, pictures of the rows that it has are looked at again.

Names alone would let other pictures under the same keys finish a cache, repair it, or give it a
second teacher. A few pictures of all shards are decoded and rendered, one for every SHARE that are
to be extracted, so that it costs a few per cent at most.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from featcache.errors import UserError
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.reading.join import I64
from featcache.reading.pixel_check import SAME_PICTURE
from featcache.reading.sample_check import SAMPLE, PictureCheck
from featcache.storage.keys import Keys
from featcache.storage.store import get_store

SHARE, LEAST = 32, 8  # pictures to extract for each that is looked at; at least so many are
_ADVICE = "give the pictures of the extraction: --images SRC"


def check_same_pictures(
    source: Source, out: Path, extracted: int, without: Collection[str] = ()
) -> None:
    """Raise IdentityError unless a sample of the pictures whose rows the cache at `out` has, but
    for shards that are damaged (`without`), is of the same pictures in `source`.

    `extracted` pictures are to follow. Small differences, which another version of a decoder makes,
    are let pass, and so are pictures that can no longer be decoded: their rows are there. A cache
    that cannot be opened is told of by those who write to it.
    """
    try:
        cache = Cache(out, partial=bool(without))
    except UserError:
        return
    with cache:
        rows = _sound_rows(cache, without)
        whole = PictureCheck(cache, source, rows, rows)
        most = min(SAMPLE, max(extracted // SHARE, LEAST))
        found = [(_index(source, cache, row), row) for row in rows[whole.sample(0, most)].tolist()]
        pairs = np.array([pair for pair in found if pair[0] >= 0], np.int64).reshape(-1, 2)
        check = PictureCheck(
            cache, source, pairs[:, 0], pairs[:, 1], SAME_PICTURE, _ADVICE, skip_unusable=True
        )
        check.check_pixels(np.arange(len(pairs)), 0)


def _sound_rows(cache: Cache, without: Collection[str]) -> I64:
    """Return the rows of the shards that are not left out."""
    counts = [record["rows"] for record in cache.records]
    sound = [record["shard"] not in without for record in cache.records]
    return np.flatnonzero(np.repeat(sound, counts))


def _index(source: Source, cache: Cache, row: int) -> int:
    """Return the number of a row's picture in the source, found among those of its shard; -1 where
    it is not there. Keys of other shards may be damaged, and are not read."""
    ends = np.cumsum([record["rows"] for record in cache.records])
    record = cache.records[int(np.searchsorted(ends, row, "right"))]
    shard = next(each for each in cache.manifest["shards"] if each["name"] == record["shard"])
    here = Keys(*get_store(cache.identity["store"]).keys(cache.path, shard["name"], record))
    first = int(ends[ends <= row].max(initial=0))
    key, listed = here[row - first], slice(shard["first"], shard["first"] + shard["count"])
    keys = list(source.keys[listed])
    return shard["first"] + keys.index(key) if key in keys else -1
