"""Pictures turned as their EXIF orientation says are a pixel path of their own (`--exif`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.pictures.decode import decode, size_of
from featcache.pictures.passed_over import PassedOver, passed_over
from featcache.pictures.source import Source
from featcache.runtime.meter import meter


@dataclass(frozen=True)
class ExifSource:
    """Turns the pictures of a source that Pillow decodes; all else, its bytes too, is the
    source's."""

    source: Source
    pixel_path: dict[str, Any]

    @property
    def spec(self) -> str:
        return self.source.spec

    @property
    def keys(self) -> Sequence[str]:
        return self.source.keys

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self.source.labels

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        return passed_over(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> bytes:
        return self.source.read(index)

    def picture(self, index: int) -> Image.Image:
        """Decode a picture, and turn it. Raises PictureError."""
        data = self.source.read(index)
        meter.count("picture_bytes", len(data))
        return self.decode_bytes(data)

    def decode_bytes(self, data: bytes) -> Image.Image:
        """Decode the bytes of a picture, and turn it. Raises PictureError."""
        return decode(data, exif=True)

    def picture_size(self, index: int) -> tuple[int, int]:
        """Return height and width of a turned picture, from its header. Raises PictureError."""
        return size_of(self.source.read(index), exif=True)
