"""What is drawn on a view, against pixels worked out by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.drawing import pictures
from featcache.drawing.pictures import CASING, COLOURS, HIDDEN, LINE

BLACK = np.zeros((4, 4, 3), np.uint8)


def test_png_keeps_the_pixels_and_is_the_same_file_each_time() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    data = pictures.png(pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert pictures.png(pixels[:, ::-1][:, ::-1]) == data
    assert pictures.opened(data).size == (7, 5)


def test_attention_is_brightest_where_it_is_largest() -> None:
    """0.4 of the grey view and 0.6 of inferno, whose first and last colours are (0.001462,
    0.000466, 0.013866) and (0.988362, 0.998364, 0.644924)."""
    grey = np.full((4, 4, 3), 100, np.uint8)
    shown = pictures.attention_map(grey, np.array([[0.0, 0.1], [0.2, 0.4]]))[::2, ::2]
    assert shown[0, 0].tolist() == [40, 40, 42]  # 40 + 153 * (0.0015, 0.0005, 0.0139)
    assert shown[1, 1].tolist() == [191, 193, 139]  # 40 + 153 * (0.988, 0.998, 0.645)
    assert shown.sum(-1).ravel().argsort().tolist() == [0, 1, 2, 3]
    dark = pictures.attention_map(grey, np.zeros((2, 2)))
    assert (dark == [40, 40, 42]).all()


def test_attention_that_is_no_number_is_hatched() -> None:
    shown = pictures.attention_map(BLACK, np.array([[np.nan, 1.0], [1.0, np.inf]]))
    assert set(shown[:2, :2].ravel()) <= {150, 225}
    assert set(shown[2:, 2:].ravel()) <= {150, 225}
    assert (shown[:2, 2:] == shown[0, 3]).all()


@pytest.mark.parametrize(
    ("attention", "share", "expected"),
    [
        ([[0.4, 0.3], [0.2, 0.1]], 0.5, [[1, 1], [0, 0]]),  # 0.4 is not enough, 0.7 is
        ([[0.1, 0.2], [0.3, 0.4]], 0.4, [[0, 0], [0, 1]]),
        ([[0.1, 0.2], [0.3, 0.4]], 1.0, [[1, 1], [1, 1]]),
        ([[0.5, 0.5], [0.5, 0.5]], 0.5, [[1, 1], [0, 0]]),  # of equals, the first
        ([[0.0, 0.0], [0.0, 0.0]], 0.5, [[0, 0], [0, 0]]),
        ([[np.nan, 0.1], [0.9, 0.0]], 0.5, [[0, 0], [1, 0]]),
    ],
)
def test_the_smallest_set_by_hand(
    attention: list[list[float]], share: float, expected: list[list[int]]
) -> None:
    found = pictures.smallest_set(np.array(attention), share)
    assert found.astype(int).tolist() == expected


@given(st.lists(st.integers(0, 1000), min_size=9, max_size=9), st.floats(0.01, 1))
def test_no_smaller_set_holds_the_share(weights: list[int], share: float) -> None:
    """Exact, in whole numbers: the set holds the share, and the best set with one patch less does
    not."""
    found = pictures.smallest_set(np.array(weights, np.float64).reshape(3, 3), share).ravel()
    total, count = sum(weights), int(found.sum())
    if total == 0:
        assert count == 0
        return
    assert sum(np.array(weights)[found]) >= share * total * (1 - 1e-9)
    assert sum(sorted(weights, reverse=True)[: count - 1]) < share * total


def test_the_contour_by_hand() -> None:
    """8 x 8 pixels, 2 x 2 patches, the upper left one holds the half: its border of one pixel is
    white, what lies around it below and to the right black."""
    shown = pictures.contour(np.full((8, 8, 3), 99, np.uint8), np.array([[0.7, 0.1], [0.1, 0.1]]))
    picture = np.where((shown == LINE).all(-1), "w", np.where((shown == CASING).all(-1), "b", "."))
    assert ["".join(row) for row in picture] == [
        "wwwwb...",
        "w..wb...",
        "w..wb...",
        "wwwwb...",
        "bbbb....",
        "........",
        "........",
        "........",
    ]


def test_a_contour_does_not_run_through_its_set() -> None:
    shown = pictures.contour(np.full((8, 8, 3), 99, np.uint8), np.array([[0.5, 0.5], [0, 0]]), 1.0)
    assert (shown[1:3, 1:7] == 99).all()
    assert (shown[3, :] == 255).all()
    assert (shown[5:] == 99).all()


def test_masked_hides_what_is_not_visible() -> None:
    pixels = np.full((4, 4, 3), 51, np.uint8)
    shown = pictures.masked(pixels, np.array([[True, False], [False, True]]))[..., 0]
    s, g = 51, HIDDEN
    assert shown.tolist() == [[s, s, g, g], [s, s, g, g], [g, g, s, s], [g, g, s, s]]


def test_patches_that_are_not_there_are_hatched() -> None:
    colours = np.array([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [0, 0, 0]]], np.uint8)
    shown = pictures.patches(colours, 8, np.array([[True, True], [True, False]]))
    assert shown[::4, ::4][0].tolist() == colours[0].tolist()
    assert (shown[4:, :4] == [7, 8, 9]).all()
    assert set(shown[4:, 4:].ravel()) == {150, 225}
    assert np.array_equal(pictures.patches(colours, 2), colours)


def test_sizes_that_are_no_multiple_of_the_grid() -> None:
    grid = np.arange(9).reshape(3, 3)
    assert pictures.spread(grid, 5).tolist() == [
        [0, 0, 1, 1, 2],
        [0, 0, 1, 1, 2],
        [3, 3, 4, 4, 5],
        [3, 3, 4, 4, 5],
        [6, 6, 7, 7, 8],
    ]


def test_boxes_lie_on_their_own_edge_pixels() -> None:
    """A box of top 10, left 20, height 30, width 40 has its frame in rows 10 and 39, columns 20 and
    59."""
    shown = pictures.boxes(np.zeros((60, 80, 3), np.uint8), [(10, 20, 30, 40)], [""])
    frame = (shown == COLOURS[0]).all(-1)
    rows, columns = np.nonzero(frame)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 39, 20, 59)
    assert frame[10, 20:60].all()
    assert frame[39, 20:60].all()
    assert frame[10:40, 20].all()
    assert frame[10:40, 59].all()
    assert not frame[30:38, 30:50].any()


def test_labels_of_equal_boxes_do_not_cover_one_another() -> None:
    box = (0, 0, 200, 200)
    shown = pictures.boxes(np.zeros((200, 200, 3), np.uint8), [box] * 3, ["0", "1", "2"])
    sizes = [int((shown == colour).all(-1).sum()) for colour in COLOURS[:3]]
    assert min(sizes) > 50, sizes


def test_a_grid_that_is_not_square() -> None:
    assert pictures.grid_side(196) == 14
    with pytest.raises(ValueError, match="12 patches"):
        pictures.grid_side(12)
