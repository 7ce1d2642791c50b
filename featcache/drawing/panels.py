"""The pictures of one view: itself, attention, visible patches, and the colours of every level.

S pixels a side, P = g * g patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.drawing import pca, pictures
from featcache.drawing.pictures import Pixels
from featcache.drawing.stored_view import StoredView
from featcache.drawing.view_pixels import THUMBNAIL, ViewPixels

VISIBLE = (0.1, 0.25, 0.5)  # shares of the patches
# neighbouring numbers get hues far apart: the golden ratio of a turn each
_TURN = 0.6180339887498949


class Panel(NamedTuple):
    """One picture of a view: `name` is fit for a file, `title` is what is seen."""

    name: str
    title: str
    pixels: Pixels


def view_panel(shown: ViewPixels) -> Panel:
    """Return the view itself."""
    title = "block means of the view" if shown.origin == THUMBNAIL else "view"
    return Panel("view", title, shown.pixels)


def target_panels(
    pixels: Pixels, stored: StoredView, bases: Mapping[int, pca.Basis], *, masks: bool = True
) -> Iterator[Panel]:
    """Yield what one teacher says of a view (S, S, 3); `masks`: with its visible patches."""
    if stored.attention is not None:
        yield Panel("attention", "attention", _attention(pixels, stored.attention))
    if masks and stored.order is not None:
        yield from _masks(pixels, stored.order)
    for level, tokens in stored.levels.items():
        if level in bases:
            yield Panel(
                f"level{level}", f"level {level}", _level(tokens[1:], bases[level], len(pixels))
            )
    if stored.token_ids is not None:
        yield Panel("ids", "token ids", _ids(stored.token_ids, len(pixels)))


def visible(order: npt.NDArray[np.integer], share: float) -> npt.NDArray[np.bool_]:
    """Return the patches (g, g) that a student sees of a share: the first of the mask order, at
    least one."""
    side = pictures.grid_side(len(order))
    seen = np.zeros(len(order), bool)
    seen[order[: max(1, int(len(order) * share))]] = True
    return seen.reshape(side, side)


def _attention(pixels: Pixels, attention: npt.NDArray[np.float32]) -> Pixels:
    side = pictures.grid_side(len(attention))
    grid = attention.reshape(side, side)
    return pictures.contour(pictures.attention_map(pixels, grid), grid)


def _masks(pixels: Pixels, order: npt.NDArray[np.int64]) -> Iterator[Panel]:
    for share in VISIBLE:
        title = f"{100 * share:.0f} % visible"
        yield Panel(f"seen{share:.0%}"[:-1], title, pictures.masked(pixels, visible(order, share)))


def _level(patches: npt.NDArray[np.float32], basis: pca.Basis, size: int) -> Pixels:
    side = pictures.grid_side(len(patches))
    known = np.isfinite(patches).all(-1).reshape(side, side)
    return pictures.patches(pca.rgb(patches, basis), size, known)


def _ids(ids: npt.NDArray[np.int64], size: int) -> Pixels:
    """Return a colour for every number: the same in all pictures."""
    side = pictures.grid_side(len(ids))
    hue = 2 * np.pi * (ids * _TURN % 1)[:, None] + np.array([0, 2, 4]) * np.pi / 3
    colours = np.round(127.5 + 100 * np.cos(hue)).astype(np.uint8)
    return pictures.patches(colours.reshape(side, side, 3), size)
