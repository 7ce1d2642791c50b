"""FFCV's decode and our replay: against FFCV's own loader, against arithmetic, and in threads."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from featcache.errors import IdentityError, UsageError
from featcache.pictures import beton
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError
from featcache.views import ffcv_decoder, pixel_path
from featcache.views.render import render
from tests.ffcv_files import COUNT, SIZE, photo

PLAIN = (1.0, 1.0, 1.0, 0.0)  # no jitter


def opened(path: Path) -> ffcv_decoder.FfcvSource:
    source = pixel_path.open_with_decoder(path, "ffcv")
    assert isinstance(source, ffcv_decoder.FfcvSource)
    return source


def test_a_centre_box_gives_what_ffcvs_loader_gives(ffcv_files: Path) -> None:
    """FFCV's own crop decoder takes the centre square: side s = min(h, w), at (h - s) // 2, (w - s)
    // 2."""
    source, wanted = opened(ffcv_files / "jpg.beton"), np.load(ffcv_files / "centre.npy")
    for i in range(COUNT):
        height, width = photo(i).shape[:2]
        side = min(height, width)
        box = ((height - side) // 2, (width - side) // 2, side, side)
        straight, mirrored = (
            render(source.picture(i), box, flip, PLAIN, SIZE, "area") for flip in (0, 1)
        )
        assert np.array_equal(straight, wanted[i])
        assert np.array_equal(mirrored, wanted[i][:, ::-1])


def test_half_the_size_is_the_mean_of_two_by_two(ffcv_files: Path) -> None:
    """INTER_AREA at a whole factor: (a + b + c + d + 2) >> 2, from the box and from nothing outside
    of it."""
    source = opened(ffcv_files / "raw.beton")
    top, left, size = 5, 3, 14
    for flip in (0, 1):
        got = render(source.picture(1), (top, left, 2 * size, 2 * size), flip, PLAIN, size, "area")
        box = photo(1)[top : top + 2 * size, left : left + 2 * size].astype(int)
        mean = (box.reshape(size, 2, size, 2, 3).sum((1, 3)) + 2) >> 2
        assert np.array_equal(got, mean[:, ::-1] if flip else mean)


def test_colours_change_before_the_crop_as_on_the_other_path(ffcv_files: Path) -> None:
    """Pillow's enhancers on the whole picture, whose mean contrast takes, in order 4; then means of
    2 x 2."""
    picture = opened(ffcv_files / "raw.beton").picture(3)
    whole = Image.fromarray(photo(3))
    for enhancer, factor in (
        (ImageEnhance.Color, 0.75),
        (ImageEnhance.Brightness, 1.25),
        (ImageEnhance.Contrast, 1.5),
    ):
        whole = enhancer(whole).enhance(factor)
    jitter = np.array([1.25, 1.5, 0.75, 4], np.float32)  # brightness, contrast, saturation, order
    box = np.asarray(whole)[2:30, 7:35].astype(int)
    wanted = (box.reshape(14, 2, 14, 2, 3).sum((1, 3)) + 2) >> 2
    assert np.array_equal(render(picture, (2, 7, 28, 28), 0, jitter, 14, "area"), wanted)
    # the picture itself is as it was, for its other views
    assert np.array_equal(picture.pixels, photo(3))


def test_odd_sizes_are_mirrored_about_their_middle_column(ffcv_files: Path) -> None:
    picture = opened(ffcv_files / "raw.beton").picture(0)
    straight, mirrored = (
        render(picture, (0, 0, 15, 15), flip, PLAIN, 15, "area") for flip in (0, 1)
    )
    assert np.array_equal(straight, photo(0)[:15, :15])  # the box's own size: no change
    assert np.array_equal(mirrored, photo(0)[:15, 14::-1])


def test_it_is_another_path_than_pillows(ffcv_files: Path) -> None:
    """The fast inverse DCT is a few levels off: if these pixels were equal the path would need no
    name of its own."""
    path = ffcv_files / "jpg.beton"
    ours, theirs = open_source(path), opened(path)
    gaps = [
        np.abs(np.asarray(decode(ours.read(i))).astype(int) - theirs.picture(i).pixels).max()
        for i in range(COUNT)
    ]
    assert 1 <= max(gaps) <= 24
    assert pixel_path.pixel_path(ours) == pixel_path.PIXEL_PATH
    assert pixel_path.pixel_path(theirs) == ffcv_decoder.PIXEL_PATH
    assert [theirs.picture(2).height, theirs.picture(2).width] == list(photo(2).shape[:2])


def test_all_but_the_decoder_is_the_files(ffcv_files: Path) -> None:
    ours, theirs = open_source(ffcv_files / "raw.beton"), opened(ffcv_files / "raw.beton")
    assert (theirs.spec, theirs.keys, theirs.classes, len(theirs)) == (
        ours.spec,
        ours.keys,
        None,
        COUNT,
    )
    assert ours.labels is not None
    assert theirs.labels is not None
    assert theirs.labels.tolist() == ours.labels.tolist()
    assert theirs.read(3) == ours.read(3)
    assert pixel_path.with_decoder(theirs, "pillow") == theirs.beton
    assert pixel_path.with_decoder(theirs, "ffcv") is theirs


def _with_jpeg(
    folder: Path, name: str, data: bytes, size: tuple[int, int]
) -> ffcv_decoder.FfcvSource:
    """A source of one picture with these bytes."""
    (folder / name).write_bytes(data)
    places, sizes = np.array([[0, len(data)]], np.int64), np.array([size], np.int32)
    source = beton.BetonSource(
        str(folder / name), ["k"], places, np.array([beton.JPG], np.uint8), sizes, None
    )
    return ffcv_decoder.FfcvSource(source)


def _jpeg(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def test_broken_jpegs_are_unusable_pictures(ffcv: None, tmp_path: Path) -> None:
    data = _jpeg(photo(4))
    for name, broken in (
        ("half", data[: len(data) // 2]),
        ("text", b"not a picture"),
        ("nothing", b""),
    ):
        with pytest.raises(PictureError, match="libturbojpeg cannot decode"):
            _with_jpeg(tmp_path, name, broken, (38, 48)).picture(0)
    assert _with_jpeg(tmp_path, "whole", data, (38, 48)).picture(0).pixels.shape == (38, 48, 3)


@pytest.mark.parametrize("size", [(38, 40), (76, 96), (19, 24), (65535, 65535)])
def test_a_jpeg_of_another_size_than_its_row_says_is_not_decoded(
    ffcv: None, tmp_path: Path, size: tuple[int, int]
) -> None:
    """libturbojpeg scales by whole factors to fit, and its lines then lie elsewhere."""
    with pytest.raises(PictureError, match=r"its JPEG has 38 x 48"):
        _with_jpeg(tmp_path, "other", _jpeg(photo(4)), size).picture(0)


def test_a_decompression_bomb_is_not_decoded(ffcv: None, tmp_path: Path) -> None:
    """A frame header of 20000 x 20000 before scans of a small picture."""
    data = bytearray(_jpeg(photo(4)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = (20000).to_bytes(2) * 2
    with pytest.raises(PictureError, match="20000 x 20000 pixels: a picture has at most"):
        _with_jpeg(tmp_path, "bomb", bytes(data), (20000, 20000)).picture(0)


def test_a_jpegs_size_is_that_of_its_frame_header() -> None:
    """Beside fill bytes, a thumbnail in its EXIF block, and progressive scans."""
    thumbnail, file = _jpeg(photo(0)), io.BytesIO()
    picture = Image.fromarray(photo(4))
    picture.save(file, "JPEG", progressive=True, exif=b"Exif\0\0" + thumbnail)
    data = file.getvalue()
    assert ffcv_decoder.jpeg_size(data) == (38, 48)
    assert ffcv_decoder.jpeg_size(data[:2] + b"\xff" + data[2:]) == (38, 48)
    assert ffcv_decoder.jpeg_size(data[:30]) is None
    assert ffcv_decoder.jpeg_size(b"") is None


def test_grey_jpegs_are_repeated(ffcv: None, tmp_path: Path) -> None:
    pixels = _with_jpeg(tmp_path, "grey", _jpeg(photo(0), "L"), (34, 40)).picture(0).pixels
    grey = np.asarray(Image.fromarray(photo(0)).convert("L")).astype(int)
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert np.abs(pixels[..., 0] - grey).mean() < 4


@pytest.mark.parametrize(
    "crop", [(0, 0, 35, 40), (0, 0, 34, 41), (-1, 0, 5, 5), (30, 0, 5, 5), (0, 0, 0, 5)]
)
def test_a_box_outside_of_the_picture_is_another_picture(
    ffcv_files: Path, crop: tuple[int, ...]
) -> None:
    """OpenCV would end the process."""
    with pytest.raises(
        IdentityError, match=r"'a/b0' has 34 x 40 pixels.*another picture under this key"
    ):
        opened(ffcv_files / "raw.beton").picture(0).replay(crop, 0, PLAIN, 8, "area")


def test_threads_decode_side_by_side_without_the_gil(ffcv: None, tmp_path: Path) -> None:
    """While one thread decodes, this one goes on counting: with the GIL held it would stand still
    until the end."""
    rows = np.arange(5000 * 5000, dtype=np.int64).reshape(5000, 5000) * 2654435761 % 251
    pixels = np.repeat(rows.astype(np.uint8)[..., None], 3, 2)
    source = _with_jpeg(tmp_path, "large", _jpeg(pixels), (5000, 5000))
    ffcv_decode, begun = ffcv_decoder.compiled_functions()[0], threading.Event()
    data, out = (
        np.frombuffer(bytearray(source.beton.stored(0)), np.uint8),
        np.empty((5000, 5000, 3), np.uint8),
    )
    spans: list[tuple[float, float]] = []

    def work() -> None:
        begun.set()
        start = time.perf_counter()
        assert ffcv_decode(data, 5000, 5000, False, out) == 0
        spans.append((start, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    seen = [time.perf_counter()]
    while not spans:
        seen.append(time.perf_counter())
    thread.join()
    (start, end), moments = spans[0], np.array(seen)
    inside = moments[(moments > start) & (moments < end)]
    assert len(inside), (start, end)
    assert np.diff(np.concatenate([[start], inside, [end]])).max() < 0.5 * (end - start)


def test_threads_give_the_pixels_of_one(ffcv_files: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    source = opened(ffcv_files / "jpg.beton")

    def work(i: int) -> np.ndarray:
        return render(source.picture(i % COUNT), (2, 1, 30, 33), i % 2, PLAIN, 28, "area")

    alone = [work(i) for i in range(2 * COUNT)]
    with ThreadPoolExecutor(4) as pool:
        for i, pixels in enumerate(pool.map(work, range(200))):
            assert np.array_equal(pixels, alone[i % (2 * COUNT)])


@pytest.mark.parametrize(
    ("path", "filter", "words"),
    [
        (ffcv_decoder.PIXEL_PATH, "bicubic", "filter bicubic: --decoder ffcv resizes by area"),
        (ffcv_decoder.PIXEL_PATH, "lanczos", "filter lanczos: --decoder ffcv resizes by area"),
        (
            pixel_path.PIXEL_PATH,
            "area",
            "filter area: --decoder pillow resizes by bicubic, bilinear or lanczos",
        ),
    ],
)
def test_filters_of_the_other_path(path: dict[str, object], filter: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pixel_path.check_filter(path, filter)


def test_filters_of_its_own() -> None:
    pixel_path.check_filter(ffcv_decoder.PIXEL_PATH, "area")
    pixel_path.check_filter(pixel_path.PIXEL_PATH, "bicubic")
