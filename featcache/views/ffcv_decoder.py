"""FFCV's own decode is a second pixel path, with a crop decoder that replays stored boxes instead
of drawing them.

Two functions, compiled by FFCV's compiler from FFCV's own primitives; neither holds the GIL, so
threads decode a batch side by side:

    decode     libturbojpeg's fast DCT into RGB; pictures stored as pixels are copied
    replay     OpenCV's INTER_AREA from the stored box to S x S, then the mirror when flip

Where a policy jitters colours, Pillow does so to the whole picture between the two, as on the other
path.

The pixels are not those of Pillow (another inverse DCT, another filter), so the path is part of a
cache's identity: extract and train go through it alike. H x W picture, S pixels of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import IdentityError
from featcache.pictures.beton import JPG, RAW, BetonSource, import_ffcv
from featcache.pictures.decode import MOST_PX, size_of
from featcache.pictures.passed_over import PassedOver, passed_over
from featcache.pictures.source import PictureError
from featcache.runtime.meter import meter
from featcache.views.policy import AREA
from featcache.views.render import apply_jitter

U8 = npt.NDArray[np.uint8]
_UNDECODED = "libturbojpeg cannot decode it, or only a part of it"
PIXEL_PATH = {
    "decoder": "ffcv",
    "dct": "fast",
    "resize": "opencv-area",
    "order": "jitter,crop,resize,flip",
}


@cache
def compiled_functions() -> tuple[Callable[..., int], Callable[..., None]]:
    """Compile decode(data, height, width, is_raw, out) -> status, and replay(pixels, top, left,
    height, width, flip, out)."""
    compile_ = import_ffcv("pipeline.compiler").Compiler.compile
    library = import_ffcv("libffcv")
    imdecode, resize_crop, memcpy = (
        compile_(f) for f in (library.imdecode, library.resize_crop, library.memcpy)
    )

    def decode(data, height, width, is_raw, out):  # type: ignore[no-untyped-def]  # numba infers the types
        if is_raw:
            memcpy(data, out)
            return 0
        return imdecode(data, out, height, width, height, width, 0, 0, 1, 1, False, False)

    def replay(pixels, top, left, height, width, flip, out):  # type: ignore[no-untyped-def]
        resize_crop(pixels, top, top + height, left, left + width, out)
        if flip:
            size = out.shape[1]
            for y in range(out.shape[0]):
                for x in range(size // 2):
                    for c in range(3):
                        kept = out[y, x, c]
                        out[y, x, c] = out[y, size - 1 - x, c]
                        out[y, size - 1 - x, c] = kept

    return compile_(decode), compile_(replay)


def _check_size(data: bytes, height: int, width: int) -> None:
    """Raise PictureError where a JPEG has another size than its row says: libturbojpeg would scale
    it, and lay it out for another width."""
    try:
        found = jpeg_size(data) or size_of(data)
    except PictureError as error:
        raise PictureError(_UNDECODED) from error
    if found != (height, width):
        raise PictureError(
            f"its row says {height} x {width} pixels, its JPEG has {found[0]} x {found[1]}"
        )
    if height * width > MOST_PX:
        raise PictureError(f"{height} x {width} pixels: a picture has at most {MOST_PX}")


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return height and width that the frame header of a JPEG states; None where there is none.

    >>> jpeg_size(bytes.fromhex("ffd8 ffe0 0004 0000 ffc0 0011 08 0014 001e 03"))
    (20, 30)
    """
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # fill bytes
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        else:
            at += 2 + length
    return None


@dataclass(frozen=True)
class FfcvPicture:
    """Holds a picture that FFCV decoded, and replays its views."""

    key: str
    pixels: U8  # (H, W, 3)

    @property
    def height(self) -> int:
        return len(self.pixels)

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    def replay(
        self, crop: Sequence[int], flip: int, jitter: Sequence[float], size: int, filter: str
    ) -> U8:
        """Replay one stored view at any size: (S, S, 3)."""
        assert filter == AREA, filter
        top, left, height, width = (int(x) for x in crop)
        # OpenCV would end the process at a box that is not inside.
        if (
            min(top, left) < 0
            or min(height, width) < 1
            or top + height > self.height
            or left + width > self.width
        ):
            raise IdentityError(
                f"picture {self.key!r} has {self.height} x {self.width} pixels, a stored crop is "
                f"{height} x {width} at {top}, {left}: another picture under this key; give the "
                "pictures of the extraction"
            )
        out = np.empty((size, size, 3), np.uint8)
        pixels = self.pixels
        if any(factor != 1 for factor in jitter[:3]):
            pixels = np.array(apply_jitter(Image.fromarray(pixels), jitter))
        compiled_functions()[1](pixels, top, left, height, width, bool(flip), out)
        return out


@dataclass(frozen=True)
class FfcvSource:
    """Decodes the pictures of a `.beton` by FFCV; all else, its bytes too, is the file's."""

    beton: BetonSource
    pixel_path: ClassVar[dict[str, Any]] = PIXEL_PATH

    def __post_init__(self) -> None:
        """Compile in the opener's thread, before threads ask for pictures."""
        decode, replay = compiled_functions()
        pixels = np.zeros((2, 2, 3), np.uint8)
        decode(np.zeros(12, np.uint8), 2, 2, True, pixels)
        replay(pixels, 0, 0, 2, 2, True, np.empty_like(pixels))

    @property
    def spec(self) -> str:
        return self.beton.spec

    @property
    def keys(self) -> Sequence[str]:
        return self.beton.keys

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self.beton.labels

    @property
    def classes(self) -> list[str] | None:
        return self.beton.classes

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        return passed_over(self.beton)

    def __len__(self) -> int:
        return len(self.beton)

    def read(self, index: int) -> bytes:
        return self.beton.read(index)

    def picture_size(self, index: int) -> tuple[int, int]:
        """Return height and width, as the file's table has them."""
        height, width = self.beton.sizes[index].tolist()
        return height, width

    def picture(self, index: int) -> FfcvPicture:
        """Decode a picture. Raises PictureError where libturbojpeg cannot decode it, or only in
        part."""
        height, width = self.beton.sizes[index].tolist()
        stored = self.beton.stored(index)
        meter.count("picture_bytes", len(stored))
        if self.beton.modes[index] == JPG:
            _check_size(stored, height, width)
        # numba compiles once, for writable bytes
        data = np.frombuffer(bytearray(stored), np.uint8)
        pixels = np.empty((height, width, 3), np.uint8)
        if compiled_functions()[0](
            data, height, width, bool(self.beton.modes[index] == RAW), pixels
        ):
            raise PictureError(_UNDECODED)
        return FfcvPicture(self.keys[index], pixels)
