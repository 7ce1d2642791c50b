"""Several teachers in one pass: each picture decoded once, and the bytes of one command after
another."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import extend, extract, target_folder
from featcache.extraction import options as extraction_options
from featcache.extraction.plan import Plan
from featcache.extraction.progress import ExtractProgress
from featcache.maintenance import verify
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.reading import pairing
from featcache.storage.store import STORES
from featcache.teachers import load
from featcache.views import pixel_path
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, Ran, Running, copy_tree, files_below

VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=16,embed_dim=24,depth=6,num_heads=3"
NINE = "synthetic:levels=2,tokens=9,width=8,size=30"
teacher = functools.cache(load)


def make(folder: Path, name: str = SYNTHETIC, **changes: Any) -> Plan:
    """Two views; the teachers want 28, 32 and 30 pixels, the policy says 28."""
    loaded = teacher(name, "random:0" if name == VIT else None)
    policy = changes.pop("policy", Policy(size=28))
    options = {
        "views": 2,
        "levels": (loaded.depth - 1, loaded.depth),
        "rows_per_shard": 5,
        **changes,
    }
    return Plan(source=open_source(folder), teacher=loaded, policy=policy, **options)


def one_by_one(plans: list[Plan], out: Path) -> Path:
    """Separate commands do the same: the first, then the others with --add."""
    extract.run(plans[0], out, batch_size=4)
    for each in plans[1:]:
        job = extend.plan_part(each, out)
        assert job is not None
        extract.run(*job, batch_size=4)
    return out


def in_one(plans: list[Plan], out: Path, **options: Any) -> Path:
    extract.run_jobs(extend.plan_jobs(plans, out, add=False), batch_size=4, **options)
    return out


@functools.cache
def apart(folder: Path, store: str) -> dict[str, bytes]:
    plans = [make(folder, name, store=store) for name in (SYNTHETIC, VIT, NINE)]
    return files_below(one_by_one(plans, folder.parent / f"apart-{store}"))


# ---------------------------------------------------------------- the same bytes


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_one_pass_writes_what_separate_commands_write(
    pictures: Path, tmp_path: Path, store: str
) -> None:
    """Two bad pictures among them, shards of five, a padded last batch."""
    plans = [make(pictures, name, store=store) for name in (SYNTHETIC, VIT, NINE)]
    assert files_below(in_one(plans, tmp_path / "c")) == apart(pictures, store)
    assert len([name for name in apart(pictures, store) if name.endswith("quarantine.json")]) == 3
    with featcache.open(tmp_path / "c") as cache:
        assert cache.teachers == [SYNTHETIC, NINE, VIT]  # what was added, by name
        assert cache.levels_of(VIT) == (5, 6)


@pytest.mark.slow
def test_each_picture_is_decoded_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: list[int] = []

    def counted(data: bytes) -> Any:
        count.append(1)
        return decode(data)

    monkeypatch.setattr(pixel_path, "decode", counted)
    progress = ExtractProgress()
    in_one(
        [make(pictures, name) for name in (SYNTHETIC, VIT, NINE)], tmp_path / "c", progress=progress
    )
    assert len(count) == progress.pictures == progress.total == 13


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 8, 13])
def test_a_stopped_pass_continues_to_the_same_bytes(
    pictures: Path, tmp_path: Path, after: int
) -> None:
    plans = [make(pictures, name) for name in (SYNTHETIC, VIT, NINE)]

    def stop(progress: ExtractProgress) -> None:
        if progress.pictures >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_one(plans, tmp_path / "c", progress=ExtractProgress(stop))
    left = files_below(tmp_path / "c")
    assert not [name for name in left if "tmp" in name or "lease" in name]
    assert all(apart(pictures, "zarr")[name] == data for name, data in left.items())
    assert files_below(in_one(plans, tmp_path / "c")) == apart(pictures, "zarr")


def test_only_what_is_lost_is_made_again(pictures: Path, tmp_path: Path) -> None:
    """The cache itself is complete, of two unfinished parts one shard each is missing; they are no
    obstacle to one another."""
    apart(pictures, "zarr")
    out = copy_tree(pictures.parent / "apart-zarr", tmp_path / "c")
    parts = sorted((out / "parts").iterdir())
    (parts[0] / "shards/000001.json").unlink()
    (parts[1] / "shards/000002.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("*/c.*")}
    plans = [make(pictures, name) for name in (SYNTHETIC, VIT, NINE)]
    progress = ExtractProgress()
    in_one(plans, out, progress=progress)
    assert progress.pictures == 5 + 3
    assert files_below(out) == apart(pictures, "zarr")
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("*/c.*")} == times


def test_what_a_pass_left_behind_can_be_finished_one_by_one(pictures: Path, tmp_path: Path) -> None:
    """Two additions are unfinished: each may be, though a third one may not begin."""
    apart(pictures, "zarr")
    out = copy_tree(pictures.parent / "apart-zarr", tmp_path / "c")
    for part in (out / "parts").iterdir():
        (part / "shards/000002.json").unlink()
    with pytest.raises(UserError, match="an addition is unfinished"):
        extend.plan_part(make(pictures, levels=(1,)), out)
    for name in (VIT, NINE):
        job = extend.plan_part(make(pictures, name), out)
        assert job is not None
        extract.run(*job, batch_size=4)
    assert files_below(out) == apart(pictures, "zarr")


def test_shares_of_a_pass(pictures: Path, tmp_path: Path) -> None:
    plans = [make(pictures, name) for name in (SYNTHETIC, VIT, NINE)]
    for i in (1, 0):
        in_one(plans, tmp_path / "c", share=(i, 2))
    assert files_below(tmp_path / "c") == apart(pictures, "zarr")


@pytest.mark.slow
def test_stored_pixels_are_the_first_ones_own(photos: Path, tmp_path: Path) -> None:
    plans = [make(photos, name, pixels=True) for name in (SYNTHETIC, VIT)]
    assert files_below(in_one(plans, tmp_path / "a")) == files_below(
        one_by_one(plans, tmp_path / "b")
    )
    with featcache.open(tmp_path / "a") as cache:
        assert [name for name in cache.fields if name.endswith("pixels")] == ["pixels"]


@pytest.mark.slow
def test_two_are_added_in_one_pass(pictures: Path, tmp_path: Path) -> None:
    plans = [make(pictures, name) for name in (SYNTHETIC, VIT, NINE)]
    extract.run(plans[0], tmp_path / "c", batch_size=4)
    # the first lacks nothing
    extract.run_jobs(extend.plan_jobs(plans, tmp_path / "c", add=True), batch_size=4)
    assert files_below(tmp_path / "c") == apart(pictures, "zarr")
    assert extend.plan_jobs(plans, tmp_path / "c", add=True) == []


@pytest.mark.slow
def test_views_of_one_and_a_new_teacher_are_two_commands(photos: Path, tmp_path: Path) -> None:
    extract.run(make(photos), tmp_path / "c", batch_size=4)
    with pytest.raises(
        UsageError, match=r"views 2 to 3 of synthetic.*, views 0 to 1 of timm.* in several commands"
    ):
        extend.plan_jobs(
            [make(photos, views=4), make(photos, VIT, views=4)], tmp_path / "c", add=True
        )


@pytest.mark.slow
def test_another_cache_in_out_is_refused(photos: Path, tmp_path: Path) -> None:
    extract.run(make(photos), tmp_path / "c", batch_size=4)
    before = files_below(tmp_path / "c")
    plans = [make(photos, name, policy=Policy(size=28, seed=1)) for name in (SYNTHETIC, VIT)]
    with pytest.raises(IdentityError, match=r"holds another cache.*policy\.seed"):
        extend.plan_jobs(plans, tmp_path / "c", add=False)
    assert files_below(tmp_path / "c") == before


@pytest.mark.slow
def test_room_is_asked_for_all_of_them(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = extend.plan_jobs([make(photos), make(photos, VIT)], tmp_path / "c", add=False)
    both = sum(job.plan.view_bytes * 2 * 11 for job in jobs)
    monkeypatch.setattr(target_folder, "_SPARE_BYTES", 0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=both - 1))
    with pytest.raises(UserError, match="the cache needs"):
        extract.run_jobs(jobs, batch_size=4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=both))
    extract.run_jobs(jobs, batch_size=4)


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command(featcache_command: Callable[..., Ran], pictures: Path, tmp_path: Path) -> None:
    base = (
        "--images",
        pictures,
        "--size",
        28,
        "--views",
        2,
        "--rows-per-shard",
        5,
        "--batch-size",
        4,
        "--workers",
        2,
    )
    weights = ("--weights", f"{VIT}=random:0")
    both = (
        "--teacher",
        SYNTHETIC,
        "--teacher",
        VIT,
        *weights,
        "--levels",
        "last:2",
        "--levels",
        f"{VIT}=-1,-3",
    )
    ran = featcache_command("extract", *base, *both, "--out", tmp_path / "a", "--dry-run", "--json")
    assert ran.status == 0, ran.err
    promised = ran.out
    ran = featcache_command("extract", *base, *both, "--out", tmp_path / "a", "--json")
    assert ran.status == 0, ran.err
    assert (
        promised.split('"bytes": ')[1].split(",")[0] == ran.out.split('"bytes": ')[1].split(",")[0]
    )
    assert f"{VIT}" in ran.out
    assert "random:0" in ran.err
    for options in (
        ("--teacher", SYNTHETIC, "--levels", "last:2"),
        ("--add", "--teacher", VIT, *weights, "--levels", "4,6"),
    ):
        assert featcache_command("extract", *base, *options, "--out", tmp_path / "b").status == 0
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")
    assert verify.verify_cache(tmp_path / "a") == ([], 6)
    assert (
        "was complete already"
        in featcache_command("extract", *base, *both, "--out", tmp_path / "a").out
    )


@pytest.mark.slow
def test_two_processes_share_a_pass(
    pictures: Path, tmp_path: Path, start: Callable[..., Running]
) -> None:
    """Leases are taken for each teacher's shard apart; whoever comes second does the rest, or
    nothing."""
    base = (
        "--images",
        pictures,
        "--size",
        28,
        "--views",
        2,
        "--rows-per-shard",
        2,
        "--batch-size",
        4,
        "--workers",
        2,
    )
    both = ("--teacher", SYNTHETIC, "--teacher", NINE, "--levels", "last:2")
    before = "from featcache.extraction import shard_queue; shard_queue.WAIT_S = 0.05"
    runs = [
        start("extract", *base, *both, "--out", tmp_path / "c", before=before) for _ in range(3)
    ]
    assert [run.wait() for run in runs] == [0, 0, 0], [run.said for run in runs]
    plans = [make(pictures, name, rows_per_shard=2) for name in (SYNTHETIC, NINE)]
    assert files_below(tmp_path / "c") == files_below(one_by_one(plans, tmp_path / "d"))


def test_values_for_each_teacher() -> None:
    names = ("clip-b16", "timm:x,a=1", "timm:x")
    assert extraction_options.per_teacher("--levels", (), names) == dict.fromkeys(names)
    found = extraction_options.per_teacher(
        "--levels", ("timm:x,a=1=all", "last:2", "timm:x=-1", "last:3"), names
    )
    assert found == {"clip-b16": "last:3", "timm:x,a=1": "all", "timm:x": "-1"}
    assert (
        extraction_options.weights_per_teacher(("random:0", "timm:x=w=1.pt"), names)["timm:x"]
        == "w=1.pt"
    )
    assert extraction_options.weights_per_teacher(("a.pt",), names[:1]) == {"clip-b16": "a.pt"}
    with pytest.raises(
        UsageError,
        match=r"--weights 'a\.pt': 3 teachers are given; name one, as in .*clip-b16=a\.pt",
    ):
        extraction_options.weights_per_teacher(("a.pt",), names)
    with pytest.raises(UsageError, match="'clip-b16' is given twice"):
        extraction_options.per_teacher("--levels", (), ("clip-b16", "clip-b16"))


# ---------------------------------------------------------------- caches extracted apart


def test_caches_extracted_apart_are_joined_on_equal_boxes(
    photos: Path, pictures: Path, tmp_path: Path
) -> None:
    """Other teachers, other sizes, other shards, more pictures and more views: the crops are the
    same."""
    extract.run(make(photos), tmp_path / "a", batch_size=4)
    extract.run(make(pictures, VIT, rows_per_shard=3, views=3), tmp_path / "b", batch_size=4)
    with featcache.open(tmp_path / "a") as a, featcache.open(tmp_path / "b") as b:
        ours, theirs = pairing.pair(a, b)
        assert len(ours) == 11
        assert [a.keys[i] for i in ours] == [b.keys[i] for i in theirs]
        for view in range(2):
            one, other = (
                c.read(rows, view, ["crop", "pixel_hash"]) for c, rows in ((a, ours), (b, theirs))
            )
            np.testing.assert_array_equal(one["crop"], other["crop"])
            np.testing.assert_array_equal(one["pixel_hash"], other["pixel_hash"])


@pytest.mark.slow
def test_caches_of_other_crops_are_not_joined(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "new.png").write_bytes((photos / "rgb.png").read_bytes())
    extract.run(make(photos), tmp_path / "a", batch_size=4)
    extract.run(make(photos, policy=Policy(size=28, seed=1)), tmp_path / "b", batch_size=4)
    extract.run(make(other), tmp_path / "c", batch_size=4)
    a, b, c = (featcache.open(tmp_path / name) for name in "abc")
    with (
        a,
        b,
        pytest.raises(
            IdentityError, match=r"'bits', view 0: crop is \[.*the same policy and --seed"
        ),
    ):
        pairing.pair(a, b)
    with a, c, pytest.raises(IdentityError, match="no picture in common"):
        pairing.pair(a, c)


def test_the_parts_of_a_pass_are_planned_like_additions(photos: Path, tmp_path: Path) -> None:
    base, part = extend.plan_jobs(
        [make(photos), make(photos, VIT, pixels=True)], tmp_path / "c", add=False
    )
    assert base.out == tmp_path / "c"
    assert part.out.parent == tmp_path / "c/parts"
    assert (part.plan.views, part.plan.pixels) == (2, False)
