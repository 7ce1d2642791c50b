"""Only formats on the list are decoded, whatever a file is called; and nothing is guessed of a
range that a file does not fix. EXIF orientation is applied where it is asked for."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from featcache.pictures.decode import FORMATS, decode, opened, orientation
from featcache.pictures.source import PictureError
from tests.conftest import waves
from tests.featcache.pictures.test_open_source import encoded

# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF"])
def test_every_format_on_the_list_is_decoded(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    picture = Image.fromarray(np.full((20, 30, 3), [200, 100, 50], np.uint8))
    found = np.asarray(decode(encoded(picture, kind)))
    assert found.shape == (20, 30, 3)
    assert np.abs(found.astype(int) - [200, 100, 50]).max() <= 4
    assert kind in FORMATS


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "SGI", "PDF", "EPS", "ICNS", "JPEG2000"])
def test_no_other_format_is(kind: str) -> None:
    data = encoded(Image.fromarray(waves(32, 32)), kind)
    with pytest.raises(PictureError, match=r"^not a readable picture$"):
        decode(data)


def test_no_program_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript."""

    def start(*args: object, **options: object) -> None:
        raise AssertionError(f"started {args}")

    for name in ("Popen", "run", "call", "check_call"):
        monkeypatch.setattr(subprocess, name, start)
    with pytest.raises(PictureError, match="not a readable picture"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds no pixels."""
    whole = bytearray(encoded(Image.new("L", (1, 1))))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


def test_a_decompression_bomb_is_a_picture_error_with_a_reason() -> None:
    with pytest.raises(PictureError, match="decompression bomb"):
        decode(png_header(20000, 20000))


def test_of_several_frames_the_first_is_the_picture() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (40, 200)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("PNG", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(decode(data)).tolist() == np.full((8, 8, 3), 40).tolist()


# ---------------------------------------------------------------- integer pixels


@pytest.mark.parametrize("top", [1, 255, 65535, 70000])
def test_32_bit_grey_has_no_range(top: int) -> None:
    """8-bit values would become black, and 16-bit ones may be anything."""
    grey = np.linspace(0, top, 12).astype(np.int32).reshape(3, 4)
    with pytest.raises(PictureError, match=r"32 bits.* no fixed range"):
        decode(encoded(Image.fromarray(grey), "tiff"))


def tiff(bits: int, sample_format: int, strip: bytes, width: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF of one row of grey; 0 is black, or white at `photometric` 0."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 134), (277, 1),
            (278, 1), (279, len(strip)), (339, sample_format)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert len(head) == 134
    return head + strip


def test_twelve_bits_keep_their_high_byte() -> None:
    """Two numbers in three bytes: 0x123 and 0xabc."""
    assert np.asarray(decode(tiff(12, 1, b"\x12\x3a\xbc", 2)))[0, :, 0].tolist() == [0x12, 0xAB]


def test_signed_and_unsigned_16_bits_are_told_apart() -> None:
    strip = struct.pack("<HH", 0x1234, 0xABCD)
    assert np.asarray(decode(tiff(16, 1, strip, 2)))[0, :, 0].tolist() == [0x12, 0xAB]
    with pytest.raises(PictureError, match="signed"):
        decode(tiff(16, 2, strip, 2))
    with pytest.raises(PictureError, match="32 bits"):
        decode(tiff(32, 1, struct.pack("<II", 1, 2), 2))


@pytest.mark.parametrize("bits", [8, 16])
def test_where_0_is_white_grey_is_turned_about(bits: int) -> None:
    strip = b"\x12\xab" if bits == 8 else struct.pack("<HH", 0x1234, 0xABCD)
    for photometric, levels in ((1, [0x12, 0xAB]), (0, [0xED, 0x54])):
        found = np.asarray(decode(tiff(bits, 1, strip, 2, photometric)))
        assert found[0, :, 0].tolist() == levels


@pytest.mark.parametrize(("top", "value", "level"), [(65535, 0xAB12, 0xAB), (1000, 500, 128)])
def test_a_pgm_says_its_range(top: int, value: int, level: int) -> None:
    data = b"P5\n1 1\n%d\n" % top + struct.pack(">H", value)
    assert np.asarray(decode(data)).tolist() == [[[level] * 3]]


# ---------------------------------------------------------------- orientation

# What each number says of where the stored raster's first row and column belong, as numpy.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


def turned(number: object, kind: str = "png", pixels: np.ndarray | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    picture = Image.fromarray(waves(20, 30) if pixels is None else pixels)
    return encoded(picture, kind, exif=exif)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_all_orientations_are_applied_where_asked_for_and_read(number: int, kind: str) -> None:
    data = turned(number, kind)
    stored = np.asarray(decode(data))
    assert stored.shape == (20, 30, 3)
    np.testing.assert_array_equal(np.asarray(decode(data, exif=True)), TURNS[number](stored))
    assert orientation(decode(data)) == number


@pytest.mark.parametrize("number", range(1, 9))
def test_pillow_applies_a_tiffs_own_which_is_not_applied_twice(number: int) -> None:
    pixels = waves(20, 30)
    for exif in (False, True):
        picture = decode(turned(number, "tiff"), exif=exif)
        np.testing.assert_array_equal(np.asarray(picture), TURNS[number](pixels))
        assert orientation(picture) == 1


def test_orientation_of_other_modes() -> None:
    deep = waves(20, 30)[..., 0].astype(np.uint16) * 257
    data = turned(6, "png", deep)
    assert orientation(decode(data)) == 6
    assert decode(data, exif=True).size == (20, 30)
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encoded(Image.fromarray(waves(20, 30)).quantize(16), "png", exif=exif)
    assert decode(data, exif=True).size == (20, 30)


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_numbers_that_mean_nothing_turn_nothing(number: int) -> None:
    data = turned(number, "jpeg")
    assert decode(data, exif=True).size == (30, 20)
    assert orientation(decode(data)) == 1


def test_a_damaged_exif_block_turns_nothing() -> None:
    data = encoded(Image.fromarray(waves(20, 30)), "jpeg", exif=b"Exif\0\0" + b"\x99" * 40)
    assert decode(data, exif=True).size == (30, 20)
    assert orientation(decode(data)) == 1


def test_a_header_is_read_without_pixels() -> None:
    with opened(png_header(3000, 2000)) as picture:
        assert picture.size == (3000, 2000)
    with pytest.raises(PictureError), opened(b""):
        pass


def test_a_reason_is_one_line_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise SyntaxError("bad\n\x1b[31mheader")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(PictureError) as caught:
        decode(io.BytesIO().getvalue())
    assert str(caught.value) == "bad \\x1b[31mheader"


def test_no_other_place_opens_pictures() -> None:
    """One definition says which formats of strangers are opened; the other opens PNGs of ours."""
    root = Path(__file__).parents[3]
    places = [
        path.relative_to(root).as_posix()
        for folder in ("featcache", "student", "pipelines")
        for path in sorted((root / folder).rglob("*.py"))
        if "Image.open(" in path.read_text()
    ]
    assert places == ["featcache/drawing/pictures.py", "featcache/pictures/decode.py"]
