"""Results are appended where a run and the home can be written, and read back from anybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from student.features import results

FACTS: dict[str, Any] = {
    "eval": "linear",
    "of": "/runs/a",
    "recipe": "mae",
    "checkpoint": 20,
    "settings": {"pool": "cls", "blr": "0.1"},
    "seconds": 1.5,
    "commit": "abc",
    "tests": {
        "val": {"top1": 81.0, "interval": [79.0, 83.0], "top5": 95.0, "n_test": 100,
                "per_class": {"x": {"top1": 81.0, "pictures": 100}}},
        "ood": {"top1": 40.5, "interval": [30.0, 50.0], "n_test": 7, "per_class": {}},
    },
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_line_for_each_test_set_in_both_places(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    head = {"linear.weight": torch.arange(6.0).reshape(2, 3).T}
    path = results.record(run, FACTS, head)
    lines = (run / "results.jsonl").read_text().splitlines()
    assert (home / "results.jsonl").read_text().splitlines() == lines
    rows = [json.loads(line) for line in lines]
    assert [row.pop("time")[:2] for row in rows] == ["20", "20"]
    shared = {
        "protocol": "linear", "run": "/runs/a", "recipe": "mae", "checkpoint": 20,
        "settings": {"pool": "cls", "blr": "0.1"}, "seconds": 1.5, "commit": "abc",
    }  # fmt: skip
    assert rows == [
        {**shared, "test": "val", "score": 81.0, "interval": [79.0, 83.0], "top5": 95.0,
         "n_test": 100},
        {**shared, "test": "ood", "score": 40.5, "interval": [30.0, 50.0], "n_test": 7},
    ]  # fmt: skip
    assert torch.equal(load_file(path)["linear.weight"], head["linear.weight"])
    assert json.loads(Path(path).with_suffix(".json").read_text()) == FACTS
    # the same again: one more line, the same files; other settings: other files
    assert results.record(run, FACTS, head) == path
    other = results.record(run, {**FACTS, "checkpoint": 30}, head)
    assert other != path
    assert len(results.read(run)) == 6


def test_a_teacher_has_its_results_at_home(home: Path) -> None:
    assert results.record(None, FACTS, None) == ""
    assert len(results.read(home)) == 2
    assert len(list((home / "evals").glob("linear-*.json"))) == 1


@pytest.mark.parametrize("name", ["results.jsonl", "evals"])
def test_links_are_not_written_through(
    name: str, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    target.mkdir() if name == "evals" else target.write_text("mine\n")
    (run / name).symlink_to(target)
    results.record(run, FACTS, {"w": torch.zeros(1)})
    assert "not written" in caplog.text
    assert list(target.iterdir()) == [] if name == "evals" else target.read_text() == "mine\n"
    assert len(results.read(home)) == 2


def test_a_run_that_cannot_be_written_costs_a_note(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    run.write_text("no folder")
    assert results.record(run, FACTS, {"w": torch.zeros(1)}) == ""
    assert "the result is not written" in caplog.text
    assert len(results.read(home)) == 2


def test_lines_of_others_are_passed_over(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    results.record(run, FACTS, None)
    bad = [
        b"", b"{", b"[1]", b'{"protocol": 1}', b'{"protocol": "knn", "score": "90"}', b"\xff\xfe",
        b'{"protocol": "knn", "score": 101, "interval": [1, 2], "settings": {}}',
        b'{"protocol": "knn", "score": 50, "interval": [1, NaN], "settings": {}}',
        b'{"protocol": "knn", "score": 50, "interval": 3, "settings": {}}',
        b'{"protocol": "knn", "score": 50, "interval": [1, 2], "settings": []}',
        b'{"a":' * 100_000,
    ]  # fmt: skip
    with (run / "results.jsonl").open("ab") as file:
        file.write(b"\n".join(bad) + b"\n")
    assert [row["test"] for row in results.read(run)] == ["val", "ood"]
    assert f"{len(bad)} lines of" in caplog.text
    assert results.read(tmp_path / "nowhere") == []
