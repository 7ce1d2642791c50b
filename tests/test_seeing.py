"""The command lines of docs/seeing.md run as they stand, on a small home that has what they
name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import student_fixtures as fx

PAGE = (Path(__file__).parent.parent / "docs/seeing.md").read_text()
LINES = re.findall(r"^    featcache (.*)$", PAGE, re.M)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and a cache of five pictures x 3 views."""
    root = tmp_path_factory.mktemp("seeing")
    fx.save_pictures(root / "train/n01440764", 5)
    (root / "train/n01440764/p00.png").rename(root / "train/n01440764/n01440764_10026.png")
    fx.extract(root / "train", root / "caches/clip-b16-1a2b3c4d")
    return root


def test_every_line_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    said = {line: fx.good(fx.feat(*line.split())) for line in LINES}
    assert len(said) == 7
    facts = next(json.loads(ran.out) for line, ran in said.items() if "--json" in line)
    assert facts["row"] == 1
    assert len(facts["views"]) == 3
    assert (place / "record.png").is_file()
    for folder, pictures in (("gallery", 5), ("other", 4), ("one", 1)):
        assert (place / folder / "index.html").read_text().count("<section") == 2 + pictures
