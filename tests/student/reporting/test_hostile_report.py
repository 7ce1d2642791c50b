"""Run folders from an attacker on a page: the command ends well or with one line, soon, runs
nothing, and changes nothing but the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from student.cli import cli
from student.reporting import report
from tests import hostile_json as hostile
from tests import student_fixtures as fx
from tests.featcache.drawing.test_page import Parsed

# few by default, many where minutes are given
EXAMPLES = pytest.mark.parametrize("examples", [6, pytest.param(200, marks=pytest.mark.slow)])
CHECKS = list(HealthCheck)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and its copy that is attacked."""
    folder = tmp_path_factory.mktemp("hostile-report")
    options = ("--cache", fx.ranked_path(), "--steps", "2", "--batch-size", "8")
    fx.good(fx.train("mralign", folder / "good", *options))
    shutil.copytree(folder / "good", folder / "bad")
    (folder / "pages").mkdir()
    return folder


def attack(world: Path) -> None:
    out = world / "pages/page.html"
    words = ("report", world / "good", world / "bad", "--cache", fx.ranked_path(), "--count", "1")
    with hostile.unchanged(world, world / "pages"):
        ran = hostile.run(cli, [str(word) for word in (*words, "--out", out)], 60.0)
    hostile.assert_one_line(ran)
    if ran.status:
        return
    assert out.read_bytes().startswith(report.MARK)
    assert not {"script", "iframe", "object", "link", "base"} & set(Parsed(out.read_text()).tags)


@EXAMPLES
@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_objects(name: str, examples: int, world: Path) -> None:
    before = (world / "good" / name).read_bytes()

    @settings(max_examples=examples, suppress_health_check=CHECKS, deadline=None)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        hostile.write(world / "bad" / name, data.draw(hostile.mutations(json.loads(before))))
        attack(world)

    attacked()
    (world / "bad" / name).write_bytes(before)


@EXAMPLES
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_bytes(name: str, examples: int, world: Path) -> None:
    before = (world / "good" / name).read_bytes()

    @settings(max_examples=examples, suppress_health_check=CHECKS, deadline=None)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        (world / "bad" / name).write_bytes(data.draw(hostile.raw_bytes(before)))
        attack(world)

    attacked()
    (world / "bad" / name).write_bytes(before)


@EXAMPLES
def test_rows(examples: int, world: Path) -> None:
    path = world / "bad/metrics.jsonl"
    before = path.read_bytes()
    row = json.loads(before.splitlines()[0])

    @settings(max_examples=examples, suppress_health_check=CHECKS, deadline=None)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        rows = [data.draw(hostile.mutations(row)) for _ in range(3)]
        path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        attack(world)

    attacked()
    path.write_bytes(before)
