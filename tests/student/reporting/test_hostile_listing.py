"""Run folders from an attacker are listed and compared: each command ends well or with one line,
soon, and changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from student.cli import cli
from tests import hostile_json as hostile
from tests import student_fixtures as fx

# few by default, many where minutes are given
EXAMPLES = pytest.mark.parametrize("examples", [5, pytest.param(40, marks=pytest.mark.slow)])
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


def test_runs_that_nobody_harmed_are_compared(world: Path) -> None:
    ran = hostile.run(cli, ["compare", str(world / "good"), str(world / "bad")])
    assert (ran.status, "no setting differs" in ran.out) == (0, True)


@pytest.mark.slow_after(1)
@EXAMPLES
@pytest.mark.parametrize("name", ["config.json", "environment.json", "results.jsonl"])
def test_objects(name: str, examples: int, world: Path) -> None:
    path = world / "bad" / name
    drawn = hostile.mutations(json.loads(path.read_bytes())).map(hostile.as_file)
    hostile.attack_file(path, drawn, lambda: attack(world), examples)


@pytest.mark.slow_after(1)
@EXAMPLES
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "results.jsonl"])
def test_bytes(name: str, examples: int, world: Path) -> None:
    path = world / "bad" / name
    drawn = hostile.raw_bytes(path.read_bytes())
    hostile.attack_file(path, drawn, lambda: attack(world), examples)


@EXAMPLES
def test_rows(examples: int, world: Path) -> None:
    path = world / "bad/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    first = json.dumps(rows[0]).encode()
    drawn = hostile.mutations(rows[1]).map(lambda row: first + b"\n" + hostile.as_file(row) + b"\n")
    hostile.attack_file(path, drawn, lambda: attack(world), examples)
