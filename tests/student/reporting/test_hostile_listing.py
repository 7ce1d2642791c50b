"""Run folders from an attacker are listed and compared: each command ends well or with one line,
soon, and changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from student.cli import cli
from tests import hostile_json as hostile
from tests import student_fixtures as fx

# few by default, many where minutes are given
EXAMPLES = pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
RESULT: dict[str, Any] = {
    "time": "2026-01-02T03:04:05Z", "run": "r", "protocol": "linear", "test": "val", "n_test": 50,
    "score": 61.5, "interval": [48.0, 74.0], "checkpoint": 2, "recipe": "mae", "ema": False,
    "settings": {"blr": 0.1, "pool": "cls", "images": "train/", "tests": {"val": "val/"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two equal runs of two steps with a result; `bad` is attacked."""
    folder = tmp_path_factory.mktemp("hostile")
    options = ("--cache", str(fx.cache_path()), "--steps", "2", "--batch-size", "8")
    fx.good(fx.train("mae", folder / "good", *options))
    (folder / "good/results.jsonl").write_text(json.dumps(RESULT) + "\n")
    shutil.copytree(folder / "good", folder / "bad")
    return folder


def attack(world: Path) -> None:
    """Run every command over the runs."""
    good, bad = world / "good", world / "bad"
    with hostile.unchanged(world):
        for words in (
            ("runs", world), ("runs", world, "--sort", "linear"), ("runs", world, "--json"),
            ("compare", good, bad), ("compare", bad, good, "--json"),
        ):  # fmt: skip
            ran = hostile.run(cli, [str(word) for word in words])
            hostile.assert_one_line(ran)
            if words[0] == "runs":
                assert ran.status == 0


@EXAMPLES
@pytest.mark.parametrize("name", ["config.json", "environment.json", "results.jsonl"])
def test_objects(name: str, examples: int, world: Path) -> None:
    before = (world / "good" / name).read_bytes()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        value = data.draw(hostile.mutations(json.loads(before)))
        hostile.write(world / "bad" / name, value)
        attack(world)

    attacked()
    (world / "bad" / name).write_bytes(before)


@EXAMPLES
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "results.jsonl"])
def test_bytes(name: str, examples: int, world: Path) -> None:
    before = (world / "good" / name).read_bytes()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
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
    rows = [json.loads(line) for line in before.splitlines()]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        hostile.write(path, data.draw(hostile.mutations(rows[1])))
        path.write_bytes(json.dumps(rows[0]).encode() + b"\n" + path.read_bytes() + b"\n")
        attack(world)

    attacked()
    path.write_bytes(before)
