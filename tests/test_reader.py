"""Reading a cache: every request against plain zarr and numpy; short, missing and changed files; what cannot be asked.

One small cache of two shards (5 + 3 rows, V 3, L 3, T 5, D 8) is written by the store itself, numbers by numpy.
"""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import featcache
from featcache import manifest, zarr_store
from featcache.errors import UsageError, UserError
from featcache.reader import Cache
from featcache.store import SHARDS, Array
from tests.conftest import python

VIEWS, LEVELS, TOKENS, WIDTH = 3, (2, 5, 6), 5, 8
KEYS = ["b/ü", "a", "z.1", "日", "", "c" * 300, "n/1", "n/11"]
SIZES = {"000000": 5, "000001": 3}
ROW_VIEW = ("row", "view")
ARRAYS = [
    Array("features", "<f2", (3, TOKENS, WIDTH), (*ROW_VIEW, "level", "token", "channel"), split=True),
    Array("feature_stats", "<f4", (3, TOKENS, 2), (*ROW_VIEW, "level", "token", "mean_std"), split=True),
    Array("row_crc", "<u4", (3,), (*ROW_VIEW, "level")),
    Array("attention", "<f4", (4,), (*ROW_VIEW, "patch")),
    Array("pixel_hash", "<u8", (), ROW_VIEW),
    Array("flip", "|u1", (), ROW_VIEW),
    Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
    Array("key", "|u1", (), ("byte",), per_view=False),
    Array("key_offsets", "<i8", (), ("row_edge",), per_view=False),
]
FIELDS = [array.name for array in ARRAYS[:7]]


def expected() -> dict[str, np.ndarray]:
    """All numbers of the cache, (8, V, ...) or (8, ...)."""
    random = np.random.default_rng(0)
    features = random.standard_normal((8, VIEWS, 3, TOKENS, WIDTH)).astype("<f2")
    crcs = [crc32c.crc32c(level.tobytes()) for level in features.reshape(-1, TOKENS, WIDTH)]
    return {
        "features": features,
        "feature_stats": random.standard_normal((8, VIEWS, 3, TOKENS, 2)).astype("<f4"),
        "row_crc": np.array(crcs, "<u4").reshape(8, VIEWS, 3),
        "attention": random.random((8, VIEWS, 4)).astype("<f4"),
        "pixel_hash": random.integers(0, 2**64, (8, VIEWS), np.uint64),
        "flip": random.integers(0, 2, (8, VIEWS)).astype("|u1"),
        "source_size": random.integers(1, 999, (8, 2)).astype("<i4"),
    }


NUMBERS = expected()


def write_cache(path: Path) -> Path:
    (path / SHARDS).mkdir(parents=True)
    first, shards = 0, []
    for name, count in SIZES.items():
        writer = zarr_store.writer(path, name, ARRAYS, VIEWS)
        rows = slice(first, first + count)
        flat = {a.name: NUMBERS[a.name][rows].reshape(-1, *a.item) for a in ARRAYS[:6]}
        writer.append(flat, {})
        writer.append_rows({"source_size": NUMBERS["source_size"][rows]})
        writer.finish(KEYS[rows], [{"key": f"bad{name}", "reason": "cut"}])
        shards.append({"name": name, "first": first, "count": count})
        first += count
    identity = {
        "teacher": {"name": "synthetic", "patches": TOKENS - 1, "width": WIDTH},
        "levels": list(LEVELS),
        "views": VIEWS,
        "store": "zarr",
        "codec": "fp16",
        "policy": {"size": 28},
        "pictures": {"count": 10, "keys_digest": "0"},
    }
    provenance = {"weights": "random:4", "source": "x"}
    about = manifest.make(identity, provenance, {a.name: a.as_dict() for a in ARRAYS}, shards, {})
    manifest.write_json(path / manifest.NAME, about)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("reader") / "cache")


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return featcache.open(folder)


def reference(name: str, rows: list[int], views: list[int], slots: list[int], tokens: int | None) -> np.ndarray:
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
    assert cache.quarantined == [{"key": "bad000000", "reason": "cut"}, {"key": "bad000001", "reason": "cut"}]
    assert "RANDOM WEIGHTS random:4" in repr(cache)
    assert cache.manifest["identity"]["levels"] == [2, 5, 6]


REQUEST = st.integers(0, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 7), min_size=n, max_size=n),
        st.one_of(st.integers(0, VIEWS - 1), st.lists(st.integers(0, VIEWS - 1), min_size=n, max_size=n)),
        st.one_of(st.none(), st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4)),
        st.one_of(st.none(), st.integers(1, TOKENS)),
        st.lists(st.sampled_from(FIELDS), min_size=1, max_size=7, unique=True),
        st.booleans(),
    )
)


@given(request=REQUEST)
def test_read_equals_numpy(cache: Cache, request: tuple) -> None:
    rows, view, levels, tokens, fields, given_out = request
    views = view if isinstance(view, list) else [view] * len(rows)
    slots = [LEVELS.index(level) for level in (LEVELS if levels is None else levels)]
    wanted = {name: reference(name, rows, views, slots, tokens) for name in fields}
    out = {name: np.full(values.shape, 77, values.dtype) for name, values in wanted.items()} if given_out else None
    got = cache.read(rows, view, fields, levels=levels, tokens=tokens, out=out)
    assert list(got) == fields
    for name, values in wanted.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values)
        if out is not None:
            assert got[name] is out[name]


def test_every_kind_of_row_number(cache: Cache) -> None:
    for rows in (3, [3], (3,), np.array([3]), np.int32(3), np.array([3], np.uint8), range(3, 4)):
        np.testing.assert_array_equal(cache.read(rows)["features"], NUMBERS["features"][[3], 0])
    assert cache.read([])["features"].shape == (0, 3, TOKENS, WIDTH)


def test_reads_agree_with_plain_zarr(cache: Cache, folder: Path) -> None:
    group = zarr.open_group(folder / SHARDS / "000001.zarr", mode="r")
    for name in FIELDS:
        got = cache.read([5, 6, 7], 1, [name])[name]
        stored = group[name][:]
        np.testing.assert_array_equal(got, stored if name == "source_size" else stored[:, 1])


def test_threads_read_the_same(folder: Path) -> None:
    with featcache.open(folder) as cache, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(cache.read, [i % 8, (3 * i) % 8], i % 3) for i in range(60)]
        for i, job in enumerate(jobs):
            np.testing.assert_array_equal(job.result()["features"], NUMBERS["features"][[i % 8, (3 * i) % 8], i % 3])


def test_keys_find_rows(cache: Cache) -> None:
    assert cache.keys.find(["n/1", "nowhere", "b/ü", "", "n/111", "c" * 300]).tolist() == [6, -1, 0, 4, -1, 5]
    assert cache.keys.find([]).tolist() == []
    assert cache.keys.find(KEYS).tolist() == list(range(8))
    assert cache.keys[2] == "z.1"
    assert cache.keys[-1] == "n/11"
    assert cache.keys[1:3] == ["a", "z.1"]
    assert cache.keys[np.int64(3)] == "日"
    with pytest.raises(IndexError):
        _ = cache.keys[8]


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"rows": [8]}, "0 to 7"),
        ({"rows": [-1]}, "0 to 7"),
        ({"rows": [[0, 1]]}, "rows"),
        ({"rows": [1.5]}, "rows"),
        ({"rows": [True, False, True, False, False, False, False, False]}, "rows"),
        ({"rows": [0], "view": 3}, "0 to 2"),
        ({"rows": [0], "view": -1}, "0 to 2"),
        ({"rows": [0, 1], "view": [0, 1, 2]}, "view"),
        ({"rows": [0], "fields": ("feature",)}, "did you mean features"),
        ({"rows": [0], "fields": ("key",)}, "unknown field 'key'"),
        ({"rows": [0], "levels": [3]}, "stored are [2, 5, 6]"),
        ({"rows": [0], "levels": [0]}, "stored are [2, 5, 6]"),
        ({"rows": [0], "tokens": 0}, "1 to 5"),
        ({"rows": [0], "tokens": 6}, "1 to 5"),
        ({"rows": [0], "out": {"features": np.zeros((2, 3, 5, 8), "<f2")}}, "out['features']"),
        ({"rows": [0], "out": {"features": np.zeros((1, 3, 5, 8), "<f4")}}, "out['features']"),
        ({"rows": [0], "out": {"features": np.zeros((1, 3, 8, 5), "<f2").swapaxes(2, 3)}}, "out['features']"),
    ],
    ids=str,
)
def test_impossible_requests_say_what_is_possible(cache: Cache, request_: dict, told: str) -> None:
    """A mask of booleans or a float would otherwise be taken for other row numbers, silently."""
    with pytest.raises(UsageError) as caught:
        cache.read(**request_)
    assert told in str(caught.value)


# ---------------------------------------------------------------- damage


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


CHUNK = f"{SHARDS}/000001.zarr/features/c.0.1.0.0.0"


@pytest.mark.parametrize("name", [CHUNK, f"{SHARDS}/000000.zarr/attention/c.0.0.0", f"{SHARDS}/000000.zarr/zarr.json"])
@pytest.mark.parametrize("how", ["short", "missing", "longer"])
def test_a_file_of_another_size_is_named_when_the_cache_is_opened(copy: Path, name: str, how: str) -> None:
    path = copy / name
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(data[:-5] if how == "short" else data + b"x")
    with pytest.raises(UserError) as caught:
        featcache.open(copy)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("how", ["short", "missing"])
def test_a_file_that_goes_while_the_cache_is_open_is_named(copy: Path, how: str) -> None:
    with featcache.open(copy) as cache:
        path = copy / CHUNK
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(UserError) as caught:
            cache.read([7], 1)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("levels", [None, [5], [6, 2]])
def test_a_flipped_bit_is_never_read_in_silence(copy: Path, levels: list[int] | None) -> None:
    """Row 6 is the second of its shard; its level 5 begins after one row and one level."""
    path = copy / CHUNK
    data = bytearray(path.read_bytes())
    data[240 + 80 + 33] ^= 1
    path.write_bytes(data)
    with featcache.open(copy) as cache:
        assert cache.read([5, 7], 1, levels=levels)
        if levels == [6, 2]:
            assert cache.read([6], 1, levels=levels)
            return
        with pytest.raises(UserError) as caught:
            cache.read([6], 1, levels=levels)
        for part in (str(copy), "row 6", "'n/1'", "view 1", "level 5", "verify"):
            assert part in str(caught.value)
        assert cache.read([6], 1, levels=levels, check=False)


def test_a_damaged_record_is_named(copy: Path) -> None:
    path = copy / SHARDS / "000000.json"
    path.write_text(path.read_text().replace('"rows": 5', '"rows": 4'))
    with pytest.raises(UserError, match=r"000000\.json.*damaged"):
        featcache.open(copy)


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
print(json.dumps(sorted({"torch", "timm", "open_clip", "torchvision", "zarr", "student"} & set(sys.modules))))
"""
    ran = python(code, folder)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == []
    assert "RANDOM WEIGHTS" in ran.stdout


def test_keys_survive_a_process_boundary(cache: Cache) -> None:
    """Loaders hand keys to workers."""
    assert list(pickle.loads(pickle.dumps(cache.keys))) == KEYS
