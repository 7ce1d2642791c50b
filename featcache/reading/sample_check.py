"""A sample of the pictures is compared with a cache before anything is trained on them.

A key tells which row a picture has, and not that it is still the same picture: other pictures under
the same names would train until a check met one. So pictures of every shard, SAMPLE of them at
most, are decoded; their sizes and the pixels of one view of each are compared with what the teacher
saw. Cost: a decode and a render of each, in threads, and a second or two for ImageNet's pictures.

n training pictures, m of a sample.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from featcache import rng
from featcache.errors import IdentityError, UserError
from featcache.pictures.source import PictureError, Source
from featcache.reading import pixel_check
from featcache.reading.cache import Cache
from featcache.reading.join import I64
from featcache.views import pixel_path
from featcache.views.draw import DrawnViews
from featcache.views.policy import policy_from_dict
from featcache.views.render import render

SAMPLE = 256  # pictures, over all processes


@dataclass(frozen=True)
class PictureCheck:
    """Compares training pictures (n,) of a source with the rows (n,) of a cache that they were
    joined with; a row below 0 is stored nowhere, and not looked at."""

    cache: Cache
    source: Source
    pictures: I64 = field(repr=False)  # (n,) indices in the source
    rows: I64 = field(repr=False)  # (n,)
    tolerance: float = 0.0  # mean difference of block means, in levels of 255, that is let pass
    advice: str = ""  # what the caller's user can do
    threads: int = 4
    skip_unusable: bool = False  # pictures that cannot be decoded are no error

    def sample(self, seed: int, most: int = SAMPLE) -> I64:
        """Choose (m,) of the training pictures, at most `most`, spread over the shards: a pure
        function of the seed."""
        starts = self.cache.shard_starts[1:]
        shard = np.where(self.rows < 0, len(starts), np.searchsorted(starts, self.rows, "right"))
        counts = np.bincount(shard, minlength=len(starts))[: len(starts)]
        order, firsts = np.argsort(shard, kind="stable"), np.cumsum(counts) - counts
        words = rng.words(rng.key_digests(["sample"]), rng.stream("sample", seed), 1 + most)
        draw = rng.uniform(words)[0]
        held = np.flatnonzero(counts)
        chosen = held[_spread(len(held), most, draw[-1])]
        each = most // max(len(chosen), 1)
        picked = [
            order[firsts[shard] + _spread(counts[shard], each, draw[i])]
            for i, shard in enumerate(chosen)
        ]
        return np.concatenate([np.zeros(0, np.int64), *picked])

    def shards(self, at: I64) -> int:
        """Count the shards that training pictures `at` (m,) lie in."""
        starts = self.cache.shard_starts[1:]
        return len(np.unique(np.searchsorted(starts, self.rows[at], "right")))

    def check_pixels(self, at: I64, seed: int) -> None:
        """Raise IdentityError unless training pictures `at` (m,) have the stored sizes, and one
        view of each, chosen by the seed, the pixels that the teacher saw."""
        rows, keys = self.rows[at], [self.source.keys[i] for i in self.pictures[at]]
        word = rng.words(rng.key_digests(keys), rng.stream("sample view", seed), 1)
        views = rng.below(word[:, 0], self.cache.views)
        drawn = self.cache.read(rows, views, (*DrawnViews._fields, "source_size"))
        policy = policy_from_dict(self.cache.identity["policy"])

        def check(i: int) -> None:
            try:
                picture = pixel_path.decode_picture(self.source, int(self.pictures[at[i]]))
            except (PictureError, OSError) as error:
                if self.skip_unusable:
                    return
                raise _unusable(keys[i], error) from error
            self._check_size(keys[i], (picture.height, picture.width), drawn["source_size"][i])
            parts = (drawn["crop"][i], drawn["flip"][i], drawn["jitter"][i])
            pixels = render(picture, *parts, policy.size, policy.filter)
            where = (int(rows[i]), int(views[i]), pixels)
            pixel_check.check_pixels(self.cache, *where, self.tolerance, self.advice, key=keys[i])

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(check, range(len(at))))

    def check_sizes(self, at: I64) -> None:
        """Raise IdentityError unless training pictures `at` (m,) have the stored sizes; nothing is
        decoded."""
        at = at[self.rows[at] >= 0]
        stored = self.cache.read(self.rows[at], 0, ("source_size",))["source_size"]

        def check(i: int) -> None:
            index = int(self.pictures[at[i]])
            try:
                size = pixel_path.picture_size(self.source, index)
            except (PictureError, OSError) as error:
                raise _unusable(self.source.keys[index], error) from error
            self._check_size(self.source.keys[index], size, stored[i])

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(check, range(len(at))))

    def _check_size(self, key: str, size: tuple[int, int], stored: I64) -> None:
        """Raise IdentityError for a picture of another size, which its pixels must excuse where the
        user gives a tolerance."""
        if size == tuple(stored.tolist()) or self.tolerance:
            return
        raise IdentityError(
            f"picture {key!r}: it has {size[0]} x {size[1]} pixels, in cache "
            f"{str(self.cache.path)!r} it has {stored[0]} x {stored[1]}; likely another picture "
            f"under this key; {self.advice or pixel_check.training_advice('tolerance')}"
        )


def _spread(count: int, most: int, draw: float) -> I64:
    """Return up to `most` numbers below `count`, evenly spread from an offset in [0, 1).

    >>> _spread(10, 3, 0.5).tolist(), _spread(2, 3, 0.9).tolist()
    ([1, 5, 8], [0, 1])
    """
    if count <= most:
        return np.arange(count)
    return np.floor((np.arange(most) + draw) * count / most).astype(np.int64)


def _unusable(key: str, error: Exception) -> UserError:
    return UserError(f"picture {key!r} cannot be used in training: {error}; fix it, or remove it")
