"""With one of everything no message counts `1 pictures`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests import student_fixtures as fx

# words of one that end with an s
SINGULAR = {"loss", "class", "process", "is", "has", "stands", "was", "this", "as", "pass"}


def wrong(text: str) -> list[str]:
    """Find counts of one with a noun of many."""
    found = re.finditer(r"(?<![\d.,:/x-])1 ([a-z]+s)\b", text)
    return [text[each.start() - 30 : each.end()] for each in found if each[1] not in SINGULAR]


def test_wrong_counts_are_found() -> None:
    found = wrong(" " * 30 + "1 pictures, 11 views, 0.1 steps, 1 picture, 1 class, and 1 shards")
    assert [text.split()[-1] for text in found] == ["pictures", "shards"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one picture and one view, and a run of one step."""
    place = tmp_path_factory.mktemp("one")
    (place / "pictures/a").mkdir(parents=True)
    shutil.copy(next(fx.pictures().glob("*.png")), place / "pictures/a")
    return place


@pytest.mark.slow
def test_a_picture_a_view_a_shard_a_step_and_a_process(place: Path) -> None:
    pictures, home = place / "pictures", place
    words = ("--teacher", fx.TEACHER, "--images", pictures, "--size", "32", "--levels", "last:3")
    cache = ("--out", place / "cache", "--views", "1")
    said = []
    for command in (
        ("extract", *words, *cache, "--dry-run"),
        ("extract", *words, *cache),
        ("extract", *words, *cache),
        ("info", place / "cache"),
        ("ls",),
        ("verify", place / "cache", "--recompute", "1", "--images", pictures),
        ("copy", place / "cache", place / "copy"),
        ("derive", place / "cache", place / "small", "--tokens", "ranked"),
        ("show", place / "cache", "0"),
        ("gallery", place / "cache", "--out", place / "gallery", "--images", pictures),
        ("pack", pictures, place / "packed", "--shard-size", "9"),
        ("gc",),
    ):
        ran = fx.good(fx.feat(*map(str, command), home=home))
        said.append(ran.out + ran.err)
    options = ("--cache", place / "cache", "--images", pictures, "--batch-size", "1")
    for more in (("--dry-run",), (), ("--resume",)):
        ran = fx.good(fx.train("maskalign", place / "run", *options, "--steps", "1", *more))
        said.append(ran.out + ran.err)
    for command in (("runs", place), ("report", place / "run", "--out", place / "page.html")):
        ran = fx.good(fx.stud(*command))
        said.append(ran.out + ran.err)
    text = "\n".join(said)
    assert "1 picture" in text
    assert wrong(text) == []
    for page in (place / "page.html", place / "gallery/index.html"):
        assert wrong(re.sub(r"<[^>]*>", " ", page.read_text())) == []


def test_a_fault_of_one(place: Path) -> None:
    ran = fx.stud("eval", "knn", str(place / "run"), "--images", str(place / "pictures"))
    assert ran.status
    assert wrong(ran.err) == []
