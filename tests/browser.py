"""Pages are opened in a real browser, which tells what a reader would see: errors, requests,
pictures that are blank, texts that lie over one another, a page that is wider than the screen.

    page = open_page(tmp_path / "index.html", 360)
    page.check()  # none of those

One Chromium serves the tests of a module, which begins with `pytestmark = SHARED`.

Chromium comes from the system (`apt-get install chromium`); where it is absent the test is skipped,
or fails with FEATCACHE_REQUIRE_CHROMIUM=1.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

ARGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
HEIGHT = 900
SHARED = pytest.mark.usefixtures("chromium")
_running: list[Any] = []  # the browser of the module, while it has one
TIMEOUT_MS = 60_000

IMAGES = """() => [...document.images].map(image => ({
    source: image.src, width: image.naturalWidth, height: image.naturalHeight, alt: image.alt,
    shown: image.getBoundingClientRect().width > 0 && image.getBoundingClientRect().height > 0,
}))"""

# Every line of text with the element it stands in; what a scrolling box hides is cut off.
OVERLAPS = """() => {
  const lines = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const own = node.parentElement;
    const seen = own.checkVisibility({visibilityProperty: true, opacityProperty: true});
    if (!node.data.trim() || !seen) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      let [left, top, right, bottom] = [rect.left, rect.top, rect.right, rect.bottom];
      for (let box = own; box; box = box.parentElement) {
        const flow = getComputedStyle(box).overflowX;
        if (box === document.documentElement || flow === "visible") continue;
        const clip = box.getBoundingClientRect();
        left = Math.max(left, clip.left); right = Math.min(right, clip.right);
        top = Math.max(top, clip.top); bottom = Math.min(bottom, clip.bottom);
      }
      if (right - left > 1 && bottom - top > 1)
        lines.push({own, left, top, right, bottom, text: node.data.trim().slice(0, 60)});
    }
  }
  lines.sort((a, b) => a.top - b.top);
  const found = [];
  for (let i = 0; i < lines.length; i++) {
    const a = lines[i];
    for (let j = i + 1; j < lines.length && lines[j].top < a.bottom - 1; j++) {
      const b = lines[j];
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1
          && !a.own.contains(b.own) && !b.own.contains(a.own))
        found.push([a.text, b.text]);
    }
  }
  return found;
}"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
TEXT = "() => document.body.innerText"


@dataclass
class Picture:
    """Tells what the browser knows of an <img>, and the standard deviation of its file's pixels."""

    source: str
    width: int
    height: int
    alt: str
    shown: bool
    std: float

    @property
    def is_blank(self) -> bool:
        return not (self.shown and self.width and self.height and self.std > 0)


@dataclass
class Page:
    """Holds what a reader of a page at one width meets."""

    errors: list[str] = field(default_factory=list)  # of the console and of scripts
    requests: list[str] = field(default_factory=list)  # but the page, data: and files beside it
    files: list[str] = field(default_factory=list)  # beside the page or below it, that were read
    images: list[Picture] = field(default_factory=list)
    svgs: int = 0
    overlaps: list[tuple[str, str]] = field(default_factory=list)
    overflow_px: int = 0  # that the page is wider than the screen
    text: str = ""

    def check(self) -> None:
        """Assert that nothing is wrong with it."""
        assert not self.errors
        assert not self.requests
        assert not [image for image in self.images if image.is_blank]
        assert not self.overlaps
        assert self.overflow_px <= 0


def open_page(
    where: str | Path, width: int, dark: bool = False, screenshot: Path | None = None
) -> Page:
    """Open a file or an address on a screen `width` pixels wide; a picture of the whole page goes
    to `screenshot`."""
    url = where if isinstance(where, str) and "://" in where else Path(where).absolute().as_uri()
    with _browser() as browser:
        scheme = "dark" if dark else "light"
        tab = browser.new_page(
            viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, offline=False
        )
        tab.set_default_timeout(TIMEOUT_MS)
        page = Page()
        tab.on("console", lambda said: said.type == "error" and page.errors.append(said.text))
        tab.on("pageerror", lambda error: page.errors.append(str(error)))
        tab.on("request", lambda asked: _note(page, url, asked.url))
        tab.goto(url, wait_until="load")
        page.images = [_image(found) for found in tab.evaluate(IMAGES)]
        page.svgs = tab.evaluate("() => document.querySelectorAll('svg').length")
        page.overlaps = [tuple(pair) for pair in tab.evaluate(OVERLAPS)]
        page.overflow_px, page.text = tab.evaluate(OVERFLOW), tab.evaluate(TEXT)
        if screenshot:
            tab.screenshot(path=screenshot, full_page=True)
        tab.close()
    return page


@pytest.fixture(scope="module")
def chromium() -> Iterator[None]:
    """Run a browser for a module. Not for a session: playwright keeps an event loop, and other
    tests of the worker run their own."""
    if shutil.which("chromium") is None:  # who opens a page is told
        yield
        return
    with _started() as browser:
        _running.append(browser)
        try:
            yield
        finally:
            _running.clear()


@contextmanager
def _browser() -> Iterator[Any]:
    if _running:
        yield _running[0]
        return
    with _started() as browser:
        yield browser


@contextmanager
def _started() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("FEATCACHE_REQUIRE_CHROMIUM"):
            pytest.fail("FEATCACHE_REQUIRE_CHROMIUM is set, and there is no chromium")
        pytest.skip("no chromium; to run these tests: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGS))
        try:
            yield browser
        finally:
            browser.close()


def _note(page: Page, own: str, asked: str) -> None:
    if asked.startswith("data:") or asked.partition("#")[0] == own.partition("#")[0]:
        return
    beside = own.startswith("file:") and asked.startswith(own.rpartition("/")[0] + "/")
    (page.files if beside else page.requests).append(asked)


def _image(found: dict[str, Any]) -> Picture:
    """The pixels come from the file: a canvas may not read those of a page from disk."""
    return Picture(**found, std=_std(found["source"]))


def _std(source: str) -> float:
    """The standard deviation of a PNG's pixels over places, 0 for one that cannot be read."""
    try:
        if source.startswith("data:image/png;base64,"):
            data = base64.b64decode(source.partition(",")[2])
        else:
            data = Path(unquote(urlsplit(source).path)).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return float(np.asarray(image.convert("RGB"), np.float64).std((0, 1)).max())
    except (OSError, ValueError):
        return 0.0
