"""Targets are drawn on the view they belong to: attention, masks, boxes, and colours of patches.

    patch of a pixel: (row * g // S, column * g // S)        nothing is interpolated

Hatched is whatever is not there: a patch that was not kept, a number that is not finite.

S pixels a side, g patches a side, H and W of a whole picture. All pixels are uint8.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from featcache.errors import counted

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)
Bools = npt.NDArray[np.bool_]

HIDDEN = 209  # grey of a patch that the student does not see
LINE = (255, 255, 255)  # the contour, inside of its patches
CASING = (0, 0, 0)  # and around it, so that it is seen on white as well
# colours of views 0, 1, ...: those of Okabe and Ito, which stay apart for the colour-blind
COLOURS = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)


def png(pixels: Pixels) -> bytes:
    """Return the pixels (H, W, 3) as a PNG file: the same bytes for the same pixels."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "PNG", optimize=True)
    return data.getvalue()


def opened(data: bytes) -> Image.Image:
    """Open a PNG file of ours."""
    return Image.open(io.BytesIO(data), formats=("PNG",))


def grid_side(patches: int) -> int:
    """Return g of P = g * g; a grid that is not square raises ValueError."""
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"{counted(patches, 'patch is', 'patches are')} no square grid")
    return side


def spread(grid: npt.NDArray, size: int) -> npt.NDArray:
    """(g, g, ...) -> (S, S, ...): every pixel takes its patch's value."""
    at = np.arange(size) * len(grid) // size
    return grid[at][:, at]


def attention_map(pixels: Pixels, attention: npt.NDArray[np.floating]) -> Pixels:
    """Return the view (S, S, 3), grey, under a heat map of attention (g, g): black is none, yellow
    this map's largest weight."""
    import matplotlib  # a second to import, and only pictures need it

    weights = np.asarray(attention, np.float64)
    known = np.isfinite(weights)
    heat = np.where(known, weights, 0) / max(float(weights[known].max(initial=0)), 1e-12)
    coloured = matplotlib.colormaps["inferno"](spread(heat, len(pixels)))[..., :3]
    shown = 0.4 * pixels.mean(-1, keepdims=True) + 0.6 * 255 * coloured
    return _hatch(np.clip(np.round(shown), 0, 255).astype(np.uint8), ~known)


def smallest_set(attention: npt.NDArray[np.floating], share: float) -> Bools:
    """Return the smallest set of patches (g, g) that holds `share` of the attention's sum; of equal
    weights the first."""
    weights = np.nan_to_num(np.asarray(attention, np.float64).ravel(), posinf=0, neginf=0)
    order = np.argsort(-weights, kind="stable")
    held = np.cumsum(weights[order])
    # what a sum of rounded numbers lacks is no reason for one patch more
    count = int(np.searchsorted(held, share * held[-1] * (1 - 1e-9))) + 1 if held[-1] > 0 else 0
    chosen = np.zeros(len(weights), bool)
    chosen[order[:count]] = True
    return chosen.reshape(np.shape(attention))


def contour(pixels: Pixels, attention: npt.NDArray[np.floating], share: float = 0.5) -> Pixels:
    """Return the view (S, S, 3) with the outline of the smallest set of patches that holds `share`
    of the attention (g, g): white inside the set, black around it."""
    size = len(pixels)
    inside = spread(smallest_set(attention, share), size)
    width = max(1, size // 112)
    shown = pixels.copy()
    shown[_grown(inside, 1) & ~inside] = CASING
    shown[inside & _grown(~inside, width, outside=True)] = LINE
    return shown


def _grown(area: Bools, width: int, outside: bool = False) -> Bools:
    """Return the area (S, S) and all pixels up to `width` above, below, left or right of it;
    `outside`: so is what lies outside of the picture."""
    padded = np.pad(area, width, constant_values=outside)
    inner, size = slice(width, -width), len(area)
    grown = area.copy()
    for step in range(1, width + 1):
        for start in (width - step, width + step):
            grown |= padded[start : start + size, inner] | padded[inner, start : start + size]
    return grown


def masked(pixels: Pixels, visible: Bools) -> Pixels:
    """Return the view (S, S, 3) with its hidden patches, where `visible` (g, g) is false, in
    grey."""
    seen = spread(np.asarray(visible, bool), len(pixels))
    return np.where(seen[..., None], pixels, np.uint8(HIDDEN))


def patches(colours: Pixels, size: int, present: Bools | None = None) -> Pixels:
    """Return colours of patches (g, g, 3) as a picture of S pixels a side; patches that are not
    `present` (g, g) are hatched."""
    shown = spread(colours, size)
    return shown if present is None else _hatch(shown, ~present)


def hatched(height: int, width: int) -> Pixels:
    """Return diagonal stripes (H, W, 3): what is not there."""
    row, col = np.indices((height, width))
    stripes = np.where((row + col) // max(2, max(height, width) // 56) % 2, 150, 225)
    return np.repeat(stripes[..., None].astype(np.uint8), 3, axis=-1)


def _hatch(pixels: Pixels, missing: Bools) -> Pixels:
    """Return the pixels (S, S, 3), those of missing patches (g, g) hatched."""
    size = len(pixels)
    return np.where(spread(missing, size)[..., None], hatched(size, size), pixels)


def boxes(picture: Pixels, boxes: npt.ArrayLike, labels: Sequence[str]) -> Pixels:
    """Return the picture (H, W, 3) with boxes (n, 4) of top, left, height and width in its pixels:
    frames that lie inside their boxes, in the colours of views, a label in a corner of each."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    draw = ImageDraw.Draw(image)
    line = max(1, round(max(image.size) / 160))
    font = ImageFont.load_default(max(10, round(max(image.size) / 24)))
    frames = [_corners(box) for box in np.asarray(boxes, np.float64).reshape(-1, 4)]
    for i, frame in enumerate(frames):
        draw.rectangle(frame, outline=COLOURS[i % len(COLOURS)], width=line)
    taken: list[tuple[float, float, float, float]] = []
    for i, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        tag = _free_corner(frame, draw.textbbox((0, 0), label, font=font), line, taken)
        colour = COLOURS[i % len(COLOURS)]
        draw.rectangle(tag, fill=colour)
        middle = ((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2)
        draw.text(middle, label, fill=_ink(colour), font=font, anchor="mm")
        taken.append(tag)
    return np.asarray(image)


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever can be read on a colour."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)


def _corners(box: npt.NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a frame, the last pixels included."""
    top, left, height, width = (float(x) for x in box)
    x, y = round(left), round(top)
    return x, y, max(x, round(left + width) - 1), max(y, round(top + height) - 1)


def _free_corner(
    frame: tuple[int, int, int, int],
    text: tuple[float, float, float, float],
    line: int,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Return where a label lies: the first corner of its frame that no label is in, else the
    first."""
    left, top, right, bottom = frame
    wide, high = text[2] - text[0] + 4 * line, text[3] - text[1] + 4 * line
    places = [
        (x, y, x + wide, y + high)
        for x, y in (
            (left, top),
            (right - wide, top),
            (left, bottom - high),
            (right - wide, bottom - high),
        )
    ]
    return next((place for place in places if not any(_meet(place, at) for at in taken)), places[0])


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
