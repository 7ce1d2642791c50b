"""`--fallback online`: a run over a cache without some of its shards is the run over the whole
cache, and says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import UserError
from featcache.reading.cache import Cache
from student import checkpoint
from student.setup import cache_match
from student.training import metrics
from tests import processes
from tests import student_fixtures as fx

STEPS = ("--steps", "6", "--batch-size", "8")
FALLBACK = ("--fallback", "online", "--fallback-limit", "0.25")
GONE = ("p05", "p06", "p07", "p08", "p09")  # of 24 pictures, shard 000001 of shards of 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in five shards, the last of 4."""
    return fx.extract(
        fx.pictures(), tmp_path_factory.mktemp("fallback") / "whole", "--rows-per-shard", "5"
    )


def without(whole: Path, there: Path, *shards: str) -> Path:
    """A copy without the files of some shards; their records stay."""
    shutil.copytree(whole, there)
    for shard in shards:
        shutil.rmtree(there / "shards" / f"{shard}.zarr")
    return there


def lost_record(cache: Path) -> None:
    (cache / "shards" / "000001.json").unlink()


def short_file(cache: Path) -> None:
    path = next((cache / "shards" / "000001.zarr" / "features").glob("c*"))
    path.write_bytes(path.read_bytes()[:-5])


def one_file(cache: Path) -> None:
    next((cache / "shards" / "000001.zarr" / "attention").glob("c*")).unlink()


def bad_record(cache: Path) -> None:
    (cache / "shards" / "000001.json").write_text("{")


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lost_record, short_file, one_file, bad_record])
def test_a_cache_opens_without_a_shard_of_which_something_is_missing(
    damage: Callable[[Path], None], whole: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    damage(cache)
    if damage is not lost_record:
        with pytest.raises(UserError):
            Cache(cache)
    with Cache(whole) as full, Cache(cache, partial=True) as opened:
        assert list(opened.absent) == ["000001"]
        assert list(opened.keys) == [key for key in full.keys if key not in GONE]
        rows = full.keys.find(list(opened.keys))
        fields = ("features", "crop", "attention")
        ours, theirs = opened.read(np.arange(19), 1, fields), full.read(rows, 1, fields)
        for name in fields:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_what_was_added_goes_with_it(whole: Path, tmp_path: Path) -> None:
    """A shard that an added part lacks is absent from all; the added level is still there for the
    others."""
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    options = (
        "--teacher",
        fx.TEACHER,
        "--images",
        str(fx.pictures()),
        "--size",
        str(fx.SIZE),
        "--views",
        "3",
    )
    fx.good(
        fx.feat(
            "extract",
            *options,
            "--rows-per-shard",
            "5",
            "--levels",
            "1",
            "--add",
            "--out",
            str(cache),
        )
    )
    shutil.rmtree(next((cache / "parts").iterdir()) / "shards" / "000003.zarr")
    shutil.rmtree(cache / "shards" / "000001.zarr")
    with Cache(cache, partial=True) as opened:
        assert sorted(opened.absent) == ["000001", "000003"]
        assert opened.levels == (1, 2, 3, 4)
        assert list(opened.keys) == [f"p{i:02d}" for i in range(24) if i // 5 not in (1, 3)]
        assert opened.read(np.arange(14), 0)["features"].shape == (14, 4, 17, 24)


def test_a_whole_cache_has_nothing_absent(whole: Path) -> None:
    with Cache(whole, partial=True) as opened:
        assert (opened.absent, len(opened), opened.complete) == ({}, 24, True)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sets", "options"),
    [
        ("maskalign", (), ()),
        ("maskalign", ("target_norm=l2",), ("--aug-repeats", "2", "--accumulate", "2")),
        ("mralign", ("mask=stored",), ("--sampling", "block")),
        ("fd", (), ()),
        ("mae", ("mask=attentive",), ()),
    ],
)
def test_the_run_is_that_of_the_whole_cache(
    recipe: str, sets: tuple[str, ...], options: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    """The synthetic teacher computes the same bits again, the codec rounds them, masks and views
    are those of the keys: with one shard of five the same losses and weights to the bit, and every
    use is counted."""
    part = without(whole, tmp_path / "part", "000001")
    given = ("--images", fx.pictures(), *STEPS, *options)
    fx.good(fx.train(recipe, tmp_path / "a", "--cache", whole, *given, sets=sets))
    ran = fx.good(
        fx.train(recipe, tmp_path / "b", "--cache", part, *given, *FALLBACK, "--json", sets=sets)
    )
    assert "1 of 5 shards are absent, the first is 000001 (cache file" in ran.err
    assert "the teacher computes the targets of 5 of 24 pictures (0.2083, allowed 0.25)" in ran.err
    rows = metrics.read(tmp_path / "b")
    assert ran.json["fallback"] == sum(row["fallback"] for row in rows)
    assert 0 < ran.json["fallback"] < 6 * 8 * (2 if "--accumulate" in options else 1)
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    assert fx.same_weights(tmp_path / "a", tmp_path / "b")
    told = checkpoint.read_config(tmp_path / "b")["targets"]["reading"]["fallback"]
    assert told == {"shards": ["000001"], "pictures": 5}


def test_each_use_is_counted(whole: Path, tmp_path: Path) -> None:
    """All five once in each of two epochs of three whole batches."""
    part = without(whole, tmp_path / "part", "000001")
    options = ("--epochs", "2", "--batch-size", "8", "--images", fx.pictures())
    ran = fx.good(
        fx.train("maskalign", tmp_path / "run", "--cache", part, *options, *FALLBACK, "--json")
    )
    counts = [row["fallback"] for row in metrics.read(tmp_path / "run")]
    assert (sum(counts[:3]), sum(counts[3:]), ran.json["fallback"]) == (5, 5, 10)


@pytest.mark.slow
def test_in_two_processes(whole: Path, tmp_path: Path) -> None:
    part = without(whole, tmp_path / "part", "000001", "000004")
    given = ("--images", fx.pictures(), "--steps", "6", "--batch-size", "4")
    sets = ("drop_path=0",)
    processes.good(
        processes.train(
            2, "--cache", whole, *given, "--out", tmp_path / "a", recipe="maskalign", sets=sets
        )
    )
    options = ("--fallback", "online", "--fallback-limit", "0.5", "--out", tmp_path / "b")
    processes.good(
        processes.train(2, "--cache", part, *given, *options, recipe="maskalign", sets=sets)
    )
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    # both epochs show all 24
    assert sum(row["fallback"] for row in metrics.read(tmp_path / "b")) == 2 * 9


@pytest.mark.slow
def test_ranked_tokens_and_stored_pixels(whole: Path, tmp_path: Path) -> None:
    """Of ranked tokens the first are read, and online all are made; pixels are decoded for all."""
    stored = ("--rows-per-shard", "5", "--tokens", "ranked", "--pixels", "raw")
    ranked = fx.extract(fx.pictures(), tmp_path / "ranked", *stored)
    part = without(ranked, tmp_path / "part", "000002")
    sets = ("mask=stored",)
    given = ("--images", fx.pictures(), *STEPS)
    fx.good(fx.train("maskalign", tmp_path / "a", "--cache", whole, *given, sets=sets))
    fx.good(fx.train("maskalign", tmp_path / "b", "--cache", part, *given, *FALLBACK, sets=sets))
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")


@pytest.mark.slow
def test_resumed_when_the_cache_is_whole_again(whole: Path, tmp_path: Path) -> None:
    part = without(whole, tmp_path / "part", "000001")
    given = ("--images", fx.pictures(), "--batch-size", "8", "--save-every", "3")
    fx.good(fx.train("maskalign", tmp_path / "a", "--cache", whole, *given, "--steps", "6"))
    fx.good(
        fx.train("maskalign", tmp_path / "b", "--cache", part, *given, "--steps", "6", *FALLBACK)
    )
    last = checkpoint.list_checkpoints(tmp_path / "b")[-1]
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    fx.good(fx.feat("repair", str(part), "--images", str(fx.pictures())))
    ran = fx.good(
        fx.train(
            "maskalign",
            tmp_path / "b",
            "--cache",
            part,
            *given,
            "--steps",
            "6",
            *FALLBACK,
            "--resume",
        )
    )
    assert "note: no shard of the cache is absent, --fallback has nothing to do" in ran.err
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    assert fx.same_weights(tmp_path / "a", tmp_path / "b")


def test_a_dry_run_measures_it(whole: Path, tmp_path: Path) -> None:
    part = without(whole, tmp_path / "part", "000001")
    ran = fx.good(
        fx.train(
            "maskalign", tmp_path / "run", "--cache", part, *STEPS, *FALLBACK, "--dry-run", "--json"
        )
    )
    assert ran.json["bytes_per_picture"] > 0
    assert not (tmp_path / "run").exists()


# --- what is refused ------------------------------------------------------------------------------


def refused(
    status: int, told: str, run: Path, *options: Any, recipe: str = "maskalign", sets: Any = ()
) -> str:
    ran = fx.train(recipe, run, *options, *STEPS, sets=sets)
    assert ran.status == status, ran.err
    assert told in ran.line
    assert not run.exists()
    return ran.line


def test_the_bound(whole: Path, tmp_path: Path) -> None:
    """1 % where nothing is said; the line says what would do."""
    part = without(whole, tmp_path / "part", "000001")
    options = ("--cache", part, "--fallback", "online")
    told = (
        "5 of 24 pictures (0.2083) would have their targets computed, allowed: 0.01; run "
        "`featcache repair "
    )
    line = refused(1, told, tmp_path / "run", *options)
    limit = line.split()[-2:]
    assert limit == ["--fallback-limit", "0.209"]
    fx.good(fx.train("maskalign", tmp_path / "run", *options, *STEPS, *limit))


def test_without_the_option_a_lost_shard_stops(whole: Path, tmp_path: Path) -> None:
    part = without(whole, tmp_path / "part", "000001")
    refused(1, "000001.zarr", tmp_path / "run", "--cache", part)


def test_damage_that_is_not_absence_still_stops(whole: Path, tmp_path: Path) -> None:
    """A wrong byte in another shard: the teacher is no answer to that."""
    part = without(whole, tmp_path / "part", "000001")
    path = next((part / "shards" / "000002.zarr" / "features").glob("c*"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    refused(1, "000002.zarr", tmp_path / "run", "--cache", part, *FALLBACK)


def test_other_pictures_are_refused(whole: Path, tmp_path: Path) -> None:
    part = without(whole, tmp_path / "part", "000001")
    some = fx.save_pictures(tmp_path / "some", 12)
    told = "the 12 pictures of"
    refused(1, told, tmp_path / "run", "--cache", part, *FALLBACK, "--images", some)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--fallback", "online"), "no --cache is given"),
        (
            ("--cache", "X", "--fallback", "online", "--teacher", "online"),
            "--teacher online computes all targets",
        ),
        (
            ("--cache", "X", "--fallback", "online", "--resident"),
            "--fallback does not go with --resident",
        ),
        (("--cache", "X", "--fallback-limit", "0.1"), "--fallback-limit bounds --fallback"),
        (("--cache", "PART", *FALLBACK, "--scale", "0.3,1"), "--fallback online shows all views"),
        (("--cache", "PART", *FALLBACK, "--views", "2"), "--views 2 does not go with a cache"),
    ],
)
def test_what_does_not_go_together(
    options: tuple[str, ...], told: str, whole: Path, tmp_path: Path
) -> None:
    part = without(whole, tmp_path / "part", "000001")
    places = {"X": str(whole), "PART": str(part)}
    refused(
        2,
        told,
        tmp_path / "run",
        *(places.get(word, word) for word in options),
        "--without-view",
        "1",
    )


def test_statistics_of_the_batch_and_fields_that_no_teacher_makes(
    whole: Path, tmp_path: Path
) -> None:
    part = without(whole, tmp_path / "part", "000001")
    options = ("--cache", part, *FALLBACK)
    refused(
        2,
        "target_norm=bn wants statistics of the whole batch",
        tmp_path / "run",
        *options,
        sets=("target_norm=bn",),
    )
    refused(2, "nan is no finite number", tmp_path / "run", *options[:-1], "nan")


def test_token_ids_are_not_made(tmp_path: Path) -> None:
    part = without(fx.token_path(), tmp_path / "part", "000000")
    options = ("--cache", part, "--fallback", "online", "--images", fx.pictures())
    refused(
        2, "the teacher makes no token_ids; leave it out", tmp_path / "run", *options, recipe="cae"
    )


@pytest.mark.slow
@pytest.mark.parametrize("record", ["there", "lost"])
def test_pictures_in_quarantine_stay_there(record: str, tmp_path: Path) -> None:
    """p07 cannot be read, and lies in the shard that goes; its record tells, or quarantine.json.
    Fixed meanwhile, it is not among the pictures all the same."""
    pictures = fx.save_pictures(tmp_path / "pictures")
    good = (pictures / "p07.png").read_bytes()
    (pictures / "p07.png").write_bytes(b"no picture")
    cache = fx.extract(pictures, tmp_path / "whole", "--rows-per-shard", "5")
    part = without(cache, tmp_path / "part", "000001")
    if record == "lost":
        (part / "shards" / "000001.json").unlink()
    given = ("--images", pictures, *STEPS)
    fx.good(fx.train("maskalign", tmp_path / "a", "--cache", cache, *given))
    (pictures / "p07.png").write_bytes(good)
    ran = fx.good(fx.train("maskalign", tmp_path / "b", "--cache", part, *given, *FALLBACK))
    assert "note: 1 picture is in the cache's quarantine and skipped" in ran.err
    assert "the teacher computes the targets of 4 of 23 pictures" in ran.err
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")


def added_views(whole: Path, there: Path) -> Path:
    """Six views in place of three."""
    shutil.copytree(whole, there)
    options = (
        "--teacher",
        fx.TEACHER,
        "--images",
        str(fx.pictures()),
        "--size",
        str(fx.SIZE),
        "--views",
        "6",
    )
    fx.good(
        fx.feat(
            "extract",
            *options,
            "--rows-per-shard",
            "5",
            "--levels",
            "last:3",
            "--add",
            "--out",
            str(there),
        )
    )
    return there


@pytest.mark.slow
def test_a_lost_record_of_an_added_part_is_absent_too(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the option the run says that views it could show are not whole; of a cache too large
    to be verified."""
    monkeypatch.setattr(cache_match, "VERIFIED_BYTES", 0)
    full = added_views(whole, tmp_path / "full")
    part = tmp_path / "part"
    shutil.copytree(full, part)
    next((part / "parts").glob("*/shards/000001.json")).unlink()
    given = ("--images", fx.pictures(), *STEPS)
    fx.good(fx.train("maskalign", tmp_path / "a", "--cache", full, *given))
    ran = fx.good(fx.train("maskalign", tmp_path / "b", "--cache", part, *given, *FALLBACK))
    assert "1 of 5 shards are absent, the first is 000001" in ran.err
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    ran = fx.good(fx.train("maskalign", tmp_path / "c", "--cache", part, *given))
    assert "views 3 to 5 is not whole, nothing of it is read" in ran.err


def test_weights_may_still_be_given_when_the_cache_is_whole_again(
    whole: Path, tmp_path: Path
) -> None:
    weights = ("--weights", "registered")
    options = ("--cache", whole, "--images", fx.pictures())
    refused(
        2, "--weights registered does not go with a cache", tmp_path / "run", *options, *weights
    )
    fx.good(fx.train("maskalign", tmp_path / "run", *options, *STEPS, *FALLBACK, *weights))


def test_other_weights_are_refused(whole: Path, tmp_path: Path) -> None:
    part = without(whole, tmp_path / "part", "000001")
    ran = fx.train(
        "maskalign", tmp_path / "run", "--cache", part, *FALLBACK, *STEPS, "--weights", "random:7"
    )
    assert ran.status in (1, 2)
    assert ran.line
