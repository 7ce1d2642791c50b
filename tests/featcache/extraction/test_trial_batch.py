"""A dry run says whether the disk has room, and the hours by the pace of one batch."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from featcache.extraction import trial_batch
from featcache.extraction.trial_batch import BatchTime
from tests.student_fixtures import feat, good

WORDS = (
    "--teacher", "synthetic:levels=2,tokens=16,width=8,size=32", "--size", "28", "--levels", "all",
    "--views", "3", "--batch-size", "4", "--workers", "2", "--dry-run",
)  # fmt: skip


def dry(photos: Path, home: Path, *words: str) -> dict[str, Any]:
    ran = good(feat("extract", "--images", str(photos), *WORDS, *words, "--json", home=home))
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_the_slower_stage_sets_the_pace() -> None:
    assert BatchTime(views=4, decode_s=2.0, teacher_s=1.0).seconds(10) == 5.0
    assert BatchTime(views=4, decode_s=2.0, teacher_s=3.0).seconds(10) == 7.5


def test_space_and_hours(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_batch, "time_batch", lambda *_: BatchTime(4, 2.0, 3.0))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 30))
    found = dry(photos, tmp_path)
    assert (found["free_bytes"], found["fits"]) == (1 << 30, True)
    assert found["new_views"] == 3 * found["new_pictures"] == 3 * found["pictures"]
    assert found["hours"] == pytest.approx(found["new_views"] / 4 * 3 / 3600)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 20))
    assert dry(photos, tmp_path)["fits"] is False
    told = good(feat("extract", "--images", str(photos), *WORDS, home=tmp_path)).out
    assert "DOES NOT FIT into the 1.0 MB" in told
    assert "hours by the pace of one batch" in told
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_batch_is_timed_and_unusable_pictures_are_passed_over(
    photos: Path, tmp_path: Path
) -> None:
    assert dry(photos, tmp_path)["hours"] > 0
    (bad := tmp_path / "bad").mkdir()
    (bad / "text.jpg").write_text("no picture")
    assert dry(bad, tmp_path)["hours"] is None
