"""A page escapes what strangers wrote; how it looks is tested in `tests/test_browser.py`."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from featcache.drawing import page as pages
from featcache.drawing import pictures
from featcache.errors import printable


class Parsed(HTMLParser):
    """The tags and the text of a page, as Python's own parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.words += data


IMAGE = pictures.opened(pictures.png(np.zeros((1, 1, 3), np.uint8)))
MAKERS = (
    lambda text: pages.table([[text]], [text]),
    lambda text: pages.section(text, text, ""),
    lambda text: pages.page(text, ""),
    lambda text: pages.picture("a.png", IMAGE, text, f"x{text}"),
)


@given(st.text())
def test_no_text_becomes_markup(text: str) -> None:
    for make in MAKERS:
        assert Parsed(make(text)).tags == Parsed(make("x")).tags
    assert printable(pages.escape(text), keep="") == pages.escape(text)
    pages.escape(text).encode()


def test_the_texts_stay_what_they_are() -> None:
    text = "<img src=x onerror='a()'> & \"q\""
    assert Parsed(pages.section("s", "t", f"<p>{pages.escape(text)}</p>")).words.strip() == (
        f"t\n{text}"
    )


def test_a_page_names_its_policy_and_scripts_nothing() -> None:
    made = pages.page("title", "body")
    parsed = Parsed(made)
    assert "script" not in parsed.tags
    assert "default-src 'none'" in made
    assert made.startswith("<!doctype html>")
    assert parsed.words.count("title") == 2
