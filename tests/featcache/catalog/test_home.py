"""The home: where caches are found, and the ledger of runs, which nothing may stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from featcache.catalog import home, ledger


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "deep/home"))
    return tmp_path / "deep/home"


def test_the_home_is_the_variables_or_caches(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    assert home.home() == place
    for unset in ("", None):
        monkeypatch.setenv("FEATCACHE_HOME", "") if unset == "" else monkeypatch.delenv(
            "FEATCACHE_HOME"
        )
        assert home.home() == Path("caches")


def test_caches_are_folders_with_a_manifest(place: Path) -> None:
    assert home.caches() == []
    for name in ("b", "a", "no"):
        (place / name).mkdir(parents=True)
    for name in ("b", "a"):
        (place / name / "manifest.json").touch()
    assert home.caches() == [place / "a", place / "b"]


def test_runs_come_back_in_order_and_only_of_that_cache(place: Path) -> None:
    assert ledger.runs_of("c1") == []
    ledger.log_run(command="extract", cache_id="c1", cache=Path("x"))
    for i, cache_id in enumerate(["c1", "c2", "c1"]):
        ledger.log_run(command="train", recipe="mae", cache_id=cache_id, run=f"r{i}")
    assert [run["run"] for run in ledger.runs_of("c1")] == ["r0", "r2"]
    assert [run["run"] for run in ledger.runs_of("c2")] == ["r1"]
    assert ledger.runs_of("c") == []
    assert all(run["time"].endswith("Z") for run in ledger.runs_of("c1"))
    assert len((place / "runs.jsonl").read_text().splitlines()) == 4


def test_lines_that_cannot_be_read_are_passed_over(place: Path) -> None:
    """A process that died while it wrote, another's line, bytes that are no text."""
    ledger.log_run(command="train", cache_id="c1", run="r0")
    with (place / "runs.jsonl").open("ab") as file:
        file.write(
            b'{"command": "train", "cache_id": "c1", "ru\n"c1"\n["c1"]\n\xff\xfe c1\n'
            b'{"note": "c1"}\n'
        )
    ledger.log_run(command="train", cache_id="c1", run="r1")
    assert [run["run"] for run in ledger.runs_of("c1")] == ["r0", "r1"]


LINES = (
    "null",
    "[]",
    "3",
    '"train"',
    '{"command": "train", "cache_id": "c1"}',
    '{"time": 5, "command": "train", "cache_id": "c1"}',
    '{"time": "2026", "command": ["train"], "cache_id": "c1"}',
    '{"time": "2026", "command": "train", "cache_id": {"c1": 1}}',
    '{"time": "2026", "command": "train", "cache_id": "c1", "recipe": 5}',
    '{"time": "2026", "command": "train", "cache_id": "c1", "run": ["a"]}',
    '{"time": "\x1b[2J", "command": "train", "cache_id": "c1"}',
    "[" * 100_000,
    "1" * 5000,
    "x" * (3 << 20),
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:30])
def test_a_line_of_others_is_passed_over_and_counted_once(
    place: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.log_run(command="train", cache_id="c1", run="r0")
    with (place / "runs.jsonl").open("a") as file:
        file.write(line + "\n")
    for _ in range(2):
        assert [run["run"] for run in ledger.runs_of("c1")] == ["r0"]
        assert ledger.runs_of("c2") == []
    assert len(caplog.messages) == 1
    assert "none of ours" in caplog.messages[0]


def test_a_ledger_that_is_a_pipe_is_not_waited_for(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.mkdir(parents=True)
    os.mkfifo(place / "runs.jsonl")
    assert ledger.runs_of("c1") == []
    ledger.log_run(command="train", cache_id="c1")
    assert "cannot be read" in caplog.messages[0]
    assert "cannot be written" in caplog.messages[1]


def test_a_home_that_cannot_be_written_is_told_and_stops_nothing(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.parent.mkdir()
    place.write_text("a file")
    ledger.log_run(command="train")
    (note,) = caplog.messages
    assert note == f"the run ledger {str(place / 'runs.jsonl')!r} cannot be written: File exists"
    assert ledger.runs_of("c1") == []


def test_a_line_is_one_line_of_json(place: Path) -> None:
    ledger.log_run(command="train", cache=Path("a b"), text="two\nlines")
    lines = (place / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["cache"] == "a b"
