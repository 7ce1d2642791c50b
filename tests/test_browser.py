"""The checks of `tests.browser` find what they are for: each on a page made to fail it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featcache.drawing import page as pages
from featcache.drawing import pictures
from tests.browser import SHARED, Page, open_page

pytestmark = SHARED

RAMP = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
FIGURE = pages.figure(pictures.png(RAMP), "a ramp", "a ramp of greys")


def _open(folder: Path, body: str, style: str = "", width: int = 360) -> Page:
    path = folder / "page.html"
    path.write_text(pages.page("A page", body, style=style))
    return open_page(path, width)


@pytest.mark.parametrize("width", [360, 1400])
def test_a_good_page(tmp_path: Path, width: int) -> None:
    """A wide table scrolls in its box; pictures inside the page and beside it are seen."""
    (tmp_path / "beside.png").write_bytes(pictures.png(RAMP))
    beside = pages.picture("beside.png", pictures.opened(pictures.png(RAMP)), "beside")
    wide = pages.table([["word " * 3] * 30, ["x" * 300] * 30], [f"column {i}" for i in range(30)])
    chart = '<svg width="90" height="30"><text x="0" y="20">axis</text></svg>'
    body = pages.section("one", "Pictures", pages.figures([FIGURE, beside])) + wide + chart
    page = _open(tmp_path, body, width=width)
    page.check()
    assert [(image.width, image.height) for image in page.images] == [(8, 8), (8, 8)]
    assert len(page.files) == 1
    assert page.svgs == 1
    assert "a ramp of greys" in page.text


@pytest.mark.parametrize(
    "source", ["none.png", "blank.png", pages.figure(pictures.png(0 * RAMP), "").split('"')[1]]
)
def test_a_blank_picture(tmp_path: Path, source: str) -> None:
    (tmp_path / "blank.png").write_bytes(pictures.png(np.full_like(RAMP, 7)))
    image = pictures.opened(pictures.png(RAMP))
    (found,) = _open(tmp_path, pages.picture(source, image, "")).images
    assert found.is_blank


OVER = '<p>first</p><p style="margin-top: -1.6rem">second</p>'
OVER_IN_SVG = (
    '<svg width="99" height="40"><text x="1" y="20">axis</text><text x="9" y="22">tick</text></svg>'
)


@pytest.mark.parametrize(
    ("body", "pair"), [(OVER, ("second", "first")), (OVER_IN_SVG, ("axis", "tick"))]
)
def test_overlapping_texts(tmp_path: Path, body: str, pair: tuple[str, str]) -> None:
    (found,) = _open(tmp_path, body).overlaps
    assert set(found) == set(pair)


def test_a_page_wider_than_the_screen(tmp_path: Path) -> None:
    assert _open(tmp_path, '<div style="width: 500px">wide</div>').overflow_px >= 140


@pytest.mark.slow
def test_requests_and_errors_are_told(tmp_path: Path) -> None:
    """Without the policy of our pages a request goes out, and a script runs; with it the browser
    refuses both, and says so."""
    bad = '<img src="http://127.0.0.1:9/x.png"><script>console.error("oh"); nothing()</script>'
    path = tmp_path / "raw.html"
    path.write_text(f"<!doctype html><title>x</title><body>{bad}")
    page = open_page(path, 360)
    assert page.requests == ["http://127.0.0.1:9/x.png"]
    assert "oh" in page.errors
    assert any("nothing is not defined" in error for error in page.errors)
    ours = _open(tmp_path, bad)
    assert not any("oh" in error.split() or "defined" in error for error in ours.errors)
    assert sum("Content Security Policy" in error for error in ours.errors) == 2


@pytest.mark.slow
def test_the_page_follows_the_readers_scheme(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(pages.page("A page", "<p>text</p>"))
    light, dark = tmp_path / "light.png", tmp_path / "dark.png"
    open_page(path, 360, screenshot=light)
    open_page(path, 360, dark=True, screenshot=dark)
    means = [np.asarray(pictures.opened(each.read_bytes())).mean() for each in (light, dark)]
    assert means[0] > 200
    assert means[1] < 60
