"""Some views of a cache, or of pictures alone, are what the models of a report are shown: the same
pictures and crops for the teacher and for every student.

n views shown, P patches of the teacher's grid, D its width, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from featcache import rng
from featcache.catalog import home
from featcache.errors import UserError, counted, one_line
from featcache.models.weights import is_random
from featcache.pictures.source import PictureError, Source
from featcache.reading import join, pixel_check
from featcache.reading.cache import Cache
from featcache.reading.feature_reader import FeatureReader
from featcache.storage import manifest, picture_lists
from featcache.views import pixel_path
from featcache.views.draw import DrawnViews, draw_views
from featcache.views.policy import Policy, policy_from_dict
from featcache.views.render import render

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
VIEW = 0  # of each picture


@dataclass
class ShownViews:
    """Holds the views that are shown: keys and drawn parameters, and of a cache what its teacher
    says of them. `missing` collects what cannot be shown, and why."""

    keys: list[str]
    policy: Policy
    drawn: DrawnViews
    source: Source | None = None
    indices: list[int] = field(default_factory=list)  # of the pictures in the source
    cache: Cache | None = None
    rows: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def teacher(self) -> str:
        """Return the teacher's name, and that its weights are random; empty where there is none."""
        if self.cache is None:
            return ""
        teacher = self.cache.identity["teacher"]
        random = is_random(str(self.cache.manifest.get("provenance", {}).get("weights", "")))
        return f"{teacher['name']}{' with RANDOM WEIGHTS' if random else ''}"

    @cached_property
    def stored(self) -> dict[str, Any]:
        """Return the arrays (n, ...) of the cache that a report shows: attention, mask_order,
        thumbnail, of those that it has."""
        if self.cache is None:
            return {}
        names = [
            name for name in ("attention", "mask_order", "thumbnail") if name in self.cache.fields
        ]
        return self.cache.read(self.rows, VIEW, names)

    @cached_property
    def teacher_tokens(self) -> F32 | None:
        """Return the teacher's last stored level (n, P, D) in image order without [CLS], NaN where
        a patch is not stored; None without a cache."""
        if self.cache is None:
            return None
        level = self.cache.levels[-1]
        reader = FeatureReader(self.cache, levels=(level,))
        host = self.cache.read(self.rows, VIEW, reader.fields, (level,))
        arrays = reader.to_device(host, torch.device("cpu"))
        tokens: F32 = reader.features(arrays)[:, 0, 1:].numpy()
        return tokens

    def pixels(self, size: int) -> U8 | None:
        """Return the views (n, S, S, 3) at S = `size` pixels a side; None where neither pictures
        nor stored pixels give them."""
        if self.source is not None:
            return np.stack([self._rendered(i, size) for i in range(len(self.keys))])
        if self.cache is None or not join.stores_pixels(self.cache) or size != self.policy.size:
            return None
        pixels: U8 = self.cache.read(self.rows, VIEW, ("pixels",))["pixels"]
        return pixels

    def _rendered(self, i: int, size: int) -> U8:
        drawn = self.drawn
        shape = (drawn.crop[i, 0], int(drawn.flip[i, 0]), drawn.jitter[i, 0])
        return render(self._pictures[i], *shape, size, self.policy.filter)

    @cached_property
    def _pictures(self) -> list[Any]:
        assert self.source is not None
        return [_decode(self.source, index) for index in self.indices]

    def check_pixels(self) -> None:
        """Note where what is rendered is not what the teacher saw."""
        if self.cache is None or self.source is None:
            return
        for i, row in enumerate(self.rows):
            pixels = self._rendered(i, self.policy.size)
            if why := pixel_check.pixel_problem(self.cache, row, VIEW, pixels, self.keys[i]):
                self.missing.append(f"the views as the teacher saw them: {why}")
                return


def _decode(source: Source, index: int) -> Any:
    try:
        return pixel_path.decode_picture(source, index)
    except PictureError as error:
        raise UserError(
            f"picture {source.keys[index]!r} of {source.spec!r} cannot be used: {error}; leave it "
            "out of --images, or give another --seed"
        ) from error


def choose(count: int, of: int, seed: int) -> list[int]:
    """Choose up to `count` numbers below `of`, ascending: the same ones for a seed.

    >>> choose(3, 10, seed=0) == choose(3, 10, seed=0), choose(3, 2, seed=0)
    (True, [0, 1])
    """
    return sorted(rng.permutation(of, seed, 0)[:count].tolist())


def of_cache(cache: Cache, source: Source | None, count: int, seed: int) -> ShownViews:
    """Choose views of a cache; pictures of a source are joined with it by key."""
    if source is None:
        rows, indices = np.arange(len(cache)), np.zeros(0, np.int64)
    else:
        source = pixel_path.match_decoder(source, cache.identity["pixel_path"])
        indices, rows, _ = join.join_by_key(cache, source)
    if not len(rows):
        raise UserError(f"cache {str(cache.path)!r} has no view to show; give another --cache")
    at = choose(count, len(rows), seed)
    chosen: list[int] = rows[at].tolist()
    stored = cache.read(chosen, VIEW, DrawnViews._fields)
    drawn = DrawnViews(*(stored[name][:, None] for name in DrawnViews._fields))
    patches = int(cache.identity["teacher"]["patches"])
    if math.isqrt(patches) ** 2 != patches:
        raise UserError(
            f"cache {str(cache.path)!r}: {counted(patches, 'patch', 'patches')} of a "
            "view are no square grid, and one "
            "is needed to draw them; give another --cache"
        )
    policy = policy_from_dict(cache.identity["policy"])
    keys = [cache.keys[row] for row in chosen]
    own = [] if source is None else indices[at].tolist()
    return ShownViews(keys, policy, drawn, source, own, cache, chosen)


def of_pictures(source: Source, policy: Policy, count: int, seed: int) -> ShownViews:
    """Draw views of pictures by a policy, as a run with the teacher in its loop does."""
    at = choose(count, len(source), seed)
    keys = [source.keys[i] for i in at]
    sizes = np.array([_size(_decode(source, i)) for i in at], np.int64).reshape(-1, 2)
    drawn = draw_views(policy, rng.key_digests(keys), sizes, (VIEW,))
    return ShownViews(keys, policy, drawn, source, at)


def _size(picture: Any) -> tuple[int, int]:
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return int(picture.height), int(picture.width)


def find_cache(ids: Sequence[str]) -> Path | None:
    """Find the cache below $FEATCACHE_HOME that one of the runs was trained on, by its id."""
    for path in home.caches() if any(ids) else ():
        try:
            if set(picture_lists.ids(manifest.read(path)["identity"])) & set(ids):
                return path
        except (UserError, OSError) as error:
            home.note_passed_over(path, one_line(str(error)))
    return None
