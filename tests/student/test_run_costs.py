"""Extraction, training and evaluation leave lines in the ledger whose counts are exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.catalog import costs
from featcache.catalog.kept_features import DATA
from featcache.extraction.progress import ExtractProgress
from featcache.reading.cache import Cache
from featcache.runtime.device_clock import Seconds
from student.recipes import TargetSpec
from student.setup import run_cost
from student.targets.cached import CachedTargets
from student.training import preemption
from tests import student_fixtures as fx

VIEWS = 3 * 24  # stored: 24 pictures x 3 views


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def cache(home: Path) -> Path:
    return fx.extract(fx.pictures(), home / "one", home=home)


def lines(home: Path, *commands: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (home / "runs.jsonl").read_text().splitlines()]
    return [line for line in found if not commands or line["command"] in commands]


def files_of(cache: Path) -> int:
    """Sum the sizes of the files of all shards, as they lie on the disk."""
    return sum(
        path.stat().st_size
        for folder in (cache / "shards").iterdir()
        if folder.is_dir()
        for path in folder.rglob("*")
        if path.is_file()
    )


def picture_bytes() -> int:
    return sum(path.stat().st_size for path in fx.pictures().glob("*.png"))


def test_an_extraction_is_counted_to_the_byte(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []

    def add(progress: ExtractProgress, stage: str, seconds: float) -> None:
        spent.extend([seconds] if stage == "teacher" else [])

    monkeypatch.setattr(ExtractProgress, "add", add)
    cache = fx.extract(fx.pictures(), home / "one", home=home)
    (line,) = lines(home)
    assert (line["command"], line["outcome"], line["device"]) == ("extract", "done", "cpu")
    assert line["bytes_written"] == files_of(cache)
    assert line["picture_bytes"] == picture_bytes()
    assert line["bytes_read"] == 0
    ((seconds, views),) = line["teacher_cost"].values()
    assert views == VIEWS
    assert seconds == pytest.approx(sum(spent), abs=1e-5)
    assert line["teacher_s"] == line["device_s"] == pytest.approx(seconds, abs=1e-5)
    with Cache(cache) as opened:
        assert line["cache_id"] == opened.manifest["id"]


def test_an_extraction_that_is_complete_costs_nothing_more(home: Path, cache: Path) -> None:
    fx.extract(fx.pictures(), cache, home=home)
    again = lines(home)[1]
    assert (again["bytes_written"], again["teacher_s"], again["picture_bytes"]) == (0, 0, 0)
    assert costs.read().total.sums["bytes_written"] == files_of(cache)


@pytest.mark.slow
def test_several_processes_are_one_line(home: Path) -> None:
    """A process of its own, as `--devices` starts it, hands its counts over."""
    words = [
        sys.executable,
        "-m",
        "featcache",
        "extract",
        "--teacher",
        fx.TEACHER,
        "--images",
        str(fx.pictures()),
    ]
    words += [
        "--size",
        "32",
        "--levels",
        "last:1",
        "--rows-per-shard",
        "4",
        "--out",
        str(home / "two"),
        "--devices",
        "cpu,cpu",
    ]
    subprocess.run(words, env=fx.environment(home), check=True, capture_output=True)
    (line,) = lines(home)
    assert (line["processes"], line["counted"]) == (2, 2)
    ((_, views),) = line["teacher_cost"].values()
    assert views == 24
    assert line["bytes_written"] == files_of(home / "two")
    # Both may read ahead into a shard that only one of them then gets.
    assert picture_bytes() <= line["picture_bytes"] <= 2 * picture_bytes()


def test_copies_and_derived_caches_are_counted(home: Path, cache: Path) -> None:
    fx.good(fx.feat("copy", str(cache), str(home / "copy"), home=home))
    fx.good(fx.feat("derive", str(cache), str(home / "small"), "--views", "1", home=home))
    copied, derived = lines(home, "copy", "derive")
    assert copied["bytes_read"] == copied["bytes_written"] == files_of(cache)
    assert copied["device_s"] is None
    assert derived["bytes_written"] == files_of(home / "small")
    assert derived["from_id"] == copied["from_id"] == copied["cache_id"] != derived["cache_id"]
    assert derived["bytes_read"] > 0
    # no teacher ran for it; what a view took is its origin's
    assert derived["teacher_s"] == 0
    rates = [costs.seconds_per_view(each["cache_id"]) for each in (copied, derived)]
    assert rates[0] == rates[1] != {}


def test_a_repair_is_counted(home: Path, cache: Path) -> None:
    for path in (cache / "shards/000000.zarr").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    fx.good(fx.feat("repair", str(cache), home=home))
    (line,) = lines(home, "repair")
    assert line["bytes_written"] == files_of(cache)
    ((seconds, views),) = line["teacher_cost"].values()
    assert (views, seconds > 0) == (VIEWS, True)


def bytes_of_a_view(cache: Path) -> int:
    """What kd reads of a view with all checks off: its level, crop box, flip and jitter."""
    with Cache(cache) as opened:
        shape = opened.read([0], 0, ("features",), [4])["features"].nbytes
        return shape + sum(
            opened.read([0], 0, (name,))[name].nbytes for name in ("crop", "flip", "jitter")
        )


OPTIONS = ("--batch-size", "8", "--steps", "6", "--save-every", "2")


def test_training_is_counted_and_what_it_saved(home: Path, cache: Path, tmp_path: Path) -> None:
    fx.good(fx.train("kd", tmp_path / "run", "--cache", cache, *OPTIONS, home=home))
    use, line = lines(home, "use", "train")
    assert (use["command"], use["cache_id"], use["run"]) == ("use", line["cache_id"], line["run"])
    assert (line["outcome"], line["views_shown"], line["step"]) == ("done", 48, 6)
    # six batches of eight of 24 pictures: every picture is shown twice
    assert line["picture_bytes"] >= 2 * picture_bytes()
    assert line["bytes_read"] >= 48 * bytes_of_a_view(cache)
    checkpoints = sum(each.stat().st_size for each in (tmp_path / "run/checkpoints").glob("*.pt"))
    assert line["bytes_written"] >= checkpoints > 0
    assert 0 < line["device_s"] <= line["wall_s"]
    assert line["teacher_s"] == 0
    (extract,) = lines(home, "extract")
    assert line["teacher_saved_s"] == pytest.approx(48 / VIEWS * extract["teacher_s"], rel=1e-3)


@pytest.mark.slow
def test_a_run_in_parts_counts_each_part_once(
    home: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(self: preemption.StopNotice) -> bool:
        self.asked = "SIGTERM"
        return True

    def train(*options: str) -> int:
        given = ("--cache", cache, *OPTIONS, *options)
        return fx.train("kd", tmp_path / "run", *given, home=home).status

    with monkeypatch.context() as patch:
        patch.setattr(preemption.StopNotice, "due", stops)
        assert [train("--resume") for _ in range(5)] == [75] * 5
    assert train("--resume") == 0
    parts = lines(home, "train")
    assert [line["views_shown"] for line in parts] == [8] * 6
    assert [line["outcome"] for line in parts] == ["stopped"] * 5 + ["done"]
    found = costs.read().by_command[parts[0]["cache_id"], "train"]
    assert (found.lines, found.stopped, len(found.runs)) == (6, 5, 1)
    fx.good(fx.train("kd", tmp_path / "whole", "--cache", cache, *OPTIONS, home=home))
    whole = lines(home, "train")[-1]
    assert found.sums["teacher_saved_s"] == pytest.approx(whole["teacher_saved_s"], rel=1e-3)


def test_what_a_cache_of_unknown_cost_saved_is_null(home: Path, tmp_path: Path) -> None:
    fx.good(fx.train("kd", tmp_path / "run", "--cache", fx.cache_path(), *OPTIONS, home=home))
    (line,) = lines(home, "train")
    assert line["teacher_saved_s"] is None
    assert "what they saved is not known" in fx.feat("ls", "--costs", home=home).out


def test_a_teacher_in_the_loop_is_spent_and_saves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which each forward pass takes a quarter of a second."""
    monkeypatch.setattr("student.targets.online.StepClock.seconds", lambda clock: Seconds(0.25))
    options = ("--teacher", "online", "--cache", fx.cache_path(), "--images", fx.pictures())
    fx.good(fx.train("kd", tmp_path / "run", *options, *OPTIONS, home=home))
    (line,) = lines(home, "train")
    ((seconds, views),) = line["teacher_cost"].values()
    assert views == line["views_shown"] == 48
    assert seconds == line["teacher_s"] == 6 * 0.25  # steps
    assert line["teacher_saved_s"] == 0


def test_a_failed_run_leaves_its_line(home: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("no JSON")
    words = ("--cache", cache, *OPTIONS, "--resume")
    assert fx.train("kd", tmp_path / "run", *words, home=home).status == 1
    (line,) = lines(home, "train")
    assert (line["outcome"], line["views_shown"]) == ("failed", 0)


@pytest.mark.slow
def test_evaluations_are_counted_and_kept_features_cost_no_picture(
    home: Path, tmp_path: Path
) -> None:
    fx.good(fx.train("kd", tmp_path / "run", "--cache", fx.cache_path(), *OPTIONS, home=home))
    labelled = fx.save_pictures(tmp_path / "labelled", count=12, classes=3)
    size = sum(path.stat().st_size for path in labelled.rglob("*.png"))
    for _ in range(2):
        words = ("eval", "knn", tmp_path / "run", "--images", labelled, "--k", "2")
        fx.good(fx.stud(*words, "--device", "cpu", home=home))
    first, again = lines(home, "eval knn")
    assert (first["picture_bytes"], again["picture_bytes"]) == (size, 0)
    assert first["device_s"] > 0
    kept = sum(path.stat().st_size for path in (home / "features").rglob(DATA))
    assert first["bytes_written"] == kept > 0
    assert (first["outcome"], first["of_run"]) == ("done", str(tmp_path / "run"))
    out = tmp_path / "x.npy"
    embed = ("embed", tmp_path / "run", "--images", labelled, "-o", out, "--no-keep")
    fx.good(fx.stud(*embed, "--device", "cpu", home=home))
    (line,) = lines(home, "embed")
    assert (line["picture_bytes"], line["pictures"]) == (size, 12)


def test_a_recipe_that_takes_no_teacher_from_its_cache_saves_none() -> None:
    with fx.open_cache() as cache:
        own = cache.teachers[0]
        for fields, names in (((), set()), (("attention",), {own}), (("features",), {own})):
            spec = TargetSpec(teacher=own, levels=(4,), fields=fields, patches=16)
            targets = CachedTargets(cache, spec, np.zeros(0, np.int64))
            assert run_cost.cached_teachers(targets) == names
