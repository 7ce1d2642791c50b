"""A crop is resized as Pillow does it, to the bit, in a third of the time.

Resizing is half of what making a view of a JPEG costs. Pillow's arithmetic is whole numbers, so
compiled for the processor at hand (numba) it runs in vector registers: sums over a filter's taps,
for a whole line of pixels at a time. The horizontal pass is the vertical one of the picture turned
about its diagonal:

    pixels (H, W) --turn--> (W, H) --pass--> (S, H) --turn--> (H, S) --pass--> (S, S)

Each pass rounds to 8 bits, so their order shows in the last bits, and it is Pillow's choice: to
version 12 horizontal first; 13 does the vertical one first where it takes away more than twice as
many lines as the other (Pillow's pull request 9549). What the installed Pillow does is found by
trying. Where it does neither, Pillow itself resizes: the pixels are always its own.

H x W crop, S pixels of a view, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.runtime.jit import compiled

U8 = npt.NDArray[np.uint8]
Order = Callable[[int, int, int], bool]  # (H, W, S) -> whether the vertical pass comes first

SUPPORT = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2, Image.Resampling.LANCZOS: 3}
PASS_ORDERS: dict[str, Order] = {
    "horizontal first": lambda height, width, size: False,
    "much the taller side first": lambda height, width, size: (
        height > size and height - size > 2 * (width - size)
    ),
}
_SHAPES = (
    (64, 24, 16),
    (64, 39, 16),
    (64, 40, 16),
    (64, 60, 16),
    (24, 64, 16),
    (20, 8, 16),
    (12, 8, 16),
)
_MAX_ASPECT = 100  # times the width: beyond, Pillow 12.2 has an order of its own
_BITS = 22  # of a weight's fraction: 32 less 8 of a pixel less 2 for sums outside 0 to 1
_HALF = np.int32(1 << (_BITS - 1))
# pixels of an edge that are turned at a time, so that both sides stay in the first cache
_TILE = 32


@compiled
def _sinc(x):  # type: ignore[no-untyped-def]  # numba infers the types
    return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)


@compiled
def _weight(x, support):  # type: ignore[no-untyped-def]
    x = abs(x)
    if x >= support:
        return 0.0
    if support == 1:
        return 1.0 - x
    if support == 3:
        return _sinc(x) * _sinc(x / 3)
    a = -0.5
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1 if x < 1.0 else (((x - 5) * x + 8) * x - 4) * a


@compiled
def _taps(length, size, support):  # type: ignore[no-untyped-def]
    """Return first row (S,), number of rows (S,) and int32 weights (S, K) of each of S rows made of
    `length`."""
    scale = length / size
    wide = max(scale, 1.0)
    reach = support * wide
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, math.ceil(reach) * 2 + 1), np.int32)
    exact = np.empty(weights.shape[1], np.float64)
    for i in range(size):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), length)
        total = 0.0
        for k in range(high - low):
            exact[k] = _weight((k + low - centre + 0.5) * (1.0 / wide), support)
            total += exact[k]
        for k in range(high - low):
            share = exact[k] / total if total != 0.0 else exact[k]
            weights[i, k] = int(share * (1 << _BITS) + (-0.5 if share < 0 else 0.5))
        first[i], count[i] = low, high - low
    return first, count, weights


@compiled
def _pass(lines, size, support):  # type: ignore[no-untyped-def]
    """Resize (length, n) to (S, n): every row a weighted sum of neighbouring ones, rounded and
    clipped to 8 bits."""
    first, count, weights = _taps(lines.shape[0], size, support)
    n = lines.shape[1]
    out, sums = np.empty((size, n), np.uint8), np.empty(n, np.int32)
    for i in range(size):
        sums[:] = _HALF
        for k in range(count[i]):
            weight, line = weights[i, k], lines[first[i] + k]
            for j in range(n):
                sums[j] += np.int32(np.int32(line[j]) * weight)
        row = out[i]
        for j in range(n):
            row[j] = min(max(sums[j] >> _BITS, 0), 255)
    return out


@compiled
def _transposed(pixels):  # type: ignore[no-untyped-def]
    """Transpose (H, W, 3) to (W, H, 3), a tile at a time."""
    height, width, _ = pixels.shape
    out = np.empty((width, height, 3), np.uint8)
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            for x in range(left, min(left + _TILE, width)):
                line = out[x]
                for y in range(top, min(top + _TILE, height)):
                    line[y, 0] = pixels[y, x, 0]
                    line[y, 1] = pixels[y, x, 1]
                    line[y, 2] = pixels[y, x, 2]
    return out


@compiled
def _resized(pixels, size, support, vertical_first, flip):  # type: ignore[no-untyped-def]
    """Resize (H, W, 3) to (S, S, 3), mirrored left-right with `flip`."""
    height, width, _ = pixels.shape
    step = -1 if flip else 1
    if vertical_first:
        short = _pass(pixels.reshape(height, width * 3), size, support).reshape(size, width, 3)
        columns = _pass(_transposed(short).reshape(width, size * 3), size, support).reshape(
            size, size, 3
        )
        return _transposed(columns[::step])
    columns = _pass(_transposed(pixels).reshape(width, height * 3), size, support).reshape(
        size, height, 3
    )
    return _pass(_transposed(columns[::step]).reshape(height, size * 3), size, support).reshape(
        size, size, 3
    )


@cache
def pass_order() -> Order | None:
    """Find the order of the passes that the installed Pillow follows, of those we know; None where
    it follows another."""
    for each in PASS_ORDERS.values():
        if all(_matches_pillow(each, *shape) for shape in _SHAPES):
            return each
    return None


def _matches_pillow(each: Order, height: int, width: int, size: int) -> bool:
    noise = (np.arange(height * width * 3) ** 2 % 251).astype(np.uint8).reshape(height, width, 3)
    filter = Image.Resampling.BICUBIC
    theirs = np.asarray(Image.fromarray(noise).resize((size, size), filter))
    return np.array_equal(
        _resized(noise, size, SUPPORT[filter], each(height, width, size), False), theirs
    )


def resize(picture: Image.Image, size: int, filter: Image.Resampling, flip: bool = False) -> U8:
    """Resize a picture as `picture.resize((size, size), filter)` does, then mirror it with `flip`:
    (S, S, 3) of RGB."""
    width, height = picture.size
    known = pass_order()
    if known is None or picture.mode != "RGB" or height > _MAX_ASPECT * width:
        pixels = np.asarray(picture.resize((size, size), filter))
        return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels
    made: U8 = _resized(
        np.asarray(picture), size, SUPPORT[filter], known(height, width, size), flip
    )
    return made
