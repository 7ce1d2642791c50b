"""What a table tells, from numbers written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.ablate import report
from pipelines.ablate.folder import Folder
from pipelines.ablate.plan import Job
from pipelines.ablate.scales import DIGITS
from pipelines.ablate.table import Column, Ordering, Row, Table

TABLE = Table(
    title="Two students",
    rows=(Row("teacher", "the teacher"), Row("mae", "mae student", recipe="mae")),
    columns=(Column("knn", "k-NN", "knn", "cls"), Column("lin", "linear", "linear", "cls")),
    orderings=(
        Ordering("teacher", "mae", "knn", "a book"),
        Ordering("teacher", "mae", "lin", "a letter"),
        Ordering("mae", "teacher", "knn", "hearsay"),
    ),
    notes=("A note.",),
)
MAKER = {"cores": 2, "device": "a CPU", "torch": "2.11", "commit": "abc"}


def found(*seeds: tuple[float, float, float, float]) -> dict[str, Any]:
    """Of each seed: the teacher's k-NN and linear, then the student's."""
    scores = {
        seed: {"teacher": {"knn": a, "lin": b}, "mae": {"knn": c, "lin": d}}
        for seed, (a, b, c, d) in enumerate(seeds)
    }
    parts = {"data": 100.0, "teacher evals": 6.0, "extract": 13.0, "train mae": 50.0}
    seconds = {seed: {**parts, "mae evals": 8.0 + seed} for seed in scores}
    return {"scores": scores, "seconds": seconds, "made_by": [MAKER], "results": {}, "went_on": []}


def test_the_table_of_two_seeds() -> None:
    text = report.text(TABLE, DIGITS, found((90.0, 80.0, 70.0, 81.0), (92.0, 82.0, 70.0, 80.0)))
    assert text.splitlines()[:12] == [
        "# Two students: 397 held-out digits",
        "",
        "Top-1 in per cent.",
        "",
        "|             |       k-NN |     linear | train s | evals s |",
        "| ----------- | ---------: | ---------: | ------: | ------: |",
        "| the teacher | 91.0 ± 1.4 | 81.0 ± 1.4 |     100 |       6 |",
        "| mae student | 70.0 ± 0.0 | 80.5 ± 0.7 |      50 |       8 |",
        "",
        "- teacher above mae by k-NN: holds, +21.0 ± 1.4 points (in 2 of 2 seeds). "
        "Expected: a book",
        "- teacher above mae by linear: is undecided, +0.5 ± 2.1 points (in 1 of 2 seeds). "
        "Expected: a letter",
        "- mae above teacher by k-NN: does not hold, -21.0 ± 1.4 points (in 0 of 2 seeds). "
        "Expected: hearsay",
    ]
    assert "95 %" not in text
    assert "A note.\nSeeds 0, 1 (full length): the teacher 20 epochs" in text
    assert "355 s in all; 2 cores (a CPU), torch 2.11, commit abc." in text
    assert "with the standard deviation of one seed" in text


def test_one_seed_has_no_spread_and_equal_is_not_above() -> None:
    text = report.text(TABLE, DIGITS.reduced(), found((90.0, 80.0, 70.0, 80.0)))
    assert "| mae student | 70.0 |   80.0 |" in text
    assert "- teacher above mae by linear: does not hold, +0.0 points (of one seed)" in text
    assert "Seeds 0 (reduced: too short to mean much)" in text
    assert "standard deviation" not in text
    assert "Stopped" not in text
    stopped = {**found((90.0, 80.0, 70.0, 80.0)), "went_on": ["seed-0/runs/mae"]}
    told = report.text(TABLE, DIGITS, stopped)
    assert "so that only the last part was timed: seed-0/runs/mae." in told


def test_the_mean_interval_is_told() -> None:
    known = found((90.0, 80.0, 70.0, 80.0))
    known["results"] = {
        0: {"mae": {"knn": {"interval": [68.0, 74.0]}, "lin": {"interval": [75.0, 85.0]}}}
    }
    assert "One score has a 95 % interval of ± 4.0 points" in report.text(TABLE, DIGITS, known)


def test_facts_hold_the_points_of_each_seed() -> None:
    facts = report.facts(TABLE, DIGITS, found((90.0, 80.0, 70.0, 81.0), (92.0, 82.0, 70.5, 80.0)))
    assert [each["points"] for each in facts["orderings"]] == [
        [20.0, 21.5], [-1.0, 2.0], [-20.0, -21.5],
    ]  # fmt: skip
    assert facts["scale"]["epochs"] == DIGITS.epochs
    assert facts["scores"][1]["mae"] == {"knn": 70.5, "lin": 80.0}


def test_what_is_done_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(name: str, makes: Path | None, row: str = "", column: str = "") -> Job:
        kind = "train mae" if row and makes else name
        return Job(name, kind, (name,), (), tmp_path / "p", makes, row=row, column=column)

    jobs = [
        job("data", tmp_path), job("run", tmp_path, "mae"), job("a", None, "mae", "knn"),
        job("b", None, "mae", "lin"), job("c", None, "teacher", "knn"),
    ]  # fmt: skip
    records: dict[str, Any] = {
        "data": {"seconds": 100.0, "result": None},
        "run": {"seconds": 50.0, "went_on": True, "result": None},
        "a": {"seconds": 3.0, "made_by": {**MAKER, "commit": "def"}, "result": {"top1": 60.0}},
        "b": {"seconds": 4.0, "result": {"top1": 61.0, "top5": 99.0}},
    }
    usual = {"made_by": MAKER, "went_on": False}
    records = {name: {**usual, **record} for name, record in records.items()}
    monkeypatch.setattr(Folder, "result", lambda self, job: records.get(job.name))
    got = report.collect(Folder(tmp_path, jobs), [0])
    assert got["scores"] == {0: {"mae": {"knn": 60.0, "lin": 61.0}}}
    assert got["results"][0]["mae"]["lin"] == {"top1": 61.0, "top5": 99.0}
    assert got["seconds"] == {0: {"data": 100.0, "train mae": 50.0, "mae evals": 7.0}}
    assert [each["commit"] for each in got["made_by"]] == ["abc", "def"]
    assert got["went_on"] == ["run"]
    assert report.collect(Folder(tmp_path, jobs), [1])["scores"] == {}
