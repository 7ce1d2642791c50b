"""metrics.jsonl holds one object a step, with late values and numbers that are not finite, and is
cut before a run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featcache.storage import owner
from student.training import metrics
from student.training.metrics import Metrics


def lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_one_object_a_line_at_once(tmp_path: Path) -> None:
    log = Metrics(tmp_path)
    done = log.add({"step": 1, "loss": torch.tensor(0.5), "lr": 1e-3})
    assert done == [{"step": 1, "loss": 0.5, "lr": 1e-3}]
    # on disk before the next step
    assert lines(tmp_path) == ['{"step": 1, "loss": 0.5, "lr": 0.001}']
    log.close()
    assert metrics.read(tmp_path) == [{"step": 1, "loss": 0.5, "lr": 0.001}]


def test_values_may_come_later(tmp_path: Path) -> None:
    log = Metrics(tmp_path, lag=2)
    seen = [
        [row["step"] for row in log.add({"step": step, "loss": torch.tensor(1.0)})]
        for step in range(1, 6)
    ]
    assert seen == [[], [], [1], [2], [3]]
    assert [row["step"] for row in log.flush()] == [4, 5]
    log.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]


def test_closing_writes_what_waits(tmp_path: Path) -> None:
    log = Metrics(tmp_path, lag=10)
    log.add({"step": 1, "loss": torch.tensor(1.0)})
    log.close()
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")]
)
def test_what_json_has_no_number_for_is_text(value: float, text: str, tmp_path: Path) -> None:
    log = Metrics(tmp_path)
    log.add({"step": 1, "loss": torch.tensor(value)})
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(lines(tmp_path)[0], parse_constant=refuse)["loss"] == text


def test_rows_are_appended(tmp_path: Path) -> None:
    for step in (1, 2):
        log = Metrics(tmp_path)
        log.add({"step": step})
        log.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]


def test_cut_drops_later_rows_and_the_torn_last_line(tmp_path: Path) -> None:
    rows = "".join(f'{{"step": {step}}}\n' for step in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 8, "lo')
    metrics.cut(tmp_path, 5)
    assert lines(tmp_path) == [f'{{"step": {step}}}' for step in range(1, 6)]
    metrics.cut(tmp_path, 0)
    assert lines(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_a_killed_cut_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    host = owner.writer_id().rpartition("-")[0].rpartition("-")[0]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".metrics.jsonl.{host}-{ended.pid}-1x00000000.tmp").write_text("{}")
    kept = {f".metrics.jsonl.{owner.writer_id()}.tmp", ".notes.tmp", "metrics.jsonl"}
    for name in kept:
        (tmp_path / name).write_text("")
    metrics.cut(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_no_file_is_no_row(tmp_path: Path) -> None:
    metrics.cut(tmp_path, 3)
    assert metrics.read(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
