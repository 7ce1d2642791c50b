"""A view's pixels come from the cache where it stores them, else from the pictures, else there is
only the thumbnail; each is compared with what the teacher saw, and says where it is from.

S pixels a side of a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.drawing.pictures import Pixels, hatched, spread
from featcache.errors import UserError
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError, Source
from featcache.reading.cache import Cache
from featcache.reading.join import stores_pixels
from featcache.reading.pixel_check import pixel_problem
from featcache.views import pixel_path
from featcache.views.policy import policy_from_dict
from featcache.views.render import render

STORED, RENDERED, THUMBNAIL = "stored", "rendered", "thumbnail"
SMALLEST_PX, LARGEST_PX = 224, 448  # of what is drawn: a view that is smaller is enlarged
PICTURE_PX = 512  # the longest side of a source picture that is drawn


@dataclass(frozen=True)
class ViewPixels:
    """Holds a view as it is drawn (S, S, 3), where its pixels are from, and what is wrong with
    them."""

    pixels: Pixels
    origin: str
    problem: str = ""


class Pictures:
    """The source pictures of a cache, found by key; `spec` is None where there are none."""

    def __init__(self, cache: Cache, spec: str | None) -> None:
        self.cache = cache
        self.policy = policy_from_dict(cache.identity["policy"])
        self.source: Source | None = None
        self._at: dict[str, int] = {}
        if spec is not None:
            path = cache.identity["pixel_path"]
            self.source = pixel_path.match_decoder(open_source(spec), path)
            pixel_path.check_pixel_path(self.source, path, f"cache {str(cache.path)!r}")
            self._at = {key: i for i, key in enumerate(self.source.keys)}

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def decode(self, key: str) -> Any:
        """Decode the picture of a key; None where the source has none. Raises UserError for one
        that cannot be decoded."""
        if self.source is None or key not in self._at:
            return None
        try:
            return pixel_path.decode_picture(self.source, self._at[key])
        except (PictureError, OSError) as reason:
            raise UserError(f"picture {key!r} cannot be decoded: {reason}") from reason

    def view(
        self, row: int, view: int, picture: Any, drawn: Mapping[str, npt.NDArray[Any]]
    ) -> ViewPixels:
        """Return the pixels of a view of a row; `picture` is its own, or None. Raises UserError
        where the row is damaged, or the picture is too small for the view's box."""
        if stores_pixels(self.cache):
            pixels = self.cache.read([row], view, ("pixels",))["pixels"][0].copy()
            origin = STORED
        elif picture is not None:
            size, filter = self.policy.size, self.policy.filter
            crop, jitter = drawn["crop"].tolist(), drawn["jitter"].tolist()
            pixels = render(picture, crop, int(drawn["flip"]), jitter, size, filter)
            origin = RENDERED
        else:
            small = self.cache.read([row], view, ("thumbnail",))["thumbnail"][0]
            size = resized_side(self.policy.size)
            return ViewPixels(spread(small, size).copy(), THUMBNAIL)
        problem = pixel_problem(self.cache, row, view, pixels)
        return ViewPixels(resized(pixels), origin, problem or "")

    def empty(self) -> ViewPixels:
        """Return stripes in the place of a view that cannot be read."""
        size = resized_side(self.policy.size)
        return ViewPixels(hatched(size, size), THUMBNAIL)


def resized_side(size: int) -> int:
    """Return the side that a view of `size` pixels is drawn with: a small one a whole number of
    times as large."""
    return min(size, LARGEST_PX) if size >= SMALLEST_PX else size * -(-SMALLEST_PX // size)


def resized(pixels: Pixels) -> Pixels:
    """Return a view (S, S, 3) at the side it is drawn with."""
    size = resized_side(len(pixels))
    if size >= len(pixels):
        return spread(pixels, size)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))


def small_picture(picture: Any, height: int, width: int) -> tuple[Pixels, float]:
    """Return a source picture as it is drawn, and by what its sides were multiplied; of None an
    empty one."""
    scale = PICTURE_PX / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    if not isinstance(picture, Image.Image):
        return hatched(shape[1], shape[0]), scale
    way = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    return np.asarray(picture.resize(shape, way)), scale
