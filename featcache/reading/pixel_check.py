"""Rendered views are compared with the hashes of what the teacher saw."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import PIL

from featcache import rng
from featcache.errors import IdentityError
from featcache.reading.cache import Cache
from featcache.reading.join import I64
from featcache.views.fingerprint import pixel_hash, thumbnail

# mean difference of block means, in levels of 255, above which no decoder is the cause
OTHER_PICTURE = 8.0
SAME_PICTURE = 1.0  # and that of another version of a decoder


def sample_views(
    digests: rng.U64, view: npt.ArrayLike, epoch: int | I64, seed: int, share: float
) -> npt.NDArray[np.bool_]:
    """Choose (n,) which views of an epoch, one or one per picture, are compared with their stored
    hash: a pure function of (seed, epoch, key)."""
    words = rng.words(digests, rng.stream("check", seed), 1, view=view, epoch=epoch)
    chosen: npt.NDArray[np.bool_] = rng.uniform(words)[:, 0] < share
    return chosen


def check_pixels(
    cache: Cache,
    row: int,
    view: int,
    pixels: npt.NDArray[np.uint8],
    tolerance: float = 0.0,
    advice: str = "",
    key: str | None = None,
) -> None:
    """Raise IdentityError unless a view (S, S, 3) is what the teacher saw: the stored hash, or with
    a `tolerance` a mean difference of block means up to so many levels of 255. `advice` says what
    the caller's user can do; `key` of the row, where it is known."""
    problem = pixel_problem(cache, row, view, pixels, key)
    if problem is None:
        return
    stored = cache.read([row], view, ("thumbnail",))["thumbnail"][0]
    difference = np.abs(thumbnail(pixels).astype(int) - stored.astype(int)).mean()
    if difference > tolerance or not tolerance:
        raise IdentityError(f"{problem}; {advice or training_advice('tolerance')}")


def training_advice(option: str) -> str:
    """Say what a person who trains can do about other pixels; `option` sets the tolerance."""
    return f"train on the pictures of the extraction, or allow it: {option}"


def pixel_problem(
    cache: Cache, row: int, view: int, pixels: Any, key: str | None = None
) -> str | None:
    """Say what differs between a view rendered at the policy's size and the extracted one; None
    when nothing does."""
    stored = cache.read([row], view, ("pixel_hash", "thumbnail"))
    if pixel_hash(pixels) == int(stored["pixel_hash"][0]):
        return None
    difference = np.abs(thumbnail(pixels).astype(int) - stored["thumbnail"][0].astype(int))
    cause = (
        "another picture under this key"
        if difference.mean() > OTHER_PICTURE
        else _other_path(cache)
    )
    return (
        f"picture {key or cache.keys[row]!r}, view {view}: its pixels are not those the teacher "
        f"saw (block means differ by {difference.mean():.1f} levels of 255, at most "
        f"{difference.max()}); likely {cause}"
    )


def _other_path(cache: Cache) -> str:
    """Say why nearly equal pixels differ. Pillow's decoders change, and since 13 it resizes tall
    crops in another order."""
    theirs, here = cache.manifest["provenance"].get("versions", {}).get("pillow"), PIL.__version__
    if theirs in (None, here) or cache.identity["pixel_path"]["decoder"] != "pillow":
        return "another decoder, library version or file"
    return (
        f"Pillow's version, {theirs} there and {here} here (pip install pillow=={theirs}), "
        "or another file"
    )
