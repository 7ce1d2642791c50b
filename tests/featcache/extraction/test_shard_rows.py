"""The pictures of a shard where nobody says how many: numbers by hand; caches keep theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.extraction.shard_rows import auto_rows
from featcache.storage import manifest
from tests.student_fixtures import feat, good


@pytest.mark.parametrize(
    ("pictures", "views", "view_bytes", "rows"),
    [
        (1, 1, 1, 64),
        (1024, 1, 1, 64),
        (1025, 1, 1, 65),  # 1025 / 16 = 64.06
        (16384, 1, 1, 1024),
        (1_281_167, 1, 1 << 20, 1024),  # 1024 of 1 MiB are 1 GiB
        (1_281_167, 2, 1 << 20, 512),
        (1_281_167, 1, (1 << 20) + 1, 1023),
        (1_281_167, 64, 1 << 20, 64),  # not the 16 that fill it
        (1_281_167, 1, 0, 1024),
    ],
)
def test_rows_by_hand(pictures: int, views: int, view_bytes: int, rows: int) -> None:
    assert auto_rows(pictures, views, view_bytes) == rows


@given(st.integers(1, 10**9), st.integers(1, 100), st.integers(0, 10**9))
def test_more_never_makes_a_shard_larger_than_it_may_be(n: int, views: int, size: int) -> None:
    rows = auto_rows(n, views, size)
    assert 64 <= rows <= 1024
    assert rows == 64 or rows * views * size <= 1 << 30
    assert auto_rows(n, views + 1, size) <= rows <= auto_rows(n + 1, views, size)


def _extract(photos: Path, home: Path, *words: str) -> str:
    ran = good(
        feat(
            "extract", "--teacher", "synthetic:levels=2,tokens=16,width=8,size=32",
            "--images", str(photos), "--size", "28", "--levels", "all", "--json", *words, home=home,
        )
    )  # fmt: skip
    return str(json.loads(ran.out)["cache"])


def test_a_cache_keeps_the_shards_that_it_was_begun_with(photos: Path, tmp_path: Path) -> None:
    old = Path(_extract(photos, tmp_path, "--rows-per-shard", "5"))
    assert manifest.read(old)["identity"]["rows_per_shard"] == 5
    assert _extract(photos, tmp_path) == str(old)
    assert _extract(photos, tmp_path, "--out", str(old)) == str(old)
    other = Path(_extract(photos, tmp_path, "--seed", "1"))  # another cache
    assert manifest.read(other)["identity"]["rows_per_shard"] == 64
    # one that is damaged is looked at, and no more
    (old / manifest.NAME).write_text("{")
    assert Path(_extract(photos, tmp_path)) not in (old, other)


def test_a_number_that_is_given_counts(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    _extract(photos, tmp_path, "--out", str(out))
    refused = feat(
        "extract", "--teacher", "synthetic:levels=2,tokens=16,width=8,size=32", "--images",
        str(photos), "--size", "28", "--levels", "all", "--out", str(out),
        "--rows-per-shard", "1024", home=tmp_path,
    )  # fmt: skip
    assert "identity.rows_per_shard (layout): 1024 here, 64 there" in refused.line
    wrong = feat("extract", "--images", str(photos), "--rows-per-shard", "few", home=tmp_path)
    assert wrong.status == 2
    with pytest.raises(UserError):
        manifest.read(tmp_path)
