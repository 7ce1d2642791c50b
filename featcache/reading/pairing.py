"""The rows of two caches are matched by key, where both show the same views of the same pictures.

n pictures that both hold, m of them looked at more closely.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import IdentityError
from featcache.reading.cache import Cache
from featcache.reading.join import I64
from featcache.reading.pixel_check import OTHER_PICTURE, SAME_PICTURE
from featcache.reading.sample_check import SAMPLE

VIEW_FIELDS = ("crop", "flip", "jitter", "source_size")  # what makes a view of a picture
_ROWS = 1 << 16  # compared at a time: a few MB


def pair(here: Cache, there: Cache) -> tuple[I64, I64]:
    """Match the rows of two caches by key: (rows of one (n,), rows of the other (n,)) of the
    pictures that both hold, in the order of the first.

    For caches that were extracted apart, of two teachers or at two times: view v of one is then
    view v of the other. Every stored box of the views that both have is compared, and every hash of
    their pixels where both rendered them in the same way; elsewhere thumbnails of at most 256
    pictures are. One that differs is an IdentityError that names it.
    """
    theirs = there.keys.find(here.keys)
    ours = np.flatnonzero(theirs >= 0)
    theirs = theirs[ours]
    if not len(ours):
        raise IdentityError(
            f"caches {str(here.path)!r} and {str(there.path)!r} have no picture in common; see "
            "their keys"
        )
    for low in range(0, len(ours), _ROWS):
        a, b = ours[low : low + _ROWS], theirs[low : low + _ROWS]
        for view in range(min(here.views, there.views)):
            _check_same_views(here, there, a, b, view)
            _check_same_pixels(here, there, a, b, view)
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


def _check_same_pixels(here: Cache, there: Cache, ours: I64, theirs: I64, view: int) -> None:
    """Raise IdentityError where views with the same boxes are of other pictures."""
    alike = _rendering(here) == _rendering(there)
    at = np.arange(len(ours))
    if alike:
        at = np.flatnonzero(np.not_equal(*_read(here, there, ours, theirs, view, "pixel_hash")))
    at = at[:: -(-len(at) // SAMPLE) or 1]
    one, other = _read(here, there, ours[at], theirs[at], view, "thumbnail")
    difference = np.abs(one.astype(int) - other.astype(int))  # (m, 14, 14, 3)
    strange = difference.mean((1, 2, 3)) > (SAME_PICTURE if alike else OTHER_PICTURE)
    for i in np.flatnonzero(strange)[:1].tolist():
        raise IdentityError(
            f"picture {here.keys[ours[at[i]]]!r}, view {view}: its pixels in {str(here.path)!r} "
            f"are not those in {str(there.path)!r} (block means differ by "
            f"{difference[i].mean():.1f} levels of 255, at most {difference[i].max()}); likely "
            "another picture under this key: extract both from the same pictures"
        )


def _rendering(cache: Cache) -> tuple[Any, ...]:
    """Return what a view's pixels depend on beside the picture and the box."""
    policy = cache.identity["policy"]
    return policy["size"], policy["filter"], cache.identity["pixel_path"]


def _read(
    here: Cache, there: Cache, ours: I64, theirs: I64, view: int, name: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return here.read(ours, view, (name,))[name], there.read(theirs, view, (name,))[name]
