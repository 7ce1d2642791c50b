"""The pixel path of a source, from bytes to a view, is named: it is part of a cache's identity."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from featcache.errors import IdentityError, UsageError
from featcache.pictures.decode import decode, orientation, size_of
from featcache.pictures.open_source import is_beton, open_source
from featcache.pictures.source import Source
from featcache.runtime.meter import meter
from featcache.views.policy import AREA

DECODERS = ("pillow", "ffcv")
# Part of every cache's identity: change what a conversion does and this name must change with it.
PIXEL_PATH = {
    "decoder": "pillow",
    "draft": False,
    "exif_transpose": False,
    "to_rgb": "rgb-1",
    "order": "jitter,crop,resize,flip",
}


def pixel_path(source: Source) -> dict[str, Any]:
    """Return the pixel path of a source's views."""
    return dict(getattr(source, "pixel_path", PIXEL_PATH))


def decode_picture(source: Source, index: int) -> Any:
    """Decode a picture by the source's pixel path. Raises PictureError with the decoder's own
    reason."""
    own = getattr(source, "picture", None)
    if own is not None:
        return own(index)
    data = source.read(index)
    meter.count("picture_bytes", len(data))
    return decode(data)


def read_picture(source: Source, index: int) -> tuple[Any, bytes]:
    """Decode a picture as `decode_picture` does; return the bytes of its file as well, which are
    read once where the source decodes bytes."""
    of_bytes = getattr(source, "decode_bytes", None)
    if of_bytes is None and hasattr(source, "picture"):
        return source.picture(index), source.read(index)
    data = source.read(index)
    meter.count("picture_bytes", len(data))
    return (of_bytes or decode)(data), data


def picture_size(source: Source, index: int) -> tuple[int, int]:
    """Return height and width of a picture as it will be decoded, from its header. Raises
    PictureError where it has none."""
    own = getattr(source, "picture_size", None)
    return size_of(source.read(index)) if own is None else own(index)


def open_with_decoder(
    spec: str | os.PathLike[str], decoder: str = "pillow", *, exif: bool = False
) -> Source:
    """Open the pictures at `spec` through a decoder, turned by their EXIF orientation with `exif`.
    Raises UsageError where it decodes no such pictures, else as `open_source` does."""
    if exif and decoder != "pillow":
        raise UsageError(
            f"--exif turns pictures that Pillow decodes, and --decoder {decoder} is given; leave "
            "one of them out"
        )
    if decoder != "pillow" and not is_beton(os.fspath(spec)):
        raise UsageError(
            f"--decoder {decoder} decodes what FFCV wrote, a .beton; pictures {os.fspath(spec)!r} "
            "go through --decoder pillow: leave --decoder out, or pack them with "
            "`featcache pack SRC OUT.beton`"
        )
    return with_exif(with_decoder(open_source(spec), decoder), exif)


def with_decoder(source: Source, decoder: str) -> Source:
    """Return the same pictures through a decoder that can decode them, else through the one they
    have."""
    from featcache.pictures import beton
    from featcache.views import ffcv_decoder

    if decoder == "ffcv" and isinstance(source, beton.BetonSource):
        return ffcv_decoder.FfcvSource(source)
    return (
        source.beton
        if decoder == "pillow" and isinstance(source, ffcv_decoder.FfcvSource)
        else source
    )


def with_exif(source: Source, turns: bool) -> Source:
    """Return the same pictures turned by their EXIF orientation, or not, where Pillow decodes
    them."""
    from featcache.views.exif_source import ExifSource

    source = source.source if isinstance(source, ExifSource) else source
    if turns and pixel_path(source) == PIXEL_PATH:
        return ExifSource(source, {**PIXEL_PATH, "exif_transpose": True})
    return source


def match_decoder(source: Source, path: Mapping[str, Any]) -> Source:
    """Return the same pictures through the pixel path of a cache, where they can go through it."""
    plain = with_decoder(with_exif(source, False), path["decoder"])
    return with_exif(plain, path.get("exif_transpose") is True)


def options(path: Mapping[str, Any]) -> list[str]:
    """Return the options of `featcache extract` that a pixel path takes.

    >>> options(PIXEL_PATH), options({**PIXEL_PATH, "exif_transpose": True})
    ([], ['--exif'])
    """
    decoder = path.get("decoder", "pillow")
    words = [] if decoder == "pillow" else ["--decoder", str(decoder)]
    return [*words, *(["--exif"] if path.get("exif_transpose") is True else [])]


def ignores_orientation(source: Source, picture: Any) -> bool:
    """Return whether a decoded picture has an EXIF orientation that its pixel path ignores."""
    if not isinstance(picture, Image.Image):
        return False
    return pixel_path(source).get("exif_transpose") is False and orientation(picture) != 1


def check_pixel_path(source: Source, path: Mapping[str, Any], what: str) -> None:
    """Raise IdentityError unless pictures go through the pixel path of `what`."""
    here = pixel_path(source)
    if differing := [name for name in {**path, **here} if path.get(name) != here.get(name)]:
        listed = ", ".join(
            f"{name} is {path.get(name)!r} there, {here.get(name)!r} here" for name in differing[:2]
        )
        raise IdentityError(
            f"{what} has views of another pixel path than {source.spec!r} gives: {listed}; extract "
            f"and train through the same one ({_option_text(path)}, on the pictures of the "
            "extraction), or extract again"
        )


def _option_text(path: Mapping[str, Any]) -> str:
    return " ".join(options(path)) or "--decoder pillow"


def check_filter(path: dict[str, Any], filter: str) -> None:
    """Raise UsageError unless views are resized by a filter of their pixel path."""
    compiled = path["decoder"] == "ffcv"
    if compiled != (filter == AREA):
        allowed = AREA if compiled else "bicubic, bilinear or lanczos"
        raise UsageError(
            f"filter {filter}: --decoder {path['decoder']} resizes by {allowed}; give another "
            "--filter"
        )
