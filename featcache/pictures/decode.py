"""A picture's bytes become 8-bit RGB, in one way for every source."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from featcache.errors import one_line
from featcache.pictures.source import PictureError

# Of content, whatever a file is called: those of the suffixes that are listed, and two that are
# often found under them. No other code of Pillow's sees a stranger's bytes, and none that starts a
# program (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
MOST_PX = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # what Pillow refuses to open: decompression bombs
ORIENTATION = 0x0112  # EXIF's tag
# TIFF's tags, and the value that makes 0 white
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
# Where orientation may stand in a picture's `info`
_EXIF_FIELDS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, *, exif: bool = False) -> Image.Image:
    """Decode a picture in full, to 8-bit RGB; of several frames the first. With `exif` it is turned
    as its EXIF orientation says. Raises PictureError with the decoder's own reason."""
    with opened(data) as picture:
        picture.load()
        turn = _TURNS.get(orientation(picture)) if exif else None
        return to_rgb(picture) if turn is None else to_rgb(picture).transpose(turn)


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open a picture of one of FORMATS: its header is read, its pixels are not. Raises PictureError
    for whatever is raised within."""
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as picture:
            yield picture
    except (MemoryError, PictureError):
        raise
    except Exception as error:  # whatever a decoder raises on these bytes, the bytes are at fault
        reason = one_line(str(error))[:300] or type(error).__name__
        raise PictureError(
            "not a readable picture" if "cannot identify" in reason else reason
        ) from error


def size_of(data: bytes, *, exif: bool = False) -> tuple[int, int]:
    """Return height and width of a picture as `decode` gives it, from its header alone. Raises
    PictureError as `decode` does."""
    with opened(data) as picture:
        size = (picture.height, picture.width)
        if not exif or picture.format == "TIFF":
            return size
        if picture.format == "PNG":
            picture.load()  # the block may follow the pixels
        return size[::-1] if orientation(picture) >= 5 else size


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has: AVIF came with 11.3."""
    for name in FORMATS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{name.title()}ImagePlugin".replace("Webp", "WebP"))
    return tuple(name for name in FORMATS if name in Image.OPEN)


def orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation of a decoded picture, 1 to 8; 1 where none can be read. Of a TIFF
    it is 1 once it's loaded: Pillow has applied it, as for ImageFolder."""
    if not any(name in picture.info for name in _EXIF_FIELDS):
        return 1
    try:
        found: Any = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block beside good pixels
        return 1
    return found if type(found) is int and 1 <= found <= 8 else 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert by `rgb-1`: grey is repeated, palettes are looked up, alpha is dropped, CMYK is
    multiplied out.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour (Pillow's own conversion would
    clip it to white). Raises PictureError for modes without a fixed range (32-bit, signed 16-bit).
    """
    mode = picture.mode
    if mode.startswith("I"):
        grey = (np.asarray(picture, np.int64) >> (_grey_bits(picture) - 8)).astype(np.uint8)
        # Pillow turns it about for 8 bits, and leaves it for 16
        if getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        rgb = Image.fromarray(grey).convert("RGB")
        rgb.info = dict(picture.info)
        return rgb
    if mode in {"F", "LAB", "HSV"}:
        raise PictureError(
            f"colour mode {mode} has no fixed range: grey, palette, RGB, RGBA or CMYK are allowed"
        )
    # by way of RGBA: the palette's colours, whatever its transparency is expressed in
    if mode in {"P", "PA"}:
        picture = picture.convert("RGBA")
    return picture if mode == "RGB" else picture.convert("RGB")  # which would copy


def _grey_bits(picture: Image.Image) -> int:
    """The bits of unsigned grey. Raises PictureError where the file fixes no range: whether 200 in
    32 bits is white or black, nobody said."""
    if picture.mode.startswith("I;16"):
        # Pillow leaves 12 bits of a TIFF as numbers up to 4095
        bits: int = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        return bits
    # Pillow scales PPM's to 16 bits; before version 11 it opened 16-bit PNG in this mode too
    if picture.format in {"PNG", "PPM"}:
        return 16
    raise PictureError(
        "integer pixels of 32 bits, or signed ones, have no fixed range: unsigned 8 or 16 bit are "
        "allowed"
    )
