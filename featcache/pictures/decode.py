"""A picture's bytes become 8-bit RGB, in one way for every source."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from featcache.pictures.source import PictureError


def decode(data: bytes) -> Image.Image:
    """Decode a picture in full, to 8-bit RGB. Raises PictureError with the decoder's own reason."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return to_rgb(picture)
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder raises on these bytes, the bytes are at fault
        raise PictureError(_reason(error)) from error


def size_of(data: bytes) -> tuple[int, int]:
    """Return height and width of a picture, from its header alone. Raises PictureError as `decode`
    does."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.height, picture.width
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise PictureError(_reason(error)) from error


def _reason(error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    return "not a readable picture" if "cannot identify" in reason else reason


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert by `rgb-1`: grey is repeated, palettes are looked up, alpha is dropped, CMYK is
    multiplied out.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour (Pillow's own conversion would
    clip it to white). Raises PictureError for modes without a fixed range (32-bit float).
    """
    mode = picture.mode
    if mode.startswith("I"):
        grey = np.asarray(picture, np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise PictureError(
                f"integer pixels from {grey.min()} to {grey.max()}: 8 or 16 bit are allowed"
            )
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if mode in {"F", "LAB", "HSV"}:
        raise PictureError(
            f"colour mode {mode} has no fixed range: grey, palette, RGB, RGBA or CMYK are allowed"
        )
    # by way of RGBA: the palette's colours, whatever its transparency is expressed in
    if mode in {"P", "PA"}:
        picture = picture.convert("RGBA")
    return picture if mode == "RGB" else picture.convert("RGB")  # which would copy
