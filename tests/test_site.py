"""The documentation is built as `make docs` builds it: strictly, with every page reached, and with
pages that ask no other server for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from featcache import teachers
from pipelines import reference_pages
from student import evals, recipes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class _Links(HTMLParser):
    """Collects what a page loads, and where it leads to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.leads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a":
            self.leads.append(found.get("href") or "")
        elif tag in ("img", "script", "iframe"):
            self.loaded.append(found.get("src") or "")
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(found.get("href") or "")


def test_every_page_is_reached_from_the_first_one(site: Path) -> None:
    first = site / "index.html"
    reached, waiting = {first}, [first]
    while waiting:
        page = waiting.pop()
        for link in _Links(page.read_text()).leads:
            target = (page.parent / link.partition("#")[0]).resolve()
            if "://" not in link and target.suffix == ".html" and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert {page for page in reached if not page.is_file()} == set()
    assert set(site.rglob("*.html")) - reached - {site / "404.html"} == set()
    assert len(reached) > 20


def test_no_page_asks_another_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # whose links begin at the root of a server
            continue
        for link in _Links(page.read_text()).loaded:
            assert "//" not in link, (page, link)
            assert not link or (page.parent / link.partition("?")[0]).is_file(), (page, link)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("teachers", list(teachers.model_cards())),
        ("recipes", recipes.names()),
        ("evals", evals.names()),
        ("featcache", ["featcache extract", "featcache verify"]),
        ("student", ["student train", "student eval knn"]),
    ],
)
def test_reference_pages_are_made_of_the_registries(
    site: Path, page: str, names: list[str]
) -> None:
    text = (site / f"reference/{page}.html").read_text()
    assert [name for name in names if name not in re.sub(r"<[^>]+>", "", text)] == []


def test_marks_in_a_text_do_not_become_markup() -> None:
    table = reference_pages.table(("a", "b"), [("1", reference_pages._cell("x|y <b> *z* [q]"))])
    assert table.splitlines()[2] == r"| 1 | x\|y &lt;b> \*z\* \[q\] |"


def test_code_in_a_cell_stays_code() -> None:
    assert reference_pages._cell("see `student train_x <b>` and a_b") == (
        r"see `student train_x <b>` and a\_b"
    )
    assert reference_pages._cell("one ` alone") == r"one \` alone"
    assert reference_pages._cell("`a|b`") == r"\`a\|b\`"
