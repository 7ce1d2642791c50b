"""Bytes of pictures that are packed: their own, or smaller ones in the same format."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from featcache.pictures.picture_bytes import resized


def encode(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture whose pixels depend on its size."""
    ramp = (
        (np.arange(width * height * 4, dtype=np.int64) * 7919 % 251)
        .astype(np.uint8)
        .reshape(height, width, 4)
    )
    file = io.BytesIO()
    Image.fromarray(ramp).convert("RGB" if mode == "P" else "RGBA").convert(mode).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode", "back"),
    [("PNG", "RGB", "RGB"), ("PNG", "L", "L"), ("PNG", "RGBA", "RGB"), ("PNG", "P", "RGB"),
     ("JPEG", "L", "L"), ("JPEG", "CMYK", "RGB"), ("BMP", "RGB", "RGB"), ("WEBP", "RGB", "RGB")],
)  # fmt: skip
def test_resized_keeps_format_and_ratio(kind: str, mode: str, back: str) -> None:
    small = Image.open(io.BytesIO(resized(encode(40, 20, kind, mode), 10)))
    assert (small.format, small.mode, small.size) == (kind, back, (20, 10))


def test_resized_png_is_the_bicubic_picture() -> None:
    data = encode(31, 20)
    # 31 / 2 rounds to even: 16
    expected = Image.open(io.BytesIO(data)).resize((16, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(resized(data, 10)))), np.asarray(expected)
    )


def test_resize_jpeg_quality_is_95() -> None:
    reference = io.BytesIO()
    Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=95)
    small = Image.open(io.BytesIO(resized(encode(40, 20, "JPEG"), 10)))
    assert small.quantization == Image.open(reference).quantization  # type: ignore[attr-defined]


def test_resize_never_enlarges_and_then_keeps_the_bytes() -> None:
    assert resized(data := encode(40, 20, "JPEG"), 20) == data
    assert resized(data, 64) == data
