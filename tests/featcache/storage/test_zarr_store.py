"""The Zarr store: the contract of every store, in both formats and compressed, and that other
people's Zarr libraries read it, to the byte and to the flipped bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from featcache.storage import compression
from featcache.storage.store import SHARDS, Array, ShardForm, folder_path
from featcache.testing.items import ARRAYS, ODD_KEYS, SHARD, files_below, numbers
from featcache.testing.store import StoreContract
from tests.conftest import python
from tests.shard_index import change_index

GROUP = f"{SHARDS}/000000.zarr"
ZARRS = "zarrs.ZarrsCodecPipeline"
Written = tuple[Path, dict[str, np.ndarray]]


class TestZarrStore(StoreContract):
    name = "zarr"


class TestZarrStoreOfFormat3(StoreContract):
    name = "zarr"
    form = ShardForm(3)


class TestZarrArchive(StoreContract):
    """Compressed rows are nowhere as they were: zarr-python reads what the contract asks for."""

    name = "zarr"
    form = replace(StoreContract.form, compression="blosc")

    def read(
        self, cache: Path, array: Array, views: int, rows: np.ndarray, shard: str = SHARD
    ) -> np.ndarray:
        stored = zarr.open_group(folder_path(cache, shard, "zarr"), mode="r")[array.name]
        if not len(rows):
            return np.empty(0)
        values = stored.get_orthogonal_selection((rows,))
        return np.moveaxis(values, 1, 0) if array.per_view else values[None]


CONTRACTS = {
    "format 4": TestZarrStore(),
    "format 3": TestZarrStoreOfFormat3(),
    "archive": TestZarrArchive(),
}


@pytest.fixture
def written(tmp_path: Path) -> Written:
    data = numbers(ARRAYS, 5, 2)
    TestZarrStore().publish(tmp_path, data, cuts=[3, 4])
    return tmp_path, data


@pytest.fixture(params=CONTRACTS)
def any_written(tmp_path: Path, request: pytest.FixtureRequest) -> Written:
    data = numbers(ARRAYS, 5, 2)
    CONTRACTS[request.param].publish(tmp_path, data, cuts=[3, 4])
    return tmp_path, data


def with_views(form: ShardForm) -> ShardForm:
    return replace(form, coordinates={**form.coordinates, "view": range(3, 5)})


def spec(cache: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / GROUP / name)}}


# ---------------------------------------------------------------- other people's libraries


@pytest.mark.parametrize("pipeline", [None, ZARRS])
def test_zarr_python_and_zarrs_read_every_array(any_written: Written, pipeline: str | None) -> None:
    cache, data = any_written
    with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
        group = zarr.open_group(cache / GROUP, mode="r")
        for array in ARRAYS:
            stored = group[array.name]
            assert stored.dtype == np.dtype(array.dtype)
            assert stored.metadata.dimension_names == array.dimensions
            np.testing.assert_array_equal(stored[:], data[array.name])
        blob = group["key_bytes" if "key_bytes" in group else "key"][:].tobytes()
        keys = [blob[a:b].decode() for a, b in pairwise(group["key_offsets"][:])]
    assert keys == ["k0", "k1", "k2", "k3", "k4"]


def test_tensorstore_reads_the_same(any_written: Written) -> None:
    cache, data = any_written
    for name, values in data.items():
        stored = tensorstore.open(spec(cache, name), read=True).result()
        np.testing.assert_array_equal(stored.read().result(), values)
        np.testing.assert_array_equal(stored[3].read().result(), values[3])


@pytest.mark.parametrize("kind", ["format 4", "archive"])
def test_xarray_opens_a_shard_with_levels_views_and_keys(tmp_path: Path, kind: str) -> None:
    data = numbers(ARRAYS, len(ODD_KEYS), 2)
    form = CONTRACTS[kind].form
    labelled = type("Labelled", (TestZarrStore,), {"form": with_views(form)})()
    labelled.publish(tmp_path, data, keys=ODD_KEYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with xarray.open_zarr(tmp_path / GROUP, chunks=None) as shard:
            assert set(shard.coords) == {"key", "level", "view"}
            assert set(shard.data_vars) == {*data, "key_bytes", "key_offsets"}
            assert shard["key"].dims == ("row",)
            assert shard["key"].values.tolist() == ODD_KEYS
            assert shard["level"].values.tolist() == [8, 12]
            assert shard["view"].values.tolist() == [3, 4]
            assert shard.attrs == {"teacher": "t"}
            values = shard["features"].sel(level=12, view=4).values
    np.testing.assert_array_equal(values, data["features"][:, 1, 1])


def test_other_libraries_refuse_a_flipped_bit_of_one_chunk(written: Written) -> None:
    cache, _ = written
    path = cache / GROUP / "attention/c.0.0.0"
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(cache / GROUP, mode="r")["attention"][:]
    with pytest.raises(ValueError, match=r"(?i)crc-?32c|checksum|digest"):
        tensorstore.open(spec(cache, "attention"), read=True).result().read().result()


def test_what_other_libraries_make_of_a_chunk_without_an_index_entry(tmp_path: Path) -> None:
    """NaN of floats and 0 of integers, which is why every entry is written and checked."""
    arrays = [ARRAYS[0], replace(ARRAYS[0], name="codes", dtype="|u1")]
    TestZarrStore().publish(tmp_path, numbers(arrays, 5, 2), arrays=arrays)
    for name, fill in (("features", np.nan), ("codes", 0)):
        path = tmp_path / GROUP / f"{name}/c.0.0.0.0.0"
        data = bytearray(path.read_bytes())
        entries = 10 if name == "features" else 5
        begin = len(data) - 4 - 16 * entries
        data[begin : begin + 16] = b"\xff" * 16
        data[-4:] = crc32c.crc32c(bytes(data[begin:-4])).to_bytes(4, "little")
        path.write_bytes(data)
        stored = zarr.open_group(tmp_path / GROUP, mode="r")[name]
        np.testing.assert_array_equal(stored[0, 0, 0], np.full((3, 4), fill))
        seen = tensorstore.open(spec(tmp_path, name), read=True).result()[0, 0, 0].read().result()
        np.testing.assert_array_equal(seen, np.full((3, 4), fill))


# ---------------------------------------------------------------- the bytes


def rows_of(data: Mapping[str, np.ndarray], name: str, view: int) -> bytes:
    return np.ascontiguousarray(data[name][:, view]).tobytes()


def index_of(offsets: Sequence[int], sizes: Sequence[int]) -> bytes:
    """The index of Zarr's sharding codec: little-endian pairs, and their crc32c."""
    pairs = [n for pair in zip(offsets, sizes, strict=True) for n in pair]
    data = b"".join(n.to_bytes(8, "little") for n in pairs)
    return data + crc32c.crc32c(data).to_bytes(4, "little")


def test_a_split_file_is_rows_and_an_index_of_them(written: Written) -> None:
    """Of `features` an entry for each row and level, of another array one for each row."""
    cache, data = written
    for view in range(2):
        raw = (cache / GROUP / f"features/c.0.{view}.0.0.0").read_bytes()
        assert raw == rows_of(data, "features", view) + index_of(range(0, 240, 24), [24] * 10)
    assert not (cache / GROUP / "features/c.0.2.0.0.0").exists()
    raw = (cache / GROUP / "attention/c.0.0.0").read_bytes()
    rows = data["attention"].tobytes()
    assert raw == rows + crc32c.crc32c(rows).to_bytes(4, "little")


def test_another_split_array_has_a_chunk_a_row(tmp_path: Path) -> None:
    arrays = [replace(ARRAYS[0], name="feature_stats", dtype="<f4")]
    data = numbers(arrays, 3, 2)
    record = TestZarrStore().publish(tmp_path, data, arrays=arrays)
    raw = (tmp_path / GROUP / "feature_stats/c.0.1.0.0.0").read_bytes()
    assert raw == rows_of(data, "feature_stats", 1) + index_of([0, 96, 192], [96] * 3)
    assert record["files"]["feature_stats/c.0.1.0.0.0"] == {
        "bytes": 340,
        "chunks": 3,
        "crc32c": f"{crc32c.crc32c(raw):08x}",
    }


def test_format_3_has_the_same_rows_and_four_checksum_bytes(tmp_path: Path) -> None:
    data = numbers(ARRAYS, 5, 2)
    record = TestZarrStoreOfFormat3().publish(tmp_path, data)
    for view in range(2):
        raw = (tmp_path / GROUP / f"features/c.0.{view}.0.0.0").read_bytes()
        rows = rows_of(data, "features", view)
        assert raw == rows + crc32c.crc32c(rows).to_bytes(4, "little")
        assert record["files"][f"features/c.0.{view}.0.0.0"] == {
            "bytes": 244,
            "crc32c": f"{crc32c.crc32c(rows):08x}",
        }


def test_an_archives_chunks_follow_each_other(tmp_path: Path) -> None:
    """In the order of rows, and each is what blosc makes of it."""
    data = {name: np.zeros_like(values) for name, values in numbers(ARRAYS, 4, 2).items()}
    data["features"][2] = 1.5
    TestZarrArchive().publish(tmp_path, data)
    raw = (tmp_path / GROUP / "features/c.0.1.0.0.0").read_bytes()
    chunks = [compression.encode("blosc", level) for row in data["features"][:, 1] for level in row]
    sizes = [len(chunk) for chunk in chunks]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    assert raw == b"".join(chunks) + index_of(offsets, sizes)


def test_metadata_is_what_the_design_says(written: Written) -> None:
    """Chunks of a row and level in files (n, 1, L, T, D), separator '.', NaN for floats, no
    compression; crc32c of the index, and of arrays of one chunk."""
    cache, _ = written
    meta = json.loads((cache / GROUP / "features/zarr.json").read_text())
    assert meta["zarr_format"] == 3
    assert meta["shape"] == [5, 2, 2, 3, 4]
    assert meta["chunk_grid"] == {
        "name": "regular",
        "configuration": {"chunk_shape": [5, 1, 2, 3, 4]},
    }
    assert meta["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    assert meta["fill_value"] == "NaN"
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    assert meta["codecs"] == [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [1, 1, 1, 3, 4],
                "codecs": [little],
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            },
        }
    ]
    assert meta["dimension_names"] == ["row", "view", "level", "token", "channel"]
    small = json.loads((cache / GROUP / "attention/zarr.json").read_text())
    assert small["chunk_grid"]["configuration"]["chunk_shape"] == [5, 2, 2]
    assert small["codecs"] == [little, {"name": "crc32c"}]
    edges = json.loads((cache / GROUP / "key_offsets/zarr.json").read_text())
    assert (edges["shape"], edges["data_type"], edges["dimension_names"]) == (
        [6],
        "int64",
        ["row_edge"],
    )


def test_the_metadata_of_a_group_is_joined_in_one_document(written: Written) -> None:
    cache, data = written
    group = json.loads((cache / GROUP / "zarr.json").read_text())
    joined = group["consolidated_metadata"]
    assert (joined["kind"], joined["must_understand"]) == ("inline", False)
    assert joined["metadata"].keys() == {*data, "key", "key_bytes", "key_offsets", "level"}
    for name, meta in joined["metadata"].items():
        assert meta == json.loads((cache / GROUP / name / "zarr.json").read_text())


def test_metadata_of_format_3(tmp_path: Path) -> None:
    TestZarrStoreOfFormat3().publish(tmp_path, numbers(ARRAYS, 5, 2))
    meta = json.loads((tmp_path / GROUP / "features/zarr.json").read_text())
    assert [codec["name"] for codec in meta["codecs"]] == ["bytes", "crc32c"]
    assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [5, 1, 2, 3, 4]
    group = json.loads((tmp_path / GROUP / "zarr.json").read_text())
    assert group == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def test_an_archive_says_how_it_is_compressed(tmp_path: Path) -> None:
    TestZarrArchive().publish(tmp_path, numbers(ARRAYS, 5, 2))
    meta = json.loads((tmp_path / GROUP / "features/zarr.json").read_text())
    blosc = {"typesize": 2, "cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    assert meta["codecs"][0]["configuration"]["codecs"] == [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": blosc},
    ]


def test_an_all_zero_array_is_still_a_file(tmp_path: Path) -> None:
    data = {name: np.zeros_like(values) for name, values in numbers(ARRAYS, 3, 2).items()}
    TestZarrStore().publish(tmp_path, data)
    size = (tmp_path / GROUP / "features/c.0.1.0.0.0").stat().st_size
    assert size == 3 * 48 + 6 * 16 + 4
    assert not np.isnan(zarr.open_group(tmp_path / GROUP, mode="r")["features"][:]).any()


@pytest.mark.parametrize("kind", CONTRACTS)
def test_a_shard_without_rows_opens_in_plain_zarr(tmp_path: Path, kind: str) -> None:
    CONTRACTS[kind].writer(tmp_path).finish([], {})
    group = zarr.open_group(tmp_path / GROUP, mode="r")
    assert group["features"].shape == (0, 2, 2, 3, 4)
    assert group["features"][:].size == 0
    assert group["key_offsets"][:].tolist() == [0]


# ---------------------------------------------------------------- the index


ALL = (1 << 64) - 1
CHANGES = {
    "two rows for each other": {0: 24, 2: 0},
    "one row twice": {2: 0},
    "a row that is missing": {4: ALL, 5: ALL},
    "a shorter row": {1: 23},
    "rows of other sizes": {1: 12, 2: 12, 3: 36},
    "beyond the end": {18: 1 << 40},
    "sizes whose sum overflows": {1: ALL, 3: 25},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_rerouted_index_with_right_checksums_is_named(
    tmp_path: Path, change: dict[int, int]
) -> None:
    """Whoever wrote it has corrected the index's checksum, and the record's too."""
    contract = TestZarrStore()
    record = contract.publish(tmp_path, numbers(ARRAYS, 5, 2))
    name = "features/c.0.1.0.0.0"
    path = tmp_path / GROUP / name
    change_index(path, 10, change)
    problem = [f"{path}: checksum differs"]
    assert contract.problems(tmp_path, record) == problem
    forged = record["files"][name] | {"crc32c": f"{crc32c.crc32c(path.read_bytes()):08x}"}
    record["files"][name] = forged
    assert contract.problems(tmp_path, record) == problem
    change_index(path, 10, {n: 24 * (n // 2) if n % 2 == 0 else 24 for n in range(20)})
    forged["crc32c"] = f"{crc32c.crc32c(path.read_bytes()):08x}"
    assert contract.problems(tmp_path, record) == []


def test_an_archives_index_may_have_any_sizes_and_no_gap(tmp_path: Path) -> None:
    contract = TestZarrArchive()
    record = contract.publish(tmp_path, numbers(ARRAYS, 5, 2))
    name = "features/c.0.1.0.0.0"
    path = tmp_path / GROUP / name
    assert contract.problems(tmp_path, record) == []
    change_index(path, 10, {1: 1})
    record["files"][name]["crc32c"] = f"{crc32c.crc32c(path.read_bytes()[:-4]):08x}"
    assert contract.problems(tmp_path, record) == [f"{path}: checksum differs"]


def test_a_moved_border_of_an_archives_chunks_is_named(tmp_path: Path) -> None:
    """The index's own checksum is right, and a checksum of all bytes would be as before."""
    contract = TestZarrArchive()
    record = contract.publish(tmp_path, numbers(ARRAYS, 5, 2))
    path = tmp_path / GROUP / "features/c.0.1.0.0.0"
    before = path.read_bytes()
    first, second = (int.from_bytes(before[at : at + 8], "little") for at in (-156, -140))
    change_index(path, 10, {1: first - 5, 2: first - 5, 3: second + 5})
    assert crc32c.crc32c(path.read_bytes()) == crc32c.crc32c(before)
    assert contract.problems(tmp_path, record) == [f"{path}: checksum differs"]


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["BLOSC_CLEVEL=1", "BLOSC_COMPRESSOR=lz4", "BLOSC_SHUFFLE=0"])
def test_an_archives_bytes_are_the_same_each_time(variable: str) -> None:
    """Whatever the environment says, in a process that has not imported zarr, of chunks so large
    that blosc would share them among threads."""
    code = """
import hashlib, sys
import numpy as np
from featcache.storage import compression
chunk = np.random.default_rng(0).standard_normal((577, 1024)).astype("<f2")
coded = {compression.encode("blosc", chunk) for _ in range(20)}
out = np.empty(chunk.nbytes, np.uint8)
assert compression.decode("blosc", next(iter(coded)), out)
print("zarr" in sys.modules, len(coded), *(hashlib.md5(each).hexdigest() for each in coded))
"""
    name, value = variable.split("=")
    plain, changed = (python(code, **env).stdout for env in ({}, {name: value}))
    assert plain.startswith("False 1 ")
    assert changed == plain


def test_compressed_bytes_do_not_depend_on_how_rows_came(tmp_path: Path) -> None:
    data = numbers(ARRAYS, 6, 2)
    TestZarrArchive().publish(tmp_path / "a", data)
    TestZarrArchive().publish(tmp_path / "b", data, cuts=[1, 2, 3, 5, 8])
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")
