"""Pictures and rows are joined by key, never by position, and the views of two caches are compared.

n training pictures, m pictures of a source, S pixels of a view at the policy's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.errors import IdentityError, UserError
from featcache.pictures.source import ALLOWED, Source
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.views import pixel_path

I64 = npt.NDArray[np.int64]
VIEW_FIELDS = ("crop", "flip", "jitter", "source_size")  # what makes a view of a picture
_PAIR_ROWS = 1 << 16  # compared at a time: a few MB


@dataclass(frozen=True)
class StoredPixels:
    """A cache that stores its views' pixels serves as a source: it has keys, and nothing is left to
    decode."""

    cache: Cache
    labels: None = None
    classes: None = None

    @property
    def spec(self) -> str:
        return str(self.cache.path)

    @property
    def keys(self) -> Sequence[str]:
        return self.cache.keys

    def __len__(self) -> int:
        return len(self.cache)

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
        every = np.arange(len(cache), dtype=np.int64)
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
            f"{len(strange)} of {len(source)} pictures of {source.spec!r} are not in cache "
            f"{str(cache.path)!r} ({manifest.title(cache.manifest)}), the first is {strange[0]!r}; "
            "give the pictures it was made from, or extract these"
        )
    pictures = np.flatnonzero(rows >= 0)
    return pictures, rows[pictures], len(unknown)


def pair(here: Cache, there: Cache) -> tuple[I64, I64]:
    """Match the rows of two caches by key: (rows of one (n,), rows of the other (n,)) of the
    pictures that both hold, in the order of the first.

    For caches that were extracted apart, of two teachers or at two times: view v of one is then
    view v of the other. Every stored box of the views that both have is compared; one that differs
    is an IdentityError that names it.
    """
    theirs = there.keys.find(here.keys)
    ours = np.flatnonzero(theirs >= 0)
    theirs = theirs[ours]
    if not len(ours):
        raise IdentityError(
            f"caches {str(here.path)!r} and {str(there.path)!r} have no picture in common; see "
            "their keys"
        )
    for low in range(0, len(ours), _PAIR_ROWS):
        a, b = ours[low : low + _PAIR_ROWS], theirs[low : low + _PAIR_ROWS]
        for view in range(min(here.views, there.views)):
            _check_same_views(here, there, a, b, view)
    return ours, theirs


def _check_same_views(here: Cache, there: Cache, ours: I64, theirs: I64, view: int) -> None:
    one, other = here.read(ours, view, VIEW_FIELDS), there.read(theirs, view, VIEW_FIELDS)
    for name in VIEW_FIELDS:
        differs = (one[name] != other[name]).reshape(len(ours), -1).any(1)
        for i in np.flatnonzero(differs)[:1].tolist():
            raise IdentityError(
                f"picture {here.keys[ours[i]]!r}, view {view}: {name} is {one[name][i].tolist()} "
                f"in {str(here.path)!r}, {other[name][i].tolist()} in {str(there.path)!r}; caches "
                "are joined where both show the same crops: extract with the same policy and "
                "--seed, from the same pictures"
            )
