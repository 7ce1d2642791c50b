"""Sums of a ledger that was written by hand, with numbers by hand, and lines of strangers."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.catalog import costs
from featcache.console import costs_table
from tests.student_fixtures import feat


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("FEATCACHE_HOME", str(path))
    return path


def write(place: Path, *lines: dict[str, Any] | str) -> None:
    texts = [
        line if isinstance(line, str) else json.dumps({"time": "2026-01-01", **line})
        for line in lines
    ]
    (place / "runs.jsonl").write_text("".join(f"{text}\n" for text in texts))


def train(run: str, **facts: Any) -> dict[str, Any]:
    return {"command": "train", "cache_id": "aa", "run": run, "views_shown": 8, **facts}


BY_HAND: list[dict[str, Any]] = [
    {"command": "extract", "cache_id": "aa", "cache": "/data/one", "wall_s": 100, "device_s": 60.5,
     "bytes_read": 0, "picture_bytes": 500, "bytes_written": 4000, "teacher_s": 60.5,
     "teacher_cost": {"clip": [50.5, 100], "second": [10, 100]}, "outcome": "stopped"},
    {"command": "extract", "cache_id": "aa", "cache": "/data/one", "wall_s": 30, "device_s": 19.5,
     "bytes_read": 0, "picture_bytes": 300, "bytes_written": 1000, "teacher_s": 19.5,
     "teacher_cost": {"clip": [19.5, 40]}},
    {"command": "use", "cache_id": "aa", "run": "/r/1"},
    train("/r/1", wall_s=10, device_s=8, bytes_read=700, teacher_saved_s=5, outcome="stopped"),
    train("/r/1", wall_s=20, device_s=16, bytes_read=1400, teacher_saved_s=15),
    train("/r/2", wall_s=40, device_s=32, bytes_read=2100, teacher_saved_s=20, outcome="failed"),
    train("/r/3", wall_s=1, device_s=0.5, bytes_read=7, teacher_saved_s=None),
    {"command": "train", "recipe": "mae", "run": "/r/online", "wall_s": 7, "teacher_s": 3},
    {"command": "eval knn", "wall_s": 2, "device_s": 1, "picture_bytes": 50, "of_run": "/r/1"},
    {"command": "train", "cache_id": "aa", "run": "/r/old", "loss": 0.5, "stopped": True},
]  # fmt: skip


def test_sums_are_those_by_hand(place: Path) -> None:
    write(place, *BY_HAND)
    found = costs_table.as_json(costs.read())
    of = {(each["cache"], each["command"]): each for each in found["commands"]}
    assert list(of) == [(None, "eval knn"), (None, "train"), ("aa", "extract"), ("aa", "train")]
    extract, runs = of["aa", "extract"], of["aa", "train"]
    assert (extract["lines"], extract["wall_s"], extract["device_s"]) == (2, 130, 80)
    assert (extract["picture_bytes"], extract["bytes_written"]) == (800, 5000)
    assert (extract["teacher_s"], extract["stopped"]) == (80, 1)
    assert (runs["lines"], runs["runs"], runs["stopped"], runs["failed"]) == (5, 4, 1, 1)
    assert (runs["wall_s"], runs["device_s"], runs["bytes_read"]) == (71, 56.5, 4207)
    assert (runs["teacher_saved_s"], runs["saved_unknown"], runs["unknown"]) == (40, 1, 1)
    # 40 s of 80 s, by the two runs that are known to have saved: 20 s each
    assert found["caches"] == [
        {"cache": "aa", "path": "/data/one", "paid_back": 0.5, "paid_back_after_runs": 4.0}
    ]
    assert (found["total"]["lines"], found["total"]["teacher_s"]) == (9, 83)
    assert found["total"]["paid_back_after_runs"] == 4.0  # not of the teacher in the loop
    assert found["passed_over"] == 0


def test_the_table_says_the_same(place: Path) -> None:
    write(place, *BY_HAND)
    lines = feat("ls", "--costs", home=place).out.splitlines()
    rows = [" ".join(line.split()) for line in lines[:6]]
    assert rows[0] == (
        "cache command lines runs wall device read written teacher saved paid back after"
    )
    assert rows[3] == "aa extract 2 130 s 80 s 800 B 5.0 kB 80 s 0 s 4 runs"
    assert rows[4] == "aa train 5 4 71 s 56.5 s 4.2 kB 0 B 0 s 40 s"
    assert rows[5].startswith("total 9 5 210 s ")
    assert lines[6] == "3 lines stopped or failed, with what they cost until then"
    assert lines[7].startswith("1 line of an older version")
    assert lines[8].startswith("1 line of training from a cache of which no ledger here says")


def test_the_example_of_the_guide_is_what_is_printed(place: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/guides/costs.md").read_text()
    (ledger_text,) = re.findall(r"^```json\n(.*?)^```$", page, re.M | re.S)
    (table,) = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    (place / "runs.jsonl").write_text(ledger_text)
    assert feat("ls", "--costs", home=place).out == table


def test_what_a_view_took_is_of_the_extraction_or_of_its_origin(place: Path) -> None:
    more = [
        {"command": "derive", "cache_id": "bb", "from_id": "aa"},
        {"command": "copy", "cache_id": "cc", "from_id": "bb"},
        {"command": "copy", "cache_id": "aa", "from_id": "aa"},
        {"command": "derive", "cache_id": "dd", "from_id": "ee"},
        {"command": "derive", "cache_id": "ee", "from_id": "dd"},
    ]
    write(place, *BY_HAND, *more)
    rates = {"clip": 70 / 140, "second": 10 / 100}
    for cache in ("aa", "bb", "cc"):
        assert costs.seconds_per_view(cache) == pytest.approx(rates)
    assert costs.seconds_per_view("dd") == {}  # a circle
    assert costs.seconds_per_view("unknown") == {}


HOSTILE = (
    {"wall_s": -1},
    {"wall_s": math.nan},
    {"wall_s": math.inf},
    {"wall_s": 1e308},
    {"wall_s": "5"},
    {"wall_s": True},
    {"bytes_read": 10**400},
    {"bytes_read": 2**60},
    {"bytes_read": 1.5},
    {"bytes_written": -1},
    {"teacher_cost": {"clip": [1]}},
    {"teacher_cost": {"clip": [-1, 5]}},
    {"teacher_cost": {"clip": "x"}},
    {"teacher_cost": [1, 2]},
    {"outcome": "perfect"},
    {"user": ["root"]},
    {"from_id": 5},
    {"cache": {"a": 1}},
    {"start": "\x1b[2J"},
    {"command": "eval\x1b[2J"},
    {"pid": -5},
)


@pytest.mark.parametrize("facts", HOSTILE, ids=str)
def test_a_hostile_line_is_passed_over_and_counted(place: Path, facts: dict[str, Any]) -> None:
    bad = json.dumps({"time": "2026-01-01", **train("/r/x"), **facts})
    write(place, train("/r/1", wall_s=10, teacher_saved_s=5), bad, "9" * 5000, "[" * 50_000)
    ran = feat("ls", "--costs", "--json", home=place)
    assert ran.status == 0, ran.err
    assert ran.json["passed_over"] == 3
    assert ran.json["total"]["wall_s"] == 10
    assert "3 lines none of ours, and passed over" in feat("ls", "--costs", home=place).out


def test_a_strangers_words_never_reach_a_terminal(place: Path) -> None:
    evil = "\x1b]0;x\x07\u202e\n"
    write(place, {"command": "train", "cache_id": evil + "z" * 50_000, "run": evil, "user": evil})
    out = feat("ls", "--costs", home=place).out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert max(map(len, out.splitlines())) < 250


def test_no_ledger_is_said(place: Path) -> None:
    assert feat("ls", "--costs", home=place).out.startswith("no run ledger below")
    assert feat("ls", "--costs", "--json", home=place).json["commands"] == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 2**40),
            st.floats(0, 1e9),
            st.floats(0, 1e9),
        ),
        max_size=20,
    )
)
@settings(max_examples=30)
def test_a_run_in_parts_sums_to_the_whole(parts: list[tuple[str, int, float, float]]) -> None:
    """However often runs were resumed, and in whatever order their lines stand."""
    one = costs.Cost()
    for run, count, wall, saved in parts:
        one.add({"run": run, "bytes_read": count, "wall_s": wall, "teacher_saved_s": saved})
    assert one.lines == len(parts)
    assert len(one.runs) == len({run for run, *_ in parts})
    assert one.sums["bytes_read"] == sum(count for _, count, _, _ in parts)
    exact = float(sum(Fraction(wall) for _, _, wall, _ in parts))
    assert one.sums["wall_s"] == pytest.approx(exact, rel=1e-12)


def test_a_line_that_saved_and_names_no_run_pays_back_after_nobody_knows_how_many() -> None:
    made, trained = costs.Cost(), costs.Cost()
    made.add({"teacher_s": 30.0})
    trained.add({"teacher_saved_s": 15.0})
    assert costs.payback([made, trained]) == {"paid_back": 0.5, "paid_back_after_runs": None}
