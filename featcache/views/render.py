"""A drawn view of a picture is rendered: jitter, crop, resize, flip."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from featcache.errors import IdentityError
from featcache.pictures.source import PictureError

MOST_CENTRE_PX = 1 << 26  # of a picture that a centre crop is cut from: 268 MB

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# jitter's fourth number counts these
JITTER_ORDERS = list(permutations(("brightness", "contrast", "saturation")))


class ReplayablePicture(Protocol):
    """A decoded picture replays views itself where its pixel path does so; arguments are those of
    `render`."""

    def replay(
        self, crop: Sequence[int], flip: int, jitter: Sequence[float], size: int, filter: str
    ) -> npt.NDArray[np.uint8]: ...


def render(
    picture: Image.Image | ReplayablePicture,
    crop: Sequence[int],
    flip: int,
    jitter: Sequence[float],
    size: int,
    filter: str,
) -> npt.NDArray[np.uint8]:
    """Replay one stored view of an RGB picture at any size: (size, size, 3) uint8."""
    if not isinstance(picture, Image.Image):
        return picture.replay(crop, flip, jitter, size, filter)
    from featcache.views import resample  # machine code, which most commands do without

    top, left, height, width = (int(x) for x in crop)
    if top + height > picture.height or left + width > picture.width or min(top, left) < 0:
        raise IdentityError(
            f"a picture has {picture.height} x {picture.width} pixels, its stored crop is {height} "
            f"x {width} at {top}, {left}: another picture under this key; give the pictures of the "
            "extraction"
        )
    picture = apply_jitter(picture, jitter)
    box = (left, top, left + width, top + height)
    return resample.resize(picture.crop(box), size, FILTERS[filter], bool(flip))


def jitter_factors(jitter: Sequence[float]) -> dict[str, float]:
    """Return the three factors by name, in the order in which they are applied.

    >>> jitter_factors([0.8, 1.0, 1.25, 0])
    {'brightness': 0.8, 'contrast': 1.0, 'saturation': 1.25}
    """
    factors = (float(x) for x in jitter[:3])
    named = dict(zip(("brightness", "contrast", "saturation"), factors, strict=True))
    return {name: named[name] for name in JITTER_ORDERS[int(jitter[3])]}


def apply_jitter(picture: Image.Image, jitter: Sequence[float]) -> Image.Image:
    """Change the whole picture's brightness, contrast (about its mean grey) and saturation, in the
    stored order."""
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    for name, factor in jitter_factors(jitter).items():
        if factor != 1.0:
            picture = enhance[name](picture).enhance(factor)
    return picture


def render_centre(
    picture: Image.Image, size: int, crop_pct: float, filter: str
) -> npt.NDArray[np.uint8]:
    """Render the evaluation view: shorter side to round(size / crop_pct), then the central size x
    size; uint8 HWC.

    Sides and offsets are rounded as in torchvision's Resize and CenterCrop. Raises PictureError for
    one so long that it would be enlarged to gigabytes.
    """
    short = round(size / crop_pct)
    width, height = picture.size
    long = short * max(width, height) // min(width, height)
    if short * long > max(MOST_CENTRE_PX, width * height):
        raise PictureError(
            f"{width} x {height} pixels: its centre crop would be cut from {short * long} pixels, "
            f"{MOST_CENTRE_PX} at most are allowed"
        )
    picture = picture.resize((short, long) if width <= height else (long, short), FILTERS[filter])
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))
