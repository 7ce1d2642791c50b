"""Resized crops are Pillow's, to the bit, whatever the filter and the shape, in both orders of the
passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache.views import resample

FILTERS = sorted(resample.SUPPORT)
NEVER, TALL = resample.PASS_ORDERS.values()


@pytest.fixture
def another_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Choose what orders are known; what was found for the installed Pillow is forgotten before and
    after."""

    def choose(**orders: resample.Order) -> None:
        monkeypatch.setattr(resample, "PASS_ORDERS", orders)
        resample.pass_order.cache_clear()

    yield choose
    resample.pass_order.cache_clear()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Every level with many 0 and 255, so that sums leave the range on both sides."""
    values = np.random.default_rng(seed).integers(-80, 336, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def pillows(
    picture: Image.Image, size: int, filter: Image.Resampling, vertical_first: bool
) -> np.ndarray:
    """The passes one after the other, each made by Pillow by itself: the order is ours, the
    arithmetic is not."""
    between = (picture.width, size) if vertical_first else (size, picture.height)
    return np.asarray(picture.resize(between, filter).resize((size, size), filter))


def test_the_installed_pillows_order_is_known() -> None:
    """Else every crop would be resized by Pillow, slowly; a new Pillow's order belongs to
    ORDERS."""
    assert resample.pass_order() in (NEVER, TALL)


@pytest.mark.parametrize("filter", FILTERS)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 130), st.integers(1, 130), st.integers(1, 80), st.booleans(), st.integers(0, 99)
)
def test_it_is_what_pillow_makes(
    filter: int, height: int, width: int, size: int, flip: bool, seed: int
) -> None:
    picture = noise(height, width, seed)
    theirs = np.asarray(picture.resize((size, size), Image.Resampling(filter)))
    ours = resample.resize(picture, size, Image.Resampling(filter), flip)
    np.testing.assert_array_equal(ours, theirs[:, ::-1] if flip else theirs)
    assert ours.flags.c_contiguous


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("vertical_first", [False, True])
@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (90, 224), (224, 90), (1, 300), (300, 1)]
)
def test_either_order_is_two_passes_of_pillows(
    filter: int, vertical_first: bool, height: int, width: int
) -> None:
    picture, kind = noise(height, width), Image.Resampling(filter)
    for size in (14, 112, 196, 224):
        ours = resample._resized(
            np.asarray(picture), size, resample.SUPPORT[kind], vertical_first, False
        )
        np.testing.assert_array_equal(ours, pillows(picture, size, kind, vertical_first))


@pytest.mark.parametrize(
    ("height", "width", "size", "wanted"),
    [
        (375, 500, 224, False),  # 151 lines away, 276 columns
        (500, 375, 224, False),  # 276, 151: less than twice as many
        (500, 361, 224, True),  # 276, 137
        (500, 362, 224, False),  # 276, 138: twice, not more
        (300, 200, 224, True),  # the width grows
        (200, 100, 224, False),  # both grow
        (224, 100, 224, False),
    ],
)
def test_when_tall_crops_go_vertically_first(
    height: int, width: int, size: int, wanted: bool
) -> None:
    assert TALL(height, width, size) is wanted
    assert NEVER(height, width, size) is False


def test_an_order_that_is_not_known_leaves_it_to_pillow(another_order: Callable[..., None]) -> None:
    another_order(upside_down=lambda height, width, size: not TALL(height, width, size))
    assert resample.pass_order() is None
    for shape in [(64, 24), (24, 64)]:
        picture = noise(*shape)
        theirs = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(
            resample.resize(picture, 16, Image.Resampling.BICUBIC), theirs
        )
        flipped = resample.resize(picture, 16, Image.Resampling.BICUBIC, flip=True)
        np.testing.assert_array_equal(flipped, theirs[:, ::-1])


@pytest.mark.parametrize("true", [NEVER, TALL])
def test_a_pillow_of_either_order_is_told(
    true: resample.Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever Pillow is installed: one that resizes in the other order is found to, too."""
    apart = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
        width, height = self.size
        between = (width, size[1]) if true(height, width, size[0]) else (size[0], height)
        return apart(apart(self, between, filter), size, filter)

    monkeypatch.setattr(Image.Image, "resize", resize)
    resample.pass_order.cache_clear()
    try:
        assert resample.pass_order() is true
    finally:
        resample.pass_order.cache_clear()


def test_slender_crops_are_pillows() -> None:
    for height, width in [(1000, 3), (301, 3), (300, 3), (3, 1000)]:
        picture = noise(height, width)
        theirs = np.asarray(picture.resize((32, 32), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(
            resample.resize(picture, 32, Image.Resampling.LANCZOS), theirs
        )


@pytest.mark.parametrize("mode", ["L", "RGBA", "F"])
def test_other_modes_are_pillows(mode: str) -> None:
    picture = noise(40, 60).convert(mode)
    theirs = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        resample.resize(picture, 32, Image.Resampling.BICUBIC, flip=True), theirs[:, ::-1]
    )


def test_threads_resize_side_by_side() -> None:
    pictures = [noise(40 + i, 90 - i, i) for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda each: resample.resize(each, 24, Image.Resampling.BICUBIC), pictures)
        )
    for picture, ours in zip(pictures, found, strict=True):
        np.testing.assert_array_equal(
            ours, np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC))
        )
