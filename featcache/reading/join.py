"""Pictures and rows are joined by key, never by position.

n training pictures, m pictures of a source, S pixels of a view at the policy's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from featcache.errors import IdentityError, UserError, counted
from featcache.pictures.source import ALLOWED, Source
from featcache.reading.cache import Cache
from featcache.storage import manifest, picture_lists
from featcache.views import pixel_path

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredPixels:
    """A cache that stores its views' pixels serves as a source: it has keys, and nothing is left to
    decode. `lists`: the rows of its first lists of pictures alone."""

    cache: Cache
    lists: int | None = None
    labels: None = None
    classes: None = None

    @property
    def spec(self) -> str:
        return str(self.cache.path)

    @cached_property
    def keys(self) -> Sequence[str]:
        keys: Sequence[str] = self.cache.keys
        return keys if len(self) == len(keys) else keys[: len(self)]

    @cached_property
    def _rows(self) -> int:
        known = picture_lists.lists(self.cache.identity)
        if self.lists is None or self.lists >= len(known):
            return len(self.cache)
        of = picture_lists.shards(known[: self.lists], self.cache.identity["rows_per_shard"])
        names = {shard["name"] for shard in of}
        counts = np.diff(self.cache.shard_starts).tolist()
        pairs = zip(self.cache.shard_names, counts, strict=True)
        return sum(count for name, count in pairs if name in names)

    def __len__(self) -> int:
        return self._rows

    def read(self, index: int) -> bytes:
        raise UserError(
            f"picture {self.keys[index]!r}: cache {self.spec!r} holds views of it, not the "
            f"picture; give the pictures as {ALLOWED}"
        )


def stores_pixels(cache: Cache) -> bool:
    """Return whether the rendered views are stored (`--pixels raw`)."""
    return "pixels" in cache.fields


def join_by_key(cache: Cache, source: Source, *, decodes: bool = True) -> tuple[I64, I64, int]:
    """Join the training pictures with cache rows by key: (pictures (n,), rows (n,), skipped).

    Quarantined pictures are skipped and counted; any other picture the cache does not know, or
    another pixel path than the extraction's where pictures are decoded (`decodes`), is an
    IdentityError.
    """
    if isinstance(source, StoredPixels) and source.cache is cache:
        every = np.arange(len(source), dtype=np.int64)
        return every, every, 0
    if decodes:
        pixel_path.check_pixel_path(
            source, cache.identity["pixel_path"], f"cache {str(cache.path)!r}"
        )
    rows = cache.keys.find(source.keys)
    unknown = np.flatnonzero(rows < 0)
    quarantined = {row["key"] for row in cache.quarantined}
    strange = [source.keys[i] for i in unknown.tolist() if source.keys[i] not in quarantined]
    if strange:
        raise IdentityError(
            f"{len(strange)} of {counted(len(source), 'picture')} of {source.spec!r} "
            "are not in cache "
            f"{str(cache.path)!r} ({manifest.title(cache.manifest)}), the first is {strange[0]!r}; "
            "give the pictures it was made from, or extract these"
        )
    pictures = np.flatnonzero(rows >= 0)
    return pictures, rows[pictures], len(unknown)


def left_out(cache: Cache, rows: I64) -> tuple[int, str]:
    """Count the rows of a cache that none of `rows` (n,), joined with pictures, is: (how many, the
    first one's key, empty where there is none)."""
    lacks = np.ones(len(cache), bool)
    lacks[rows[rows >= 0]] = False
    count = int(lacks.sum())
    return count, cache.keys[int(lacks.argmax())] if count else ""
