"""Renamed and moved pictures are found by the bytes of their files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import extract
from featcache.pictures.open_source import open_source
from featcache.reading.content_match import rename
from featcache.reading.join import join_by_key
from tests.conftest import copy_tree, make_plan, waves


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("content") / "cache"
    extract.run(make_plan(pictures), out, batch_size=4)
    return out


@pytest.fixture
def moved(pictures: Path, tmp_path: Path) -> dict[str, Path]:
    """The same files under other names, in the opposite order: old key -> new path."""
    files = sorted(path for path in pictures.iterdir())
    new = {}
    for i, path in enumerate(files):
        target = tmp_path / "moved" / f"sub{i % 2}" / f"{99 - i:02d}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        new[path.stem] = target
    return new


def test_the_digest_is_that_of_the_files_bytes(made: Path, pictures: Path) -> None:
    with featcache.open(made) as cache:
        stored = cache.read(np.arange(len(cache)), 0, ("file_digest",))["file_digest"]
        for row, key in enumerate(cache.keys):
            (path,) = pictures.glob(f"{key}.*")
            wanted = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
            assert stored[row].tobytes() == wanted


def test_pictures_take_the_keys_and_the_order_of_the_cache(
    made: Path, moved: dict[str, Path], tmp_path: Path
) -> None:
    source, seen = open_source(tmp_path / "moved"), []
    with featcache.open(made) as cache:
        found = rename(cache, source, 2, lambda done, total: seen.append((done, total)))
        pictures, rows, skipped = join_by_key(cache, found)
        assert rows.tolist() == list(range(len(cache)))
        assert [found.keys[i] for i in pictures] == list(cache.keys)
        for at, key in zip(pictures.tolist(), cache.keys, strict=True):
            assert found.read(at) == moved[key].read_bytes()
    assert seen == [(i + 1, len(source)) for i in range(len(source))]
    # no row has the content of the broken picture and of the text
    names = {moved[key].relative_to(tmp_path / "moved").with_suffix("") for key in ("half", "lie")}
    assert set(found.left_out) == {name.as_posix() for name in names}
    assert skipped == 0


def test_more_broken_pictures_than_the_extraction_had_are_an_error(
    made: Path, moved: dict[str, Path], tmp_path: Path
) -> None:
    whole = moved["photo0"].read_bytes()
    moved["photo0"].write_bytes(whole[: len(whole) // 3])
    with featcache.open(made) as cache, pytest.raises(IdentityError, match="3 of 13 pictures"):
        rename(cache, open_source(tmp_path / "moved"))


def test_a_changed_file_is_named(made: Path, moved: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(waves(30, 30, 9.0)).save(moved["rgb"])
    name = moved["rgb"].relative_to(tmp_path / "moved").with_suffix("").as_posix()
    with featcache.open(made) as cache, pytest.raises(IdentityError, match=f"the first is '{name}"):
        rename(cache, open_source(tmp_path / "moved"))


def test_equal_files_take_equal_rows_the_same_key_first(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    Image.fromarray(waves(30, 30, 1.0)).save(here / "a.png")
    for name in ("b", "c"):
        shutil.copy(here / "a.png", here / f"{name}.png")
    Image.fromarray(waves(30, 30, 2.0)).save(here / "d.png")
    out = tmp_path / "cache"
    extract.run(make_plan(here), out, batch_size=4)
    there = tmp_path / "there"
    there.mkdir()
    for old, new in (("a", "b"), ("a", "z"), ("d", "y")):
        shutil.copy(here / f"{old}.png", there / f"{new}.png")
    with featcache.open(out) as cache:
        found = rename(cache, open_source(there))
        # b keeps its row; z takes the first that is left
        given = [open_source(there).keys[i] for i in found.order]
        assert (list(found.keys), given) == (["a", "b", "d"], ["z", "b", "y"])
        for name in ("x", "w"):
            shutil.copy(here / "a.png", there / f"{name}.png")
        with pytest.raises(IdentityError, match="has less often; take the copy out"):
            rename(cache, open_source(there))


def test_a_cache_without_digests_says_so(made: Path, tmp_path: Path, photos: Path) -> None:
    from dataclasses import replace

    out = tmp_path / "old"
    extract.run(replace(make_plan(photos), file_digests=False), out, batch_size=4)
    with featcache.open(out) as cache:
        assert "file_digest" not in cache.fields
        with pytest.raises(UserError, match="holds no digests of its pictures' files"):
            rename(cache, open_source(photos))


@pytest.mark.slow
def test_a_cache_that_was_begun_without_digests_goes_on_without(
    tmp_path: Path, photos: Path
) -> None:
    from dataclasses import replace

    out = tmp_path / "old"
    extract.run(replace(make_plan(photos), file_digests=False), out, batch_size=4)
    whole = copy_tree(out, tmp_path / "whole")
    record = sorted((out / "shards").glob("0*.json"))[-1]
    record.unlink()
    shutil.rmtree(record.with_suffix(".zarr"))
    extract.run(make_plan(photos), out, batch_size=4)
    assert record.read_bytes() == (whole / "shards" / record.name).read_bytes()


def test_the_dataset_counts_what_no_content_finds(
    made: Path, moved: dict[str, Path], tmp_path: Path
) -> None:
    from featcache.torch import Dataset

    data = Dataset(tmp_path / "moved", made, match="content", check_pixels=0)
    with featcache.open(made) as cache:
        assert [data[i]["key"] for i in range(len(data))] == list(cache.keys)
    assert data.skipped == 2  # the broken picture and the text
    with pytest.raises(UsageError, match="'key' or 'content' is allowed"):
        Dataset(tmp_path / "moved", made, match="name")  # type: ignore[arg-type]
