"""Pictures of a report have one size on the page, whatever a model was shown."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.drawing import page, pictures

U8 = npt.NDArray[np.uint8]
SIZE_PX = 168  # a side, about: 12 pixels for each of 14 patches


def resized(pixels: U8) -> U8:
    """Return a view (S, S, 3) at about `SIZE_PX`: small ones with larger pixels, large ones by
    averaging."""
    size = len(pixels)
    if size > SIZE_PX:
        return np.asarray(Image.fromarray(pixels).resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX))
    times = -(-SIZE_PX // size) if size < SIZE_PX else 1
    return pixels.repeat(times, 0).repeat(times, 1)


def figure(pixels: U8, caption: str, of: str) -> str:
    """Return a figure with a caption; `of` names the picture for those who cannot see it."""
    return page.figure(pictures.png(pixels), f"{caption}: {of}", caption)


def row(title: str, figures: Iterable[str]) -> str:
    """Return figures beside one another, under the name of the picture."""
    return f"<h3>{page.escape(title)}</h3>\n{page.figures(figures)}"
