"""Samples are permuted and parted over processes; the pixel check finds pictures that changed."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache import rng
from featcache.errors import IdentityError, UserError
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.reading import join
from featcache.reading.cache import Cache
from featcache.views.fingerprint import pixel_hash, thumbnail
from featcache.views.policy import Policy
from student import checkpoint
from student.data.loader import Loader
from student.recipes import TargetSpec
from student.targets.cached import CachedTargets
from student.targets.online import OnlineTargets
from student.training import metrics
from tests import student_fixtures as fx


class Nothing:
    """A source of n pictures that are never read."""

    spec = "nothing"
    labels = classes = None

    def __init__(self, n: int) -> None:
        self.keys = [f"k{i}" for i in range(n)]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        raise AssertionError("the order needs no picture")


def order_of(
    n: int, *, seed: int = 0, batch: int = 1, accumulate: int = 1, world: int = 1, rank: int = 0
) -> Loader:
    targets: Any = None
    source = Nothing(n)
    return Loader(
        source=source,
        targets=targets,
        pictures=np.arange(n),
        digests=rng.key_digests(source.keys),
        seed=seed,
        batch_size=batch,
        accumulation=accumulate,
        world=world,
        rank=rank,
    )


def global_batches(
    n: int, seed: int, batch: int, accumulate: int, world: int, steps: int
) -> list[list[int]]:
    """Each step's pictures in the order micro-batch by micro-batch, process by process."""
    ranks = [
        order_of(n, seed=seed, batch=batch, accumulate=accumulate, world=world, rank=rank)
        for rank in range(world)
    ]
    return [
        [
            i
            for micro in range(accumulate)
            for each in ranks
            for i in each.rows(step, micro)[0].tolist()
        ]
        for step in range(steps)
    ]


# --- order ----------------------------------------------------------------------------------------


def test_literal_order_of_a_seed() -> None:
    """Computed outside this package: numpy.random.Philox with counter (block, 0, epoch, stream),
    key BLAKE2b-128 of 'rows:12', the stable argsort of its words. (numpy increments its counter
    before it draws.)"""
    loader = order_of(12, batch=4)
    first = [loader.rows(step) for step in range(3)]
    assert [row for rows, _ in first for row in rows.tolist()] == [
        10,
        3,
        4,
        9,
        7,
        6,
        1,
        5,
        2,
        11,
        8,
        0,
    ]
    assert [epoch for _, epoch in first] == [0, 0, 0]
    second = [loader.rows(step) for step in range(3, 6)]
    assert [row for rows, _ in second for row in rows.tolist()] == [
        2,
        3,
        4,
        8,
        7,
        6,
        1,
        0,
        10,
        9,
        5,
        11,
    ]
    assert [epoch for _, epoch in second] == [1, 1, 1]
    seven = order_of(12, seed=7, batch=12)
    assert seven.rows(3)[0].tolist() == [7, 0, 4, 5, 11, 6, 10, 3, 9, 8, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_an_epoch_shows_nothing_twice_and_all_but_a_rest(
    n: int, batch: int, seed: int, epoch: int
) -> None:
    batch = min(batch, n)
    loader = order_of(n, seed=seed, batch=batch)
    per = loader.steps_per_epoch
    rows = [loader.rows(step) for step in range(epoch * per, (epoch + 1) * per)]
    seen = [row for each, _ in rows for row in each.tolist()]
    assert {number for _, number in rows} == {epoch}
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(n))
    assert n - batch < len(seen) <= n


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(n=st.integers(8, 120), per=st.integers(1, 3), seed=st.integers(0, 99))
def test_processes_and_micro_batches_share_the_same_global_batches(
    n: int, per: int, seed: int
) -> None:
    """8 * per pictures a step, cut in every way into batch x accumulate x world: the same pictures
    and places."""
    total = 8 * per
    if total > n:
        total = 8
    steps = 2 * (n // total)
    whole = global_batches(n, seed, total, 1, 1, steps)
    for world in (1, 2, 4, 8):
        for accumulate in (1, 2, 4):
            if total % (world * accumulate) == 0:
                batch = total // world // accumulate
                assert global_batches(n, seed, batch, accumulate, world, steps) == whole


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_process_takes_as_many_steps(world: int) -> None:
    assert {
        order_of(101, batch=5, world=world, rank=rank).steps_per_epoch for rank in range(world)
    } == {101 // (5 * world)}


def test_seeds_and_epochs_differ() -> None:
    orders = {
        tuple(order_of(50, seed=seed, batch=50).rows(epoch)[0].tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_a_later_step_needs_no_earlier_one() -> None:
    """Resume by arithmetic: step 1,000 of a fresh loader is that of one which walked there."""
    walked = order_of(37, seed=3, batch=6)
    for step in range(1000):
        walked.rows(step)
    fresh = order_of(37, seed=3, batch=6)
    assert fresh.rows(1000)[0].tolist() == walked.rows(1000)[0].tolist()
    assert fresh.rows(1000)[1] == 1000 // 6


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(UserError) as caught:
        order_of(10, batch=3, accumulate=2, world=2)
    for part in ("12 pictures", "3 x 2", "2 processes", "has 10", "--batch-size"):
        assert part in str(caught.value)
    ran = fx.train(
        "maskalign",
        fx.root() / "never",
        "--cache",
        fx.cache_path(),
        "--batch-size",
        "25",
        "--steps",
        "1",
    )
    assert ran.status in (1, 2)
    assert "24" in ran.line
    assert "25" in ran.line
    assert not (fx.root() / "never").exists()


# --- batches --------------------------------------------------------------------------------------


def cached(
    source: Source, *, fraction: float = 1.0, tolerance: float = 0.0, batch: int = 8
) -> Loader:
    cache = fx.open_cache()
    spec = TargetSpec(
        teacher=fx.TEACHER, levels=(2, 4), fields=("features", "attention"), patches=16
    )
    targets = CachedTargets(cache, spec, cache.keys.find(source.keys), tolerance)
    digests = rng.key_digests(source.keys)
    return Loader(
        source=source,
        targets=targets,
        pictures=np.arange(len(source)),
        digests=digests,
        seed=0,
        batch_size=batch,
        check_fraction=fraction,
    )


def one_batch(loader: Loader, step: int = 0) -> dict[str, Any]:
    with ThreadPoolExecutor(2) as pool:
        return loader.batch(step, 0, pool)


def test_a_batch_holds_the_pixels_of_the_stored_views() -> None:
    """Decoded and replayed by hand with Pillow alone: crop, resize, flip."""
    source = open_source(fx.pictures())
    host = one_batch(cached(source))
    cache = fx.open_cache()
    for i, (key, view) in enumerate(zip(host["keys"], host["view"].tolist(), strict=True)):
        stored = cache.read(cache.keys.find([key]), view, ("crop", "flip"))
        top, left, height, width = stored["crop"][0].tolist()
        with Image.open(fx.pictures() / f"{key}.png") as picture:
            crop = picture.convert("RGB").crop((left, top, left + width, top + height))
        pixels = np.asarray(crop.resize((fx.SIZE, fx.SIZE), Image.Resampling.BICUBIC))
        pixels = pixels[:, ::-1] if stored["flip"][0] else pixels
        np.testing.assert_array_equal(host["pixels"][i], pixels)
    assert host["pixels"].dtype == np.uint8
    assert host["features"].shape == (8, 2, 17, 24)


def test_iterate_gives_the_batches_of_its_steps_in_order() -> None:
    loader = cached(open_source(fx.pictures()), batch=4)
    found = [host["at"].tolist() for host in loader.iterate(4, 9)]
    assert found == [loader.rows(step)[0].tolist() for step in range(4, 9)]
    assert list(loader.iterate(3, 3)) == []


def test_batches_lie_in_memory_that_is_used_again() -> None:
    """Twenty batches in the memory of four; each is what a batch of its own memory is, until the
    next is asked for."""
    loader = cached(open_source(fx.pictures()), batch=4)
    memory = set()
    for step, host in enumerate(loader.iterate(0, 20)):
        alone = one_batch(loader, step)
        assert host.keys() == alone.keys()
        for name, values in alone.items():
            np.testing.assert_array_equal(host[name], values, err_msg=name)
        memory.add((host["pixels"].ctypes.data, host["features"].ctypes.data))
    assert len(memory) == 4


def test_several_views_of_a_picture_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three views of each of four pictures a batch: each picture read once a batch, in all its
    views, and what the model gets is what lies under its key."""
    source = open_source(fx.pictures())
    loader = cached(source, batch=12)
    loader = replace(loader, repeats=3)
    assert (loader.global_batch, loader.steps_per_epoch) == (12, 6)
    reads: list[int] = []
    whole = type(source).read
    monkeypatch.setattr(
        type(source), "read", lambda self, index: reads.append(index) or whole(self, index)
    )
    cache, seen = fx.open_cache(), []
    for step in range(6):
        host = one_batch(loader, step)
        for first in range(0, 12, 3):
            assert len(set(host["keys"][first : first + 3])) == 1
            assert sorted(host["view"][first : first + 3]) == [0, 1, 2]
        seen += host["keys"][::3]
        stored = cache.read(cache.keys.find(host["keys"]), host["view"], ("features",), (2, 4))
        np.testing.assert_array_equal(host["features"], stored["features"])
    assert len(reads) == len(seen) == len(set(seen)) == 24
    assert one_batch(loader, 7)["round"].tolist() == [3, 4, 5] * 4  # of the second epoch


def test_repeats_that_cannot_be(tmp_path: Path) -> None:
    common = ("--cache", fx.cache_path(), "--images", fx.pictures(), "--steps", "1")
    more = fx.train("maskalign", tmp_path / "a", *common, "--aug-repeats", "4")
    assert "--aug-repeats 4: the cache stores 3 views" in more.line
    odd = fx.train("maskalign", tmp_path / "b", *common, "--aug-repeats", "3", "--batch-size", "8")
    assert "--batch-size 8 with --aug-repeats 3" in odd.line
    assert (more.status, odd.status) == (2, 2)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("options", [("--aug-repeats", "3"), ("--sampling", "block")])
def test_the_same_run_from_the_cache_and_with_the_teacher_in_the_loop(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    common = (
        "--cache",
        fx.cache_path(),
        "--images",
        fx.pictures(),
        "--steps",
        "4",
        "--batch-size",
        "6",
        *options,
    )
    fx.good(fx.train("maskalign", tmp_path / "a", *common, sets=("drop_path=0",)))
    fx.good(
        fx.train("maskalign", tmp_path / "b", *common, "--teacher", "online", sets=("drop_path=0",))
    )
    np.testing.assert_allclose(fx.losses(tmp_path / "a"), fx.losses(tmp_path / "b"), rtol=2e-3)
    name, value = options[0].removeprefix("--").replace("-", "_"), options[1]
    assert str(checkpoint.read_config(tmp_path / "a")["data"][name]) == value
    other = fx.train("maskalign", tmp_path / "a", *common[:-2], "--resume", sets=("drop_path=0",))
    assert f"data.{name}" in other.line


def test_a_walk_can_be_left_early() -> None:
    """No hang and no thread that keeps the process when the training loop stops in the middle."""
    walk = cached(open_source(fx.pictures()), batch=4).iterate(0, 1000)
    next(walk)
    walk.close()


# --- the pixel proof ------------------------------------------------------------------------------


def changed(folder: Path, name: str, change: Any) -> Source:
    """A copy of the pictures in which one is replaced by change(pixels)."""
    shutil.copytree(fx.pictures(), folder)
    with Image.open(folder / name) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    Image.fromarray(np.clip(change(pixels), 0, 255).astype(np.uint8)).save(folder / name)
    return open_source(folder)


def epochs_of(loader: Loader, epochs: int = fx.VIEWS) -> None:
    for _ in loader.iterate(0, epochs * loader.steps_per_epoch):
        pass


def test_another_picture_under_a_key_stops_with_key_and_difference(tmp_path: Path) -> None:
    source = changed(tmp_path / "p", "p07.png", lambda pixels: 255 - pixels)
    with pytest.raises(IdentityError) as caught:
        epochs_of(cached(source))
    text = str(caught.value)
    assert "'p07'" in text
    assert "levels of 255" in text
    assert "another picture" in text
    stated = float(text.split("differ by ")[1].split()[0])
    assert stated > 8


def test_the_difference_told_is_that_of_the_block_means(tmp_path: Path) -> None:
    """All pixels 5 levels brighter (from a range that does not clip): the mean difference is 5."""
    flat = tmp_path / "flat"
    fx.save_pictures(flat, count=2)
    for path in flat.iterdir():
        Image.new("RGB", (48, 40), (100, 120, 140)).save(path)
    fx.extract(flat, tmp_path / "c")
    Image.new("RGB", (48, 40), (105, 125, 145)).save(flat / "p01.png")
    ran = fx.train(
        "maskalign",
        tmp_path / "r",
        "--cache",
        tmp_path / "c",
        "--steps",
        "1",
        "--check-pixels",
        "1",
    )
    assert ran.status == 1
    assert "5.0 levels of 255, at most 5" in ran.line
    assert "--pixel-tolerance" in ran.line


def test_one_pixel_by_one_level_is_a_difference_too() -> None:
    """Without a tolerance every bit counts, also where the block means agree: a hash that misses
    stops the run."""
    loader = cached(open_source(fx.pictures()))
    host = one_batch(loader)
    at, view, pixels = int(host["at"][0]), int(host["view"][0]), host["pixels"][0]
    stored = int(loader.targets.pixel_hashes(host["at"][:1], host["view"][:1])[0])  # type: ignore[index]
    assert stored == pixel_hash(pixels)
    loader.targets.check_pixels(pixels, at, view, stored)
    unseen = (one_off(pixels, place) for place in np.ndindex(32, 32, 3))
    other = next(each for each in unseen if np.array_equal(thumbnail(each), thumbnail(pixels)))
    with pytest.raises(IdentityError, match=host["keys"][0]):
        loader.targets.check_pixels(other, at, view, stored)


def one_off(pixels: Any, place: tuple[int, ...]) -> Any:
    """A copy in which one value differs by one level."""
    out = pixels.copy()
    out[place] += 1 if out[place] < 255 else -1
    return out


def test_stored_pixels_are_compared_with_their_hash_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are, all pass; with one value of one picture off by one level, that picture is
    named."""
    cache = Cache(fx.ranked_path())
    spec = TargetSpec(
        teacher=fx.TEACHER, levels=(2, 4), fields=("features", "attention"), patches=16
    )
    targets = CachedTargets(cache, spec, np.arange(len(cache)), stored_pixels=True)
    source = join.StoredPixels(cache)
    loader = Loader(
        source=source,
        targets=targets,
        pictures=np.arange(len(cache)),
        digests=cache.keys.digests,
        seed=0,
        batch_size=24,
        check_fraction=1.0,
    )
    host = one_batch(loader)
    decoded = one_batch(cached(open_source(fx.pictures()), batch=24))
    assert host["keys"] == decoded["keys"]
    np.testing.assert_array_equal(host["pixels"], decoded["pixels"])
    # what only decoding needs is not read
    assert not {"crop", "flip", "jitter", "area"} & set(host)
    whole = Cache.read

    def read(self: Cache, rows: Any, *args: Any, **others: Any) -> Any:
        out = whole(self, rows, *args, **others)
        if "pixels" in out:
            place = np.flatnonzero(np.asarray(rows) == 7)
            out["pixels"][place, 3, 4, 1] ^= 1
        return out

    monkeypatch.setattr(Cache, "read", read)
    with pytest.raises(IdentityError, match="'p07'"):
        one_batch(loader)
    loader.check_fraction = 0.0
    one_batch(loader)


def test_batches_begun_at_a_time_come_in_order_with_their_own_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If all is read, two are begun at a time: the second may be there first, and memory is used
    again."""
    cache = Cache(fx.ranked_path())
    spec = TargetSpec(
        teacher=fx.TEACHER, levels=(2, 4), fields=("features", "attention"), patches=16
    )
    targets = CachedTargets(cache, spec, np.arange(len(cache)), stored_pixels=True)
    loader = Loader(
        source=join.StoredPixels(cache),
        targets=targets,
        pictures=np.arange(len(cache)),
        digests=cache.keys.digests,
        seed=0,
        batch_size=8,
    )
    alone = [one_batch(loader, step) for step in range(12)]
    whole, lock, calls = Cache.read, threading.Lock(), 0
    under_way: set[int] = set()
    most = 0

    def slow(self: Cache, rows: Any, *args: Any, **others: Any) -> Any:
        nonlocal most, calls
        with lock:
            calls += 1
            under_way.add(threading.get_ident())
            most = max(most, len(under_way))
        time.sleep(0.02 * (calls % 3))
        out = whole(self, rows, *args, **others)
        with lock:
            under_way.discard(threading.get_ident())
        return out

    monkeypatch.setattr(Cache, "read", slow)
    for host, other in zip(loader.iterate(0, 12), alone, strict=True):
        assert host["keys"] == other["keys"]
        for name in ("at", "view", "pixels", "features", "attention"):
            np.testing.assert_array_equal(host[name], other[name])
    assert most == 2


def test_a_source_without_pictures_says_so() -> None:
    source = join.StoredPixels(Cache(fx.ranked_path()))
    assert (len(source), list(source.keys)[:2], source.labels, source.classes) == (
        24,
        ["p00", "p01"],
        None,
        None,
    )
    with pytest.raises(UserError, match="views of it, not the picture"):
        source.read(3)


def test_a_tolerance_lets_small_differences_pass_and_is_recorded(tmp_path: Path) -> None:
    changed(tmp_path / "p", "p07.png", lambda pixels: pixels + np.where(pixels < 128, 3, -3))
    common = (
        "--cache",
        fx.cache_path(),
        "--images",
        tmp_path / "p",
        "--check-pixels",
        "1",
        "--batch-size",
        "24",
    )
    strict = fx.train("maskalign", tmp_path / "strict", *common, "--steps", "3")
    assert strict.status == 1
    assert "'p07'" in strict.line
    tight = fx.train(
        "maskalign", tmp_path / "tight", *common, "--steps", "3", "--pixel-tolerance", "1"
    )
    assert tight.status == 1
    fx.good(
        fx.train("maskalign", tmp_path / "wide", *common, "--steps", "3", "--pixel-tolerance", "4")
    )
    assert len(metrics.read(tmp_path / "wide")) == 3
    assert checkpoint.read_config(tmp_path / "wide")["targets"]["pixel_tolerance"] == 4.0


@pytest.mark.slow
def test_the_checked_share_is_the_one_asked_for() -> None:
    """Drawn from (seed, epoch, key): about an eighth of 2,400 views, none at 0, all at 1."""
    seen: list[int] = []

    class Watch(CachedTargets):
        def check_pixels(self, pixels: Any, index: int, view: int, stored_hash: int) -> None:
            seen.append(index)

    source = open_source(fx.pictures())
    for fraction, low, high in ((0.0, 0, 0), (1.0, 24 * 40, 24 * 40), (1 / 8, 70, 175)):
        seen.clear()
        loader = cached(source, fraction=fraction)
        watch = Watch(loader.targets.cache, loader.targets.spec, loader.targets.rows)  # type: ignore[attr-defined]
        loader.targets = watch
        epochs_of(loader, 40)
        assert low <= len(seen) <= high, (fraction, len(seen))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_bad_picture_is_named(mode: str, tmp_path: Path) -> None:
    shutil.copytree(fx.pictures(), tmp_path / "p")
    path = tmp_path / "p" / "p05.png"
    path.write_bytes(path.read_bytes()[:200])
    options = (
        "--images",
        tmp_path / "p",
        "--cache",
        fx.cache_path(),
        "--steps",
        "3",
        "--batch-size",
        "8",
    )
    ran = fx.train("maskalign", tmp_path / "run", *options, "--teacher", mode)
    assert ran.status == 1
    assert "'p05'" in ran.line


def test_a_picture_that_vanished_is_named(tmp_path: Path) -> None:
    shutil.copytree(fx.pictures(), tmp_path / "p")
    source = open_source(tmp_path / "p")
    (tmp_path / "p" / "p11.png").unlink()
    with pytest.raises(UserError, match="'p11'"):
        epochs_of(cached(source), 1)


def test_views_of_another_size_for_the_teacher() -> None:
    """A /14 teacher on the same grid: the same box, rendered twice."""

    class Small:
        input_px = 28

    source = open_source(fx.pictures())
    spec = TargetSpec(teacher="x", levels=(), fields=("attention",), patches=16)
    teacher: Any = Small()
    policy = Policy(size=fx.SIZE)
    targets = OnlineTargets(policy, spec, teacher, 3)
    host = one_batch(
        Loader(
            source=source,
            targets=targets,
            pictures=np.arange(24),
            digests=rng.key_digests(source.keys),
            seed=0,
            batch_size=4,
        )
    )
    assert host["pixels"].shape == (4, 32, 32, 3)
    assert host["teacher_pixels"].shape == (4, 28, 28, 3)
