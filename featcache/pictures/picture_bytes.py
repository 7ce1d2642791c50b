"""Pictures are read as the bytes that a packed file will hold: their own, or, where they are to be
smaller, encoded again in their own format."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from featcache.errors import UserError
from featcache.pictures.decode import decode
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
# every other format that we write is lossless
QUALITY = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}}


def read_picture(source: Source, resize_px: int | None, row: int) -> tuple[str, bytes]:
    """Return suffix and bytes of one picture as they are packed. Raises UserError where it should
    become smaller and cannot be decoded."""
    data = source.read(row)
    suffix = (
        Path(source.files[row]).suffix.lower() if isinstance(source, FolderSource) else _sniff(data)
    )
    if resize_px is None:
        return suffix, data
    try:
        return suffix, resized(data, resize_px)
    except PictureError as error:
        raise UserError(
            f"resizing {source.keys[row]!r} of {source.spec}: {error}; every picture must decode: "
            "repair it, take it out, or pack without --resize (extraction lists what it cannot "
            "read)"
        ) from error


def _sniff(data: bytes) -> str:
    """The suffix of the format that the first bytes show; unknown ones stay a picture (.jpg), for
    extraction to report."""
    return next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), ".jpg")


def resized(data: bytes, shorter_px: int) -> bytes:
    """Return the picture with its shorter side at `shorter_px`, in its own format; the same bytes
    where it is no larger.

    Pixels go through the one decoder (no EXIF transpose, named conversions to RGB); grey stays
    grey.
    """
    picture = decode(data)
    width, height = picture.size
    scale = shorter_px / min(width, height)
    if scale >= 1:
        return data
    with Image.open(io.BytesIO(data)) as original:
        kind, grey = original.format or "PNG", original.mode == "L"
    size = (max(shorter_px, round(width * scale)), max(shorter_px, round(height * scale)))
    small = (picture.convert("L") if grey else picture).resize(size, Image.Resampling.BICUBIC)
    # MPO: a camera's JPEG with a second picture behind it
    return _encoded(small, "JPEG" if kind == "MPO" else kind)


def _encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    try:
        picture.save(file, kind, **QUALITY.get(kind, {}))
    except (KeyError, OSError) as error:
        raise PictureError(f"its format {kind} cannot be written") from error
    return file.getvalue()
