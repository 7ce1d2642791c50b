"""A sample of pictures, spread over the shards, is compared with the cache: sizes and pixels."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import IdentityError, UserError
from featcache.pictures.open_source import open_source
from featcache.reading import join
from featcache.reading.cache import Cache
from featcache.reading.pairing import pair
from featcache.reading.sample_check import SAMPLE, PictureCheck
from featcache.torch import Dataset
from tests import student_fixtures as fx


def check_of(shards: list[int], rows: np.ndarray) -> PictureCheck:
    """A check of rows of a cache with so many rows in each shard, which is never read."""
    cache: Any = SimpleNamespace(shard_starts=np.cumsum([0, *shards]))
    source: Any = None
    return PictureCheck(cache, source, np.arange(len(rows)), rows)


# ---------------------------------------------------------------- the sample


@given(st.lists(st.integers(0, 400), max_size=12), st.integers(0, 9), st.integers(0, 2**40))
def test_every_shard_that_is_trained_on_is_in_the_sample(
    shards: list[int], parts: int, seed: int
) -> None:
    every = np.arange(sum(shards))
    rows = every[every % 10 >= parts][::-1].copy()  # in another order than the cache
    check = check_of(shards, rows)
    at = check.sample(seed)
    assert at.tolist() == check.sample(seed).tolist()
    assert len(set(at.tolist())) == len(at) <= SAMPLE
    shard_of = np.repeat(np.arange(len(shards)), shards)
    assert set(shard_of[rows[at]]) == set(shard_of[rows])
    assert check.shards(at) == len(set(shard_of[rows]))
    assert len(at) >= min(len(rows), SAMPLE // max(len(shards), 1))


def test_of_more_shards_than_the_sample_has_pictures_some_are_chosen_by_the_seed() -> None:
    check = check_of([3] * 1000, np.arange(3000))
    assert len(check.sample(0)) == check.shards(check.sample(0)) == SAMPLE
    assert check.sample(0).tolist() != check.sample(1).tolist()


def test_rows_that_are_not_stored_are_not_looked_at() -> None:
    rows = np.array([-1, 0, 1, -1, 2])
    assert sorted(check_of([2, 1], rows).sample(0).tolist()) == [1, 2, 4]


# ---------------------------------------------------------------- other pictures


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The cache's pictures under their names, of which one was drawn anew in its size."""
    folder = shutil.copytree(fx.pictures(), tmp_path / "other")
    with Image.open(folder / "p07.png") as picture:
        size = picture.size
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (*size[::-1], 3), np.uint8)).save(
        folder / "p07.png"
    )
    return folder


def made(folder: Path, **options: Any) -> PictureCheck:
    cache, source = Cache(fx.cache_path()), open_source(folder)
    pictures, rows, _ = join.join_by_key(cache, source)
    return PictureCheck(cache, source, pictures, rows, **options)


def test_the_pictures_of_the_extraction_pass() -> None:
    check = made(fx.pictures())
    check.check_pixels(check.sample(0), 0)
    check.check_sizes(np.arange(len(check.rows)))


def test_one_other_picture_among_those_of_the_sample_is_named(other: Path) -> None:
    check = made(other)
    with pytest.raises(IdentityError, match=r"'p07', view \d: .* likely another picture"):
        check.check_pixels(check.sample(0), 0)
    check.check_sizes(check.sample(0))  # which says nothing of the pixels


def test_a_picture_of_another_size_is_named(other: Path) -> None:
    Image.new("RGB", (44, 99)).save(other / "p03.png")
    check = made(other)
    words = r"'p03': it has 99 x 44 pixels, in cache .* it has 43 x 47; likely another picture"
    with pytest.raises(IdentityError, match=words):
        check.check_sizes(np.arange(24))
    with pytest.raises(IdentityError, match=words):
        check.check_pixels(np.array([3]), 0)


def test_a_tolerance_lets_another_size_pass_where_its_pixels_do(other: Path) -> None:
    with Image.open(other / "p03.png") as picture:
        picture.resize((picture.width + 1, picture.height)).save(other / "p03.png")
    check = made(other, tolerance=30.0)
    check.check_pixels(np.array([3]), 0)
    check.check_sizes(np.array([3]))
    with pytest.raises(IdentityError, match="'p07'"):
        made(other, tolerance=3.0).check_pixels(np.array([7]), 0)


def test_a_picture_that_cannot_be_read_is_named(other: Path) -> None:
    (other / "p05.png").write_bytes(b"no picture")
    check = made(other)
    for ask in (lambda: check.check_sizes(np.array([5])), lambda: check.check_pixels([5], 0)):
        with pytest.raises(UserError, match="picture 'p05' cannot be used in training: not a read"):
            ask()


# ---------------------------------------------------------------- datasets and pairs


def test_a_dataset_looks_at_a_sample_as_it_is_made(other: Path) -> None:
    with pytest.raises(IdentityError, match="allow it: pixel_tolerance=LEVELS"):
        Dataset(other, fx.cache_path())
    assert Dataset(other, fx.cache_path(), check_sample=False).checked == 0
    assert Dataset(other, fx.cache_path(), check_pixels=0).checked == 0
    (other / "p07.png").unlink()
    data = Dataset(other, fx.cache_path())
    assert (data.checked, data.left_out, data.skipped) == (23, 1, 0)


def test_stored_pixels_need_no_picture_and_no_check() -> None:
    assert Dataset(None, fx.ranked_path()).checked == 0


@pytest.mark.slow
def test_caches_of_other_pictures_under_the_same_keys_are_not_paired(
    other: Path, tmp_path: Path
) -> None:
    """Their boxes are the same, since sizes and keys are; at another size of the views their hashes
    cannot be compared, and thumbnails are."""
    for size in ("32", "28"):
        fx.extract(fx.pictures(), tmp_path / f"same{size}", "--size", size)
        fx.extract(other, tmp_path / f"other{size}", "--size", size)
        with Cache(fx.cache_path()) as one, Cache(tmp_path / f"same{size}") as two:
            assert len(pair(one, two)[0]) == fx.PICTURES
        with (
            Cache(fx.cache_path()) as one,
            Cache(tmp_path / f"other{size}") as two,
            pytest.raises(IdentityError, match=r"'p07', view 0: its pixels in .* another picture"),
        ):
            pair(one, two)
