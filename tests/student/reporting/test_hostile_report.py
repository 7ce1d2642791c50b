"""Run folders from an attacker on a page: the command ends well or with one line, soon, runs
nothing, and changes nothing but the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from student.cli import cli
from student.reporting import report
from tests import hostile_json as hostile
from tests import student_fixtures as fx
from tests.featcache.drawing.test_page import Parsed

# few by default, many where minutes are given
EXAMPLES = pytest.mark.parametrize("examples", [1, pytest.param(16, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and its copy that is attacked."""
    folder = tmp_path_factory.mktemp("hostile-report")
    options = ("--cache", fx.ranked_path(), "--steps", "2", "--batch-size", "8")
    fx.good(fx.train("mralign", folder / "good", *options))
    shutil.copytree(folder / "good", folder / "bad")
    (folder / "pages").mkdir()
    return folder


def attack(world: Path) -> int:
    """Make a report of both runs; returns the status."""
    out = world / "pages/page.html"
    words = ("report", world / "good", world / "bad", "--cache", fx.ranked_path(), "--count", "1")
    with hostile.unchanged(world, world / "pages"):
        ran = hostile.run(cli, [str(word) for word in (*words, "--out", out)], 60.0)
    hostile.assert_one_line(ran)
    if ran.status:
        return ran.status
    assert out.read_bytes().startswith(report.MARK)
    assert not {"script", "iframe", "object", "link", "base"} & set(Parsed(out.read_text()).tags)
    return 0


@pytest.mark.slow
def test_runs_that_nobody_harmed_make_a_page(world: Path) -> None:
    assert attack(world) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mask", [[], {}, 5, "none"])
def test_a_mask_that_is_none(world: Path, mask: object) -> None:
    path = world / "bad/config.json"
    record = json.loads(path.read_bytes())
    record["config"]["mask"] = mask
    hostile.attack_file(path, st.just(json.dumps(record).encode()), lambda: attack(world), 1)


@pytest.mark.slow
@EXAMPLES
@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_objects(name: str, examples: int, world: Path) -> None:
    path = world / "bad" / name
    drawn = hostile.mutations(json.loads(path.read_bytes())).map(hostile.as_file)
    hostile.attack_file(path, drawn, lambda: attack(world), examples)


@pytest.mark.slow
@EXAMPLES
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_bytes(name: str, examples: int, world: Path) -> None:
    path = world / "bad" / name
    drawn = hostile.raw_bytes(path.read_bytes())
    hostile.attack_file(path, drawn, lambda: attack(world), examples)


@pytest.mark.slow
@EXAMPLES
def test_rows(examples: int, world: Path) -> None:
    path = world / "bad/metrics.jsonl"
    row = json.loads(path.read_bytes().splitlines()[0])
    drawn = st.lists(hostile.mutations(row), min_size=3, max_size=3).map(
        lambda rows: "".join(f"{json.dumps(each)}\n" for each in rows).encode()
    )
    hostile.attack_file(path, drawn, lambda: attack(world), examples)
