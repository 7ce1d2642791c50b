"""Pictures are read as the bytes that a packed file will hold: their own, or, where they are to be
smaller, encoded again.

JPEG and WebP stay what they are, at quality 95 (lossless WebP stays lossless). All else is written
without loss: in its own format where we have one for it, as PNG where not (GIF has 256 colours, and
AVIF loses). What a file is called does not count, its content does.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

from PIL import Image

from featcache.errors import UserError
from featcache.pictures.decode import ORIENTATION, decode, opened, orientation
from featcache.pictures.folder import FolderSource
from featcache.pictures.source import PictureError, Source

# First bytes -> suffix, for pictures that come without a file name of their own (members of tars).
MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"P5": ".pgm",
    b"P6": ".ppm",
}
# Suffixes of one format: a file keeps its own
_SAME_FORMAT = {".jpeg": ".jpg", ".tiff": ".tif", ".pgm": ".ppm"}
_WITH_EXIF = ("JPEG", "PNG", "WEBP")
LOSSLESS = ("PNG", "BMP", "PPM", "TIFF")  # as Pillow writes them where no compression is asked for


def read_picture(source: Source, resize_px: int | None, row: int) -> tuple[str, bytes]:
    """Return suffix and bytes of one picture as they are packed. Raises UserError where it should
    become smaller and cannot be decoded, or is too large to be read."""
    try:
        data = source.read(row)
        packed = data if resize_px is None else resized(data, resize_px)
    except PictureError as error:
        raise UserError(
            f"{'packing' if resize_px is None else 'resizing'} {source.keys[row]!r} of "
            f"{source.spec}: {error}; every picture must decode: repair it, take it out, or pack "
            "without --resize (extraction lists what it cannot read)"
        ) from error
    return _suffix(source, row, packed, is_new=packed is not data), packed


def _suffix(source: Source, row: int, data: bytes, is_new: bool) -> str:
    """The suffix of the file, unless the picture was encoded anew in another format; without a file
    that of the content."""
    found = _sniff(data)
    if not isinstance(source, FolderSource):
        return found
    own = Path(source.files[row]).suffix.lower()
    same = _SAME_FORMAT.get(own, own) == _SAME_FORMAT.get(found, found)
    return found if is_new and not same else own


def _sniff(data: bytes) -> str:
    """The suffix of the format that the first bytes show; unknown ones stay a picture (.jpg), for
    extraction to report."""
    return next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), ".jpg")


def resized(data: bytes, shorter_px: int) -> bytes:
    """Return the picture with its shorter side at `shorter_px`; the same bytes where it is no
    larger. Raises PictureError.

    Pixels go through the one decoder (no EXIF transpose, named conversions to RGB); grey stays
    grey, and an EXIF orientation stays stated.
    """
    picture = decode(data)
    width, height = picture.size
    scale = shorter_px / min(width, height)
    if scale >= 1:
        return data
    with opened(data) as original:
        kind, grey = original.format or "", original.mode == "L"
    size = (max(shorter_px, round(width * scale)), max(shorter_px, round(height * scale)))
    small = (picture.convert("L") if grey else picture).resize(size, Image.Resampling.BICUBIC)
    small.info = {}  # a TIFF would be compressed as it was, with loss
    file = io.BytesIO()
    try:
        name, options = _format(kind, data)
        if name in _WITH_EXIF and (turn := orientation(picture)) != 1:
            options["exif"] = Image.Exif()
            options["exif"][ORIENTATION] = turn
        small.save(file, name, **options)
    except (KeyError, OSError, ValueError) as error:
        raise PictureError(f"its format {kind} cannot be written") from error
    return file.getvalue()


def _format(kind: str, data: bytes) -> tuple[str, dict[str, Any]]:
    """The format, and its options, that a picture of a format is written in."""
    # MPO: a camera's JPEG with a second picture behind it
    if kind in ("JPEG", "MPO"):
        return "JPEG", {"quality": 95}
    if kind == "WEBP":
        return kind, {"lossless": True} if _is_lossless_webp(data) else {"quality": 95}
    return (kind if kind in LOSSLESS else "PNG"), {}


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first frame is coded without loss: its chunk is VP8L, not VP8."""
    at = 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name in (b"VP8 ", b"VP8L"):
            return bool(name == b"VP8L")
        at += 8 + (16 if name == b"ANMF" else size + size % 2)  # a frame holds chunks of its own
    return False
