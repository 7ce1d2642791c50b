"""Training on a cache that pictures were appended to, and on pictures that were renamed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from featcache.storage import manifest, picture_lists
from student.training import metrics
from tests import student_fixtures as fx

WORDS = ("--batch-size", "8", "--save-every", "2", "--seed", "3")


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("lists")
    first = fx.save_pictures(root / "first", 17)
    second = fx.save_pictures(root / "second", 9, seed=4)
    for path in list(second.iterdir()):
        path.rename(path.with_name(f"q{path.name}"))
    return first, second


def grow(cache: Path, images: Path) -> None:
    fx.good(fx.feat("extract", "--append", "--images", str(images), "--out", str(cache)))


def extract(images: Path | str, out: Path, *more: str) -> Path:
    return fx.extract(images, out, "--rows-per-shard", "5", *more)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_halves_train_as_one(lists: tuple[Path, Path], tmp_path: Path) -> None:
    whole = extract("::".join(map(str, lists)), tmp_path / "whole")
    halves = extract(lists[0], tmp_path / "halves")
    grow(halves, lists[1])
    runs = []
    for cache in (whole, halves):
        runs.append(tmp_path / f"run-{cache.name}")
        fx.good(fx.train("mralign", runs[-1], "--cache", cache, "--steps", "4", *WORDS))
    assert fx.losses(runs[0]) == fx.losses(runs[1])
    assert fx.same_weights(*runs)
    # of 26 pictures, batches of 8 an epoch
    data = json.loads((runs[1] / "config.json").read_text())["data"]
    assert (data["pictures"], data["steps_per_epoch"]) == (26, 3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--tokens", "ranked", "--pixels", "raw")])
def test_a_run_that_began_before_goes_on_as_it_was(
    more: tuple[str, ...], lists: tuple[Path, Path], tmp_path: Path
) -> None:
    cache = extract(lists[0], tmp_path / "cache", *more)
    asked = ("--cache", cache, *WORDS)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    fx.good(fx.train("maskalign", straight, *asked, "--steps", "5"))
    fx.good(fx.train("maskalign", resumed, *asked, "--steps", "5"))
    for run in (straight, resumed):
        assert len(metrics.read(run)) == 5
    # as if it had stopped after step 4
    for path in resumed.glob("checkpoints/*5*"):
        path.unlink()
    lines = (resumed / metrics.NAME).read_text().splitlines(keepends=True)
    (resumed / metrics.NAME).write_text("".join(lines[:4]))
    before = (resumed / "config.json").read_bytes()
    grow(cache, lists[1])
    assert len(picture_lists.lists(manifest.read(cache)["identity"])) == 2
    fx.good(fx.stud("train", "--resume", resumed))
    assert fx.losses(resumed) == fx.losses(straight)
    assert fx.same_weights(resumed, straight)
    assert (resumed / "config.json").read_bytes() == before
    # a new run takes all of them
    fx.good(fx.train("maskalign", tmp_path / "new", *asked, "--steps", "1"))
    assert json.loads((tmp_path / "new/config.json").read_text())["data"]["pictures"] == 26
    ran = fx.stud("train", "--resume", resumed, "--images", "::".join(map(str, lists)))
    assert "is another run: data.pictures 17 before, 26 now" in ran.line


@pytest.mark.slow
def test_the_cache_is_known_by_the_ids_that_it_had(
    lists: tuple[Path, Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    cache = extract(lists[0], home / "c")
    fx.good(
        fx.train("maskalign", tmp_path / "run", "--cache", cache, "--steps", "1", *WORDS, home=home)
    )
    used = json.loads(fx.feat("ls", "--json", home=home).out)[0]["last_used"]
    assert used
    fx.good(
        fx.feat("extract", "--append", "--images", str(lists[1]), "--out", str(cache), home=home)
    )
    (listed,) = json.loads(fx.feat("ls", "--json", home=home).out)
    assert (listed["last_used"], listed["pictures"]) == (used, 26)
    info = json.loads(fx.feat("info", str(cache), "--json", home=home).out)
    assert len(info["runs"]) == 1


@pytest.mark.slow
def test_renamed_pictures_train_as_before(lists: tuple[Path, Path], tmp_path: Path) -> None:
    cache = extract(lists[0], tmp_path / "cache")
    moved = tmp_path / "moved"
    for i, path in enumerate(sorted(lists[0].iterdir(), reverse=True)):
        (moved / f"d{i % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / f"d{i % 3}" / f"n{i}.png")
    asked = ("--cache", cache, *WORDS, "--steps", "3")
    fx.good(fx.train("mralign", tmp_path / "old", *asked, "--images", lists[0]))
    refused = fx.train("mralign", tmp_path / "no", *asked, "--images", moved)
    assert "17 of 17 pictures" in refused.line
    ran = fx.good(
        fx.train("mralign", tmp_path / "new", *asked, "--images", moved, "--match", "content")
    )
    assert "17 of 17 pictures" in ran.err
    assert "were found by their content" in ran.err
    assert fx.losses(tmp_path / "new") == fx.losses(tmp_path / "old")
    assert fx.same_weights(tmp_path / "new", tmp_path / "old")
    # and goes on by its own options
    shutil.rmtree(tmp_path / "new/checkpoints")
    (tmp_path / "new" / metrics.NAME).write_text("")
    fx.good(fx.stud("train", "--resume", tmp_path / "new"))
    assert fx.losses(tmp_path / "new") == fx.losses(tmp_path / "old")


def test_content_is_matched_with_a_caches_rows_alone(tmp_path: Path) -> None:
    ran = fx.train(
        "maskalign", tmp_path / "run", "--images", fx.pictures(), "--teacher", "online",
        "--match", "content", "--cache", fx.cache_path(),
    )  # fmt: skip
    assert "--match content finds pictures among the rows of a cache" in ran.line
    assert fx.stud("train", "--match", "colour").status == 2
