"""The files in a cache's folder must belong there: every one may be intact, and still be of
another cache."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.extraction import extract
from featcache.extraction.plan import Plan
from featcache.maintenance import verify
from featcache.pictures.open_source import open_source
from featcache.storage import json_file, manifest
from featcache.views.policy import Policy
from tests.conftest import copy_tree, make_photos

TEACHER = "synthetic:levels=3,tokens=16,width=24"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches of the same pictures, alike but for the seed of their views."""
    folder = tmp_path_factory.mktemp("pair")
    make_photos(folder / "pictures")
    for seed in (0, 7):
        policy = Policy(size=32, seed=seed)
        source = open_source(folder / "pictures")
        plan = Plan(
            source=source,
            teacher=teachers.load(TEACHER),
            policy=policy,
            views=2,
            levels=(1, 3),
            rows_per_shard=4,
        )
        extract.run(plan, folder / f"seed{seed}", batch_size=4)
    return folder / "seed0", folder / "seed7"


def move(source: Path, target: Path, there: str, here: str) -> None:
    """A shard's folder and record from one cache over those of another."""
    shutil.rmtree(target / f"shards/{here}.zarr")
    shutil.copytree(source / f"shards/{there}.zarr", target / f"shards/{here}.zarr")
    shutil.copy(source / f"shards/{there}.json", target / f"shards/{here}.json")


def refused(cache: Path, match: str) -> None:
    problems, _ = verify.verify_cache(cache)
    assert len(problems) == 1
    assert match in problems[0]
    with pytest.raises(UserError, match=match):
        featcache.open(cache)


def test_a_shard_of_another_cache(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cache = copy_tree(pair[0], tmp_path / "c")
    move(pair[1], cache, "000000", "000000")
    refused(cache, "is of a shard of another cache")


def test_a_shard_in_the_place_of_another(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cache = copy_tree(pair[0], tmp_path / "c")
    move(cache, cache, "000001", "000000")
    refused(cache, "is the record of shard '000001'")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": 3}, "has 3 rows and 0 in quarantine, the manifest 4 pictures"),
        ({"rows": -1}, "is not the record of a shard"),
        ({"rows": "4"}, "is not the record of a shard"),
        ({"files": {}}, "is not the record of a shard"),
    ],
)
def test_a_record_that_was_edited(
    pair: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    cache = copy_tree(pair[0], tmp_path / "c")
    path = cache / "shards/000000.json"
    json_file.write_json(path, {**json_file.read_json(path), **change})
    refused(cache, match)


def test_keys_that_are_not_the_shards(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cache = copy_tree(pair[0], tmp_path / "c")
    path = cache / "shards/000000.json"
    json_file.write_json(path, {**json_file.read_json(path), "keys_digest": "0" * 32})
    assert "its keys are not those" in verify.verify_cache(cache)[0][0]


def test_a_manifest_that_was_edited(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cache = copy_tree(pair[0], tmp_path / "c")
    about = json_file.read_json(cache / manifest.NAME)
    about["identity"]["levels"] = [3, 1]
    json_file.write_json(cache / manifest.NAME, about)
    with pytest.raises(UserError, match="its id is not that of its identity"):
        featcache.open(cache)


def test_a_strangers_part(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cache = copy_tree(pair[0], tmp_path / "c")
    shutil.copytree(pair[1], cache / "parts/stray")
    with pytest.raises(
        UserError, match=r"does not belong to cache .*identity\.policy\.seed is 7 there, 0 here"
    ):
        featcache.open(cache)


def test_the_same_part_twice(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cache = copy_tree(pair[0], tmp_path / "c")
    shutil.copytree(pair[0], cache / "parts/twin")
    with pytest.raises(UserError, match="two parts hold the same levels and views"):
        featcache.open(cache)


def test_views_that_a_part_on_its_own_does_not_hold(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    source = open_source(pair[0].parent / "pictures")
    plan = Plan(
        source=source,
        teacher=teachers.load(TEACHER),
        policy=Policy(size=32),
        views=1,
        levels=(1, 3),
        rows_per_shard=4,
        first_view=2,
    )
    extract.run(plan, tmp_path / "part", batch_size=4)
    with featcache.open(tmp_path / "part") as part:
        assert part.read([0], 2)["features"].shape == (1, 2, 17, 24)
        with pytest.raises(UsageError, match="view must be from 2 to 2"):
            part.read([0], 0)


@pytest.mark.slow
def test_closing_while_others_read(pair: tuple[Path, Path]) -> None:
    """Neither waits for the other for ever, and what is read is right."""
    cache = featcache.open(pair[0], threads=3)
    rows = np.arange(4000) % len(cache)
    expected = cache.read(rows)["features"]
    wrong: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(12):
                np.testing.assert_array_equal(cache.read(rows)["features"], expected)
        except Exception as error:
            wrong.append(error)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        cache.close()
        readers[0].join(0.01)
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert wrong == []
