"""`--log-file` holds what stderr gets, with times, and stands beside a bar at a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from featcache.console import log_file, text
from featcache.console.progress_bar import ProgressBar
from tests import student_fixtures as fx

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "


@pytest.fixture(autouse=True)
def _no_log_after() -> Iterator[None]:
    yield
    text.copy_lines_to(None)


def lines(path: Path) -> list[str]:
    """The lines of a log without their times, which all have."""
    found = path.read_text().splitlines()
    assert all(re.match(STAMP, line) for line in found)
    return [re.sub(STAMP, "", line) for line in found]


def extract(log: Path, out: Path, *words: object) -> fx.Ran:
    given = ("--teacher", fx.TEACHER, "--images", fx.pictures(), "--size", "32", "--out", out)
    return fx.feat("extract", *map(str, (*given, "--log-file", log, *words)))


def test_a_command_appends_what_stderr_gets(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("2026-01-01T00:00:00Z of an earlier run, cut off")
    ran = fx.good(extract(log, tmp_path / "cache", "--levels", "last:1"))
    first, command, *rest = lines(log)
    assert first == "of an earlier run, cut off"
    assert command.startswith("$ ")
    assert command.endswith(" extract")
    assert rest == [line for line in ran.err.splitlines() if line]


def test_nothing_is_logged_by_the_next_command(tmp_path: Path) -> None:
    fx.good(extract(tmp_path / "log", tmp_path / "one", "--levels", "last:1"))
    before = (tmp_path / "log").read_bytes()
    words = (
        "--teacher",
        fx.TEACHER,
        "--images",
        fx.pictures(),
        "--size",
        "32",
        "--levels",
        "last:1",
    )
    fx.good(fx.feat("extract", *map(str, words), "--out", str(tmp_path / "two")))
    text.say("later")
    assert (tmp_path / "log").read_bytes() == before


def test_a_training_logs_notes_and_control_characters_are_escaped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--cache", fx.cache_path(), "--steps", 1, "--batch-size", 8, "--log-file", log)
    fx.good(fx.train("maskalign", tmp_path / "run", *options))
    assert any(line.startswith("recipe maskalign: ") for line in lines(log))
    text.copy_lines_to(log_file.LogFile(log))
    text.say("a\x1b[2Jb\nsecond line")
    assert lines(log)[-2:] == ["a\\x1b[2Jb", "second line"]


def test_processes_that_are_not_the_first_write_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    extract(tmp_path / "log", tmp_path / "cache", "--levels", "last:1")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("kind", ["link", "folder", "absent folder", "pipe"])
def test_what_is_no_file_is_refused_before_the_work(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    if kind == "link":
        (tmp_path / "mine").write_text("mine")
        path.symlink_to(tmp_path / "mine")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = tmp_path / "none/log"
    ran = extract(path, tmp_path / "cache")
    assert ran.status == 1
    assert "--log-file" in ran.line
    assert not (tmp_path / "cache").exists()
    assert kind != "link" or (tmp_path / "mine").read_text() == "mine"


def test_a_log_that_cannot_be_written_any_more_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text.copy_lines_to(log_file.LogFile(tmp_path / "none/log"))
    text.say("one")
    text.say("two")
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if not line.startswith("note: --log-file")] == ["one", "two"]
    assert len(told) == 3


def test_at_a_terminal_the_log_has_lines_beside_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = iter([100.0, 100.0, 131.0, 131.0])
    text.copy_lines_to(log_file.LogFile(tmp_path / "log"))
    with monkeypatch.context() as patch:
        patch.setattr("featcache.console.progress_bar.time.monotonic", lambda: next(clock, 131.0))
        bar = ProgressBar("verify", "shards")
        bar(1, 8)
        bar(2, 8)
        bar.close()
    assert lines(tmp_path / "log") == ["verify: 2 of 8 shards, 0.1 shards/s, ETA 00:01:33"]
    assert "verify: 2 of 8" not in capsys.readouterr().err
