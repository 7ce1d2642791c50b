"""A cache is read: every request against plain zarr and numpy, and impossible requests.

Small caches of two shards (5 + 3 rows, V 3, L 3, T 5, D 8) are written by the stores themselves,
numbers by numpy, in image order and as ranked tokens.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache
from featcache.errors import UsageError, UserError
from featcache.reading import range_reader
from featcache.reading.cache import Cache
from featcache.reading.range_reader import choose_io
from featcache.storage import checksums, json_file, manifest, statistics
from featcache.storage.store import SHARDS, STORES, Array, get_store
from featcache.views.policy import Policy
from tests.conftest import copy_tree, python

VIEWS, LEVELS, TOKENS, WIDTH = 3, (2, 5, 6), 5, 8
KEYS = ["b/ü", "a", "z.1", "日", "", "c" * 300, "n/1", "n/11"]
SIZES = {"000000": 5, "000001": 3}
ROW_VIEW = ("row", "view")
PLAIN = [
    Array(
        "features", "<f2", (3, TOKENS, WIDTH), (*ROW_VIEW, "level", "token", "channel"), split=True
    ),
    Array(
        "feature_stats",
        "<f4",
        (3, TOKENS, 2),
        (*ROW_VIEW, "level", "token", "mean_std"),
        split=True,
    ),
    Array("attention", "<f4", (4,), (*ROW_VIEW, "patch")),
    Array("pixel_hash", "<i8", (), ROW_VIEW),
    Array("flip", "|u1", (), ROW_VIEW),
    Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
]
FIELDS = [array.name for array in PLAIN]


def expected() -> dict[str, np.ndarray]:
    """All numbers of a cache, (8, V, ...) or (8, ...)."""
    random = np.random.default_rng(0)
    return {
        "features": random.standard_normal((8, VIEWS, 3, TOKENS, WIDTH)).astype("<f2"),
        "feature_stats": random.standard_normal((8, VIEWS, 3, TOKENS, 2)).astype("<f4"),
        "attention": random.random((8, VIEWS, 4)).astype("<f4"),
        "pixel_hash": random.integers(0, 2**64, (8, VIEWS), np.uint64),
        "flip": random.integers(0, 2, (8, VIEWS)).astype("|u1"),
        "source_size": random.integers(1, 999, (8, 2)).astype("<i4"),
    }


NUMBERS = expected()


def write_cache(
    path: Path,
    name: str = "zarr",
    tokens: str = "raster",
    sizes: Mapping[str, int] = MappingProxyType(SIZES),
) -> Path:
    """A cache in the store `name`, its features ranked or not (which the numbers do not show)."""
    (path / SHARDS).mkdir(parents=True)
    arrays = [*PLAIN, *checksums.checksum_arrays(PLAIN, 3, TOKENS, ranked=tokens == "ranked")]
    firsts = [sum(list(sizes.values())[:i]) + i for i in range(len(sizes))]
    shards = [
        {"name": shard, "first": first, "count": count + 1}
        for (shard, count), first in zip(sizes.items(), firsts, strict=True)
    ]
    about = make_manifest(name, tokens, arrays, shards)
    json_file.write_json(path / manifest.NAME, about)
    first = 0
    for shard, count in sizes.items():
        writer = get_store(name).writer(path, shard, arrays, VIEWS, manifest.shard_form(about))
        rows = slice(first, first + count)
        items = {a.name: NUMBERS[a.name][rows].reshape(-1, *a.item) for a in PLAIN}
        items["source_size"] = np.repeat(items["source_size"], VIEWS, 0)
        found = statistics.Statistics()
        found.add(
            items, statistics.FeatureStatistics(-1.0, 1.0, np.ones((count * VIEWS, 3), np.float32))
        )
        keys = [key for key in KEYS[rows] for _ in range(VIEWS)]
        writer.append(keys, {**items, **checksums.compute_checksums(arrays, items)})
        writer.finish([{"key": f"bad{shard}", "reason": "cut"}], found.summary())
        first += count
    return path


def make_manifest(
    name: str, tokens: str, arrays: list[Array], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    identity = {
        "pixel_path": {"decoder": "pillow"},
        "teacher": {"name": "synthetic", "patches": TOKENS - 1, "width": WIDTH, "depth": 6},
        "levels": list(LEVELS),
        "views": VIEWS,
        "store": name,
        "codec": "fp16",
        "tokens": tokens,
        "order": "attentive",
        "rows_per_shard": 6,
        "eps": 1e-5,
        "policy": Policy(size=28).as_dict(),
        "pictures": {"count": 10, "keys_digest": "0"},
    }
    provenance = {"weights": "random:4", "source": "x"}
    return manifest.make(identity, provenance, {a.name: a.as_dict() for a in arrays}, shards, {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A cache for each store and order of tokens."""
    root = tmp_path_factory.mktemp("reader")
    orders = [(name, tokens) for name in STORES for tokens in ("raster", "ranked")]
    return {
        (name, tokens): write_cache(root / f"{name}-{tokens}", name, tokens)
        for name, tokens in orders
    }


@pytest.fixture(scope="module")
def folder(folders: dict[tuple[str, str], Path]) -> Path:
    return folders["zarr", "raster"]


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return featcache.open(folder)


def test_what_zarr_reads_is_what_was_written(folders: dict[tuple[str, str], Path]) -> None:
    """The reference of this file, `NUMBERS`, by a library of others."""
    for tokens in ("raster", "ranked"):
        groups = [
            zarr.open_group(folders["zarr", tokens] / SHARDS / f"{shard}.zarr", mode="r")
            for shard in SIZES
        ]
        for name, values in NUMBERS.items():
            stored = np.concatenate([group[name][:] for group in groups])
            np.testing.assert_array_equal(stored.view(values.dtype), values)


def reference(
    name: str, rows: list[int], views: list[int], slots: list[int], tokens: int | None
) -> np.ndarray:
    values = NUMBERS[name]
    picked = values[rows] if name == "source_size" else values[rows, views]
    if name in ("features", "feature_stats"):
        picked = picked[:, slots, : tokens or TOKENS]
    return picked


def test_facts(cache: Cache) -> None:
    assert len(cache) == 8
    assert list(cache.keys) == KEYS
    assert sorted(cache.fields) == sorted(FIELDS)
    assert cache.levels == LEVELS
    assert cache.complete
    assert cache.quarantined == [
        {"key": "bad000000", "reason": "cut"},
        {"key": "bad000001", "reason": "cut"},
    ]
    assert "RANDOM WEIGHTS random:4" in repr(cache)
    assert cache.manifest["identity"]["levels"] == [2, 5, 6]


REQUEST = st.integers(0, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 7), min_size=n, max_size=n),
        st.one_of(
            st.integers(0, VIEWS - 1), st.lists(st.integers(0, VIEWS - 1), min_size=n, max_size=n)
        ),
        st.one_of(st.none(), st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4)),
        st.one_of(st.none(), st.integers(1, TOKENS)),
        st.lists(st.sampled_from(FIELDS), min_size=1, max_size=6, unique=True),
        st.booleans(),
    )
)
HOW = st.tuples(
    st.sampled_from([(name, tokens) for name in STORES for tokens in ("raster", "ranked")]),
    st.sampled_from([1.0, 0.5, 0.0]),
    st.sampled_from(["buffered", "streaming", "direct", "auto"]),
    st.integers(1, 4),
    st.booleans(),  # small parts in several threads, which megabytes would be needed for
    st.booleans(),  # rows one by one, which large items would be needed for
)


@functools.cache
def opened(path: Path, verify_rows: float, io: str, threads: int) -> Cache:
    return featcache.open(path, verify_rows=verify_rows, io=io, threads=threads)


@functools.cache
def knows_direct(folder: Path) -> bool:
    """Return whether the file system of a folder reads past the page cache."""
    try:
        with featcache.open(folder, io="direct") as cache:
            cache.read([0])
    except UserError as error:
        if "O_DIRECT" not in str(error):
            raise
        return False
    return True


@settings(max_examples=250)
@given(request=REQUEST, how=HOW)
def test_read_equals_numpy(
    folders: dict[tuple[str, str], Path], request: tuple, how: tuple
) -> None:
    rows, view, levels, tokens, fields, given_out = request
    which, verify_rows, io, threads, several, single = how
    io = "buffered" if io == "direct" and not knows_direct(folders[which]) else io
    cache = opened(folders[which], verify_rows, io, threads)
    views = view if isinstance(view, list) else [view] * len(rows)
    slots = [LEVELS.index(level) for level in (LEVELS if levels is None else levels)]
    wanted = {name: reference(name, rows, views, slots, tokens) for name in fields}
    out = (
        {name: np.full(values.shape, 77, values.dtype) for name, values in wanted.items()}
        if given_out
        else None
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(range_reader, "_INLINE_BYTES", 0 if several else 1 << 20)
        patched.setattr(range_reader, "_SMALL_ITEM_BYTES", 0 if single else 4096)
        got = cache.read(rows, view, fields, levels=levels, tokens=tokens, out=out)
    assert list(got) == fields
    for name, values in wanted.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values)
        if out is not None:
            assert got[name] is out[name]


def test_only_some_fields_may_have_a_place(cache: Cache) -> None:
    out = {"flip": np.full(8, 77, np.uint8)}
    got = cache.read(range(8), 1, ["features", "flip"], out=out)
    assert got["flip"] is out["flip"]
    np.testing.assert_array_equal(got["flip"], NUMBERS["flip"][:, 1])
    np.testing.assert_array_equal(got["features"], NUMBERS["features"][:, 1])


def test_every_kind_of_row_number(cache: Cache) -> None:
    for rows in (3, [3], (3,), np.array([3]), np.int32(3), np.array([3], np.uint8), range(3, 4)):
        np.testing.assert_array_equal(cache.read(rows)["features"], NUMBERS["features"][[3], 0])
    assert cache.read([])["features"].shape == (0, 3, TOKENS, WIDTH)


def test_reads_agree_with_plain_zarr(cache: Cache, folder: Path) -> None:
    group = zarr.open_group(folder / SHARDS / "000001.zarr", mode="r")
    for name in FIELDS:
        got = cache.read([5, 6, 7], 1, [name])[name]
        stored = group[name][:].view(got.dtype)
        np.testing.assert_array_equal(got, stored if name == "source_size" else stored[:, 1])


def test_threads_read_the_same(folder: Path) -> None:
    with featcache.open(folder) as cache, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(cache.read, [i % 8, (3 * i) % 8], i % 3) for i in range(60)]
        for i, job in enumerate(jobs):
            np.testing.assert_array_equal(
                job.result()["features"], NUMBERS["features"][[i % 8, (3 * i) % 8], i % 3]
            )


def test_keys_find_rows(cache: Cache) -> None:
    assert cache.keys.find(["n/1", "nowhere", "b/ü", "", "n/111", "c" * 300]).tolist() == [
        6,
        -1,
        0,
        4,
        -1,
        5,
    ]
    assert cache.keys.find([]).tolist() == []
    assert cache.keys.find(KEYS).tolist() == list(range(8))
    assert cache.keys[2] == "z.1"
    assert cache.keys[-1] == "n/11"
    assert cache.keys[1:3] == ["a", "z.1"]
    assert cache.keys[np.int64(3)] == "日"
    with pytest.raises(IndexError):
        _ = cache.keys[8]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"rows": [8]}, "0 to 7"),
        ({"rows": [-1]}, "0 to 7"),
        ({"rows": [[0, 1]]}, "rows"),
        ({"rows": [1.5]}, "rows"),
        ({"rows": [True, False, True, False, False, False, False, False]}, "rows"),
        ({"rows": [[0], [1, 2]]}, "rows must be whole numbers"),
        ({"rows": [0], "view": 3}, "0 to 2"),
        ({"rows": [0], "view": -1}, "0 to 2"),
        ({"rows": [0, 1], "view": [0, 1, 2]}, "view"),
        ({"rows": [0], "fields": ("feature",)}, "did you mean features"),
        ({"rows": [0], "fields": ("key",)}, "unknown field 'key'"),
        ({"rows": [0], "fields": ("row_crc",)}, "unknown field 'row_crc'"),
        ({"rows": [0], "fields": "features"}, "give ['features']"),
        ({"rows": [0], "fields": None}, "fields must be a list of names"),
        ({"rows": [0], "fields": [5]}, "fields must be a list of names"),
        ({"rows": [0], "levels": 5}, "levels must be a list"),
        ({"rows": [0], "levels": np.array([[2, 5]])}, "levels must be a list"),
        ({"rows": [0], "tokens": True}, "tokens must be a whole number"),
        ({"rows": [0], "levels": [3]}, "stored are [2, 5, 6]"),
        ({"rows": [0], "levels": [0]}, "stored are [2, 5, 6]"),
        ({"rows": [0], "tokens": 0}, "1 to 5"),
        ({"rows": [0], "tokens": 6}, "1 to 5"),
        ({"rows": [0], "tokens": 1.0}, "tokens must be a whole number, 1.0"),
        (
            {"rows": [0], "out": [np.zeros((1, 3, 5, 8), "<f2")]},
            "a dict of numpy arrays by field, list is given",
        ),
        ({"rows": [0], "out": {"features": [0.0]}}, "a dict of numpy arrays by field"),
        (
            {"rows": [0], "out": {"featurs": np.zeros((1, 3, 5, 8), "<f2")}},
            "out['featurs'] is not asked for",
        ),
        ({"rows": [0], "out": {"features": np.zeros((2, 3, 5, 8), "<f2")}}, "out['features']"),
        ({"rows": [0], "out": {"features": np.zeros((1, 3, 5, 8), "<f4")}}, "out['features']"),
        (
            {"rows": [0], "out": {"features": np.zeros((1, 3, 8, 5), "<f2").swapaxes(2, 3)}},
            "out['features']",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_impossible_requests_say_what_is_possible(
    cache: Cache, request_: dict, message: str
) -> None:
    """A mask of booleans or a float would otherwise be taken for other row numbers, silently."""
    with pytest.raises(UsageError) as caught:
        cache.read(**request_)
    assert message in str(caught.value)


def test_other_impossible_requests(cache: Cache) -> None:
    for option in (
        {"threads": "2"},
        {"threads": 0},
        {"verify_rows": "1"},
        {"verify_rows": float("nan")},
    ):
        with pytest.raises(UsageError, match=next(iter(option))):
            featcache.open(cache.path, **option)
    with pytest.raises(UsageError, match="unknown teacher 'nope'; known: synthetic"):
        cache.tail("nope")
    with pytest.raises(UsageError, match=r"give \['a'\]"):
        cache.keys.find("a")
    np.testing.assert_array_equal(
        cache.read([1], levels=np.array([6, 2]), tokens=np.int64(2))["features"],
        NUMBERS["features"][[1], 0][:, [2, 0], :2],
    )


# ---------------------------------------------------------------- states of a cache


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return copy_tree(folder, tmp_path / "copy")


def test_an_unfinished_cache_opens_with_what_is_complete(copy: Path) -> None:
    (copy / SHARDS / "000000.json").unlink()
    with featcache.open(copy) as cache:
        assert not cache.complete
        assert list(cache.keys) == KEYS[5:]
        np.testing.assert_array_equal(cache.read([0], 2)["features"], NUMBERS["features"][[5], 2])


def test_a_cache_may_be_read_only_and_is_left_as_it_was(copy: Path) -> None:
    before = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    with featcache.open(copy) as cache:
        cache.read(range(8), 1, FIELDS)
    assert sorted(path.relative_to(copy) for path in copy.rglob("*")) == before


def test_what_is_no_cache(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="no cache at"):
            featcache.open(path)


def test_torch_stays_out(folder: Path) -> None:
    """`import featcache`, a read, and `featcache info` work without importing torch or zarr."""
    code = """
import json, sys
import featcache
with featcache.open(sys.argv[1]) as cache:
    cache.read([0, 7], 1)
sys.argv = ["featcache", "info", sys.argv[1]]
from featcache.cli import main
main()
heavy = {"torch", "timm", "open_clip", "torchvision", "zarr", "student"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    ran = python(code, folder)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == []
    assert "RANDOM WEIGHTS" in ran.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads 0: a whole number, at least 1"),
        ({"verify_rows": 1.5}, "verify_rows 1.5: a share from 0 to 1"),
        ({"verify_rows": -0.1}, "verify_rows"),
        ({"verify_rows": float("nan")}, "verify_rows"),
        ({"io": "mmap"}, "auto, buffered, streaming, direct"),
    ],
    ids=str,
)
def test_impossible_options(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        featcache.open(folder, **options)
    assert message in str(caught.value)


def test_auto_streams_what_is_larger_than_memory() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert choose_io("auto", memory // 2) == "buffered"
    assert choose_io("auto", 2 * memory) == "streaming"
    assert choose_io("direct", 1) == "direct"


def test_close_and_read_again(folder: Path) -> None:
    cache = featcache.open(folder)
    for _ in range(3):
        np.testing.assert_array_equal(
            cache.read([0, 7], 1)["features"], NUMBERS["features"][[0, 7], 1]
        )
        cache.close()
        cache.close()


def test_keys_survive_a_process_boundary(cache: Cache) -> None:
    """Loaders hand keys to workers."""
    assert list(pickle.loads(pickle.dumps(cache.keys))) == KEYS
