"""`student train` compares a sample of pictures with the cache before its first step, in every
process and on every resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import processes
from tests import student_fixtures as fx

CHECKED = "note: checked 24 pictures of 1 shard against the cache"
SHORT = ("--steps", "1", "--batch-size", "4")


def other_picture(folder: Path, name: str, size: tuple[int, int] | None = None) -> None:
    """Another picture under a name, of its size where none is given."""
    with Image.open(folder / f"{name}.png") as picture:
        width, height = size or picture.size
    pixels = np.random.default_rng(9).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(fx.pictures(), tmp_path / "pictures")


def train(run: Path, images: Path, *options: str) -> fx.Ran:
    cache = ("--cache", str(fx.cache_path()))
    return fx.train("maskalign", run, *cache, *SHORT, "--images", str(images), *options)


def test_the_number_of_pictures_is_said(tmp_path: Path) -> None:
    assert CHECKED in fx.good(train(tmp_path / "run", fx.pictures())).err


@pytest.mark.parametrize("name", ["p00", "p11", "p23"])
def test_other_pictures_stop_a_run_before_it_has_a_folder(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """One step shows 4 of 24 pictures and would check none of them, or another."""
    other_picture(folder, name)
    ran = train(tmp_path / "run", folder, "--check-pixels", "0.001")
    assert ran.status == 1
    assert f"picture '{name}', view" in ran.line
    assert "another picture under this key" in ran.line
    assert "--pixel-tolerance LEVELS" in ran.line
    assert not (tmp_path / "run").exists()


def test_the_first_steps_pictures_have_the_stored_sizes(folder: Path, tmp_path: Path) -> None:
    other_picture(folder, "p05", (90, 91))
    ran = train(tmp_path / "run", folder, "--batch-size", "24")
    assert ran.status == 1
    assert "picture 'p05': it has 91 x 90 pixels, in cache" in ran.line


def test_a_tolerance_is_that_of_every_check(folder: Path, tmp_path: Path) -> None:
    other_picture(folder, "p05")
    assert train(tmp_path / "a", folder, "--pixel-tolerance", "2").status == 1
    fx.good(train(tmp_path / "b", folder, "--pixel-tolerance", "200"))


def test_a_resumed_run_looks_again(folder: Path, tmp_path: Path) -> None:
    fx.good(train(tmp_path / "run", folder))
    other_picture(folder, "p05")
    again = train(tmp_path / "run", folder, "--resume")
    assert (again.status, "'p05'" in again.line) == (1, True)


def test_nothing_is_said_where_nothing_is_compared(tmp_path: Path) -> None:
    """Nobody asks for it; pixels are stored, and no picture is read; nothing is stored."""
    assert "checked" not in fx.good(train(tmp_path / "a", fx.pictures(), "--check-pixels", "0")).err
    stored = ("--cache", str(fx.ranked_path()))
    assert "checked" not in fx.good(train(tmp_path / "b", fx.pictures(), *stored)).err
    online = ("--teacher", "online", "--images", str(fx.pictures()), "--cache", fx.cache_path())
    assert "checked" not in fx.good(fx.train("maskalign", tmp_path / "c", *SHORT, *online)).err


@pytest.mark.slow
def test_a_miss_in_one_process_stops_all(folder: Path, tmp_path: Path) -> None:
    """Each looks at half of the sample; none waits for the other, and none trains."""
    other_picture(folder, "p05")
    ran = processes.train(
        2, "--cache", fx.cache_path(), "--images", folder, "--out", tmp_path / "run", *SHORT,
        recipe="maskalign",
    )  # fmt: skip
    assert ran.status == [1, 1]
    assert ["picture 'p05', view" in said for said in ran.said] == [True, True]
    assert not (tmp_path / "run").exists()


def test_rows_of_the_cache_without_a_picture_are_counted(folder: Path, tmp_path: Path) -> None:
    for name in ("p03", "p17"):
        (folder / f"{name}.png").unlink()
    ran = fx.good(train(tmp_path / "run", folder))
    assert (
        "note: 2 of the 24 pictures of the cache are not among those given, and not trained on, "
        "the first is 'p03'"
    ) in ran.err
    assert "not among those given" not in fx.good(train(tmp_path / "b", fx.pictures())).err
