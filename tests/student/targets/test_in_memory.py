"""Targets in memory: the same batches as from the cache, one copy for the processes of a machine,
what is refused."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from featcache import rng
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from student.data.loader import Loader
from student.recipes import TargetSpec
from student.targets import in_memory
from student.targets.cached import CachedTargets
from tests import student_fixtures as fx
from tests.test_end_to_end import launch


@pytest.mark.parametrize(
    ("path", "tokens", "pixels"),
    [("cache", None, False), ("ranked", 5, False), ("ranked", None, True)],
)
def test_batches_are_those_of_the_cache(
    path: str, tokens: int | None, pixels: bool, monkeypatch: Any
) -> None:
    """To the byte, over every view; and nothing is read from the cache any more."""
    cache = Cache(fx.cache_path() if path == "cache" else fx.ranked_path())
    spec = TargetSpec(
        teacher=fx.TEACHER, levels=(2, 4), fields=("features", "mask_order"), patches=16
    )
    source = open_source(fx.pictures())
    rows = cache.keys.find(source.keys)[3:20]  # not all, and not in the cache's order
    made = [
        CachedTargets(cache, spec, rows[::-1], tokens=tokens, stored_pixels=pixels)
        for _ in range(2)
    ]
    numbers = np.arange(3, 20)[::-1]
    loaders = [
        Loader(
            source=source,
            targets=each,
            pictures=numbers,
            digests=rng.key_digests(source.keys[i] for i in numbers),
            seed=0,
            batch_size=5,
            check_fraction=0,
        )
        for each in made
    ]
    fx.fresh_state()
    size = in_memory.load(made[1], Accelerator(cpu=True))
    with ThreadPoolExecutor(2) as pool:
        before = [loaders[0].batch(step, 0, pool) for step in range(9)]
        whole = Cache.read

        def nothing(self: Cache, at: Any, *args: Any) -> Any:
            assert not len(at)  # but for the shapes of its arrays
            return whole(self, at, *args)

        monkeypatch.setattr(Cache, "read", nothing)
        for step, expected in enumerate(before):
            host = loaders[1].batch(step, 0, pool)
            assert host.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_array_equal(host[name], values, err_msg=name)
    stored = sum(before[0][name][0].nbytes for name in made[0].fields)
    assert fx.VIEWS * 17 * stored <= size < fx.VIEWS * 17 * stored + 64 * len(made[0].fields)


@pytest.mark.slow
def test_a_run_is_the_same(tmp_path: Path) -> None:
    common = (
        "--cache",
        fx.cache_path(),
        "--images",
        fx.pictures(),
        "--steps",
        "6",
        "--batch-size",
        "8",
    )
    fx.good(fx.train("mralign", tmp_path / "a", *common))
    ran = fx.good(fx.train("mralign", tmp_path / "b", *common, "--resident"))
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    assert fx.same_weights(tmp_path / "a", tmp_path / "b")
    assert "GiB of targets were read into memory" in ran.err


def test_what_does_not_fit_or_is_not_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (
        "--cache",
        fx.cache_path(),
        "--images",
        fx.pictures(),
        "--steps",
        "1",
        "--resident",
    )
    assert (
        "none are read here"
        in fx.train("maskalign", tmp_path / "a", *common, "--teacher", "online").line
    )
    limit = tmp_path / "memory.max"
    limit.write_text("1000\n")
    monkeypatch.setattr(in_memory, "_LIMIT", limit)
    line = fx.train("maskalign", tmp_path / "b", *common).line
    assert "--resident:" in line
    assert "do not fit" in line
    assert not (tmp_path / "b").exists()
    limit.write_text("max\n")
    fx.good(fx.train("maskalign", tmp_path / "b", *common))


@pytest.mark.slow
def test_memory_of_another_process(tmp_path: Path) -> None:
    """Two processes: the second maps what the first has loaded, and both train as without."""
    options = (
        "--cache",
        str(fx.cache_path()),
        "--images",
        str(fx.pictures()),
        "--batch-size",
        "4",
        "--device",
        "cpu",
    )
    settings = [part for text in fx.RECIPES["maskalign"] for part in ("--set", text)]
    train = ["student", "train", "--recipe", "maskalign", *options, *settings, "--steps", "4"]
    for name, more in (("a", []), ("b", ["--resident"])):
        ran = launch([*train, *more, "--out", str(tmp_path / name)])
        assert ran.returncode == 0, ran.stderr
    assert fx.losses(tmp_path / "a") == fx.losses(tmp_path / "b")
    assert fx.same_weights(tmp_path / "a", tmp_path / "b")


def test_rows_share_their_memory_and_nothing_is_left_behind() -> None:
    """The arrays lie in the memory given, aligned, and do not overlap."""
    layout = {"a": ((3,), np.dtype("u1")), "b": ((5, 2), np.dtype("f2")), "c": ((), np.dtype("u8"))}
    memory = mmap.mmap(-1, 4096)
    rows = in_memory.SharedRows(layout, 2, 7, memory)
    for value, array in enumerate(rows.arrays.values(), 1):
        assert array.ctypes.data % 64 == 0
        array[:] = value
    for value, (name, array) in enumerate(rows.arrays.items(), 1):
        assert array.shape == (2, 7, *layout[name][0])
        assert (array == value).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_large_rows_are_copied_by_several_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 x 5 rows of 200 kB, a batch of 7 in any order, twice into the same memory."""
    monkeypatch.setattr(in_memory, "_THREADS", threads)
    rows = in_memory.SharedRows(
        {"a": ((100_000,), np.dtype("<u2"))}, 2, 5, mmap.mmap(-1, 2_000_000)
    )
    rows.arrays["a"][:] = np.random.default_rng(0).integers(0, 1 << 16, (2, 5, 100_000))
    out = np.ones((7, 100_000), np.uint16)
    for at, view in (
        ([4, 0, 2, 2, 1, 3, 4], [0, 1, 1, 0, 0, 1, 1]),
        ([0, 1, 2, 3, 4, 0, 1], [1, 1, 1, 0, 0, 0, 0]),
    ):
        got = rows.fetch(np.array(at), np.array(view), {"a": out})["a"]
        assert got is out
        np.testing.assert_array_equal(got, rows.arrays["a"][view, at])
        np.testing.assert_array_equal(
            rows.take("a", np.array(at), np.array(view)), rows.arrays["a"][view, at]
        )
