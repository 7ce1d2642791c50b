"""Bytes of pictures that are packed: their own, or smaller ones in the same format."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from featcache.pictures.decode import decode
from featcache.pictures.folder import FolderSource
from featcache.pictures.open_source import open_source
from featcache.pictures.picture_bytes import read_picture, resized
from tests.featcache.pictures.test_open_source import write_tar


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


LOSSY_FORMATS = ["GIF", pytest.param("AVIF", marks=pytest.mark.skipif(
    not features.check("avif"), reason="this Pillow has no AVIF"))]  # fmt: skip


@pytest.mark.parametrize("kind", LOSSY_FORMATS)
def test_what_we_cannot_write_without_loss_becomes_png(kind: str) -> None:
    data = encode(40, 20, kind)
    small = Image.open(io.BytesIO(resized(data, 10)))
    expected = decode(data).resize((20, 10), Image.Resampling.BICUBIC)
    assert small.format == "PNG"
    assert np.array_equal(np.asarray(small), np.asarray(expected))


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "PPM", "PNG"])
@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_the_others_lose_nothing(kind: str, compression: str | None) -> None:
    """A TIFF may hold a JPEG, which Pillow would write again."""
    file = io.BytesIO()
    options = {"compression": compression} if compression and kind == "TIFF" else {}
    Image.open(io.BytesIO(encode(40, 20))).save(file, kind, **options)
    small = Image.open(io.BytesIO(resized(file.getvalue(), 10)))
    expected = decode(file.getvalue()).resize((20, 10), Image.Resampling.BICUBIC)
    assert small.format == kind
    assert np.array_equal(np.asarray(small), np.asarray(expected))


@pytest.mark.parametrize("frames", [1, 2])
def test_lossless_webp_stays_lossless(frames: int) -> None:
    picture, file = Image.open(io.BytesIO(encode(40, 20))), io.BytesIO()
    more = {"save_all": True, "append_images": [picture.rotate(180)]} if frames > 1 else {}
    picture.save(file, "WEBP", lossless=True, **more)
    small = Image.open(io.BytesIO(resized(file.getvalue(), 10)))
    expected = decode(file.getvalue()).resize((20, 10), Image.Resampling.BICUBIC)
    assert small.format == "WEBP"
    assert np.array_equal(np.asarray(small), np.asarray(expected))


def test_a_member_is_called_what_it_holds(tmp_path: Path) -> None:
    """Encoded anew under another name than its content's; bytes that are kept keep their name."""
    pictures = {"a.jpg": "GIF", "b.jpeg": "JPEG", "c.png": "JPEG", "d.TIFF": "TIFF", "e.jpg": "PNG"}
    for name, kind in pictures.items():
        (tmp_path / name).write_bytes(encode(40, 20, kind))
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    resized_suffixes = [read_picture(source, 10, row)[0] for row in range(len(source))]
    assert resized_suffixes == [".png", ".jpeg", ".jpg", ".tiff", ".png"]
    for resize_px in (None, 20):
        kept = [read_picture(source, resize_px, row)[0] for row in range(len(source))]
        assert kept == [".jpg", ".jpeg", ".png", ".tiff", ".jpg"]
    tar = open_source(write_tar(tmp_path / "t.tar", {"k.jpg": encode(40, 20, "GIF")}))
    assert read_picture(tar, 10, 0)[0] == ".png"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_smaller_picture_still_states_its_orientation(kind: str) -> None:
    """So that pictures may be turned after packing as before; Pillow turns a TIFF itself."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(encode(40, 20))).save(file, kind, exif=exif)
    small = resized(file.getvalue(), 10)
    assert decode(small, exif=True).size == (10, 20)
    assert decode(small).size == ((10, 20) if kind == "TIFF" else (20, 10))
