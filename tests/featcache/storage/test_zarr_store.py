"""The Zarr store: the contract of every store, and that other people's Zarr libraries read it, to
the byte and to the flipped bit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import crc32c
import numpy as np
import pytest
import tensorstore
import zarr

from featcache.storage.store import SHARDS
from tests.store_contract import ARRAYS, StoreContract, numbers

GROUP = f"{SHARDS}/000000.zarr"


class TestZarrStore(StoreContract):
    name = "zarr"


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    data = numbers(ARRAYS, 5, 2)
    TestZarrStore().publish(tmp_path, data, cuts=[3, 4])
    return tmp_path, data


def test_plain_zarr_python_reads_every_array(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    cache, data = written
    group = zarr.open_group(cache / GROUP, mode="r")
    assert sorted(group.array_keys()) == sorted([*data, "key", "key_offsets"])
    for array in ARRAYS:
        stored = group[array.name]
        assert stored.dtype == np.dtype(array.dtype)
        assert stored.metadata.dimension_names == array.dimensions
        np.testing.assert_array_equal(stored[:], data[array.name])
    offsets = group["key_offsets"][:]
    blob = group["key"][:].tobytes()
    keys = [blob[a:b].decode() for a, b in pairwise(offsets)]
    assert keys == ["k0", "k1", "k2", "k3", "k4"]


def test_tensorstore_reads_the_same(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    cache, data = written
    for name, values in data.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / GROUP / name)}}
        np.testing.assert_array_equal(
            tensorstore.open(spec, read=True).result().read().result(), values
        )


def test_one_file_a_view_of_plain_rows_and_four_checksum_bytes(
    written: tuple[Path, dict[str, np.ndarray]],
) -> None:
    cache, data = written
    for view in range(2):
        raw = (cache / GROUP / f"features/c.0.{view}.0.0.0").read_bytes()
        rows = np.ascontiguousarray(data["features"][:, view]).tobytes()
        assert raw[:-4] == rows
        assert int.from_bytes(raw[-4:], "little") == crc32c.crc32c(rows)
    assert not (cache / GROUP / "features/c.0.2.0.0.0").exists()
    raw = (cache / GROUP / "attention/c.0.0.0").read_bytes()
    assert raw[:-4] == data["attention"].tobytes()


def test_metadata_is_what_the_design_says(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Chunks (n, 1, L, T, D), separator '.', NaN for floats, crc32c and nothing else, no sharding
    codec."""
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
    assert [codec["name"] for codec in meta["codecs"]] == ["bytes", "crc32c"]
    assert meta["codecs"][0]["configuration"] == {"endian": "little"}
    assert meta["dimension_names"] == ["row", "view", "level", "token", "channel"]
    small = json.loads((cache / GROUP / "attention/zarr.json").read_text())
    assert small["chunk_grid"]["configuration"]["chunk_shape"] == [5, 2, 2]
    edges = json.loads((cache / GROUP / "key_offsets/zarr.json").read_text())
    assert (edges["shape"], edges["data_type"], edges["dimension_names"]) == (
        [6],
        "int64",
        ["row_edge"],
    )


def test_an_all_zero_array_is_still_a_file(tmp_path: Path) -> None:
    data = {name: np.zeros_like(values) for name, values in numbers(ARRAYS, 3, 2).items()}
    TestZarrStore().publish(tmp_path, data)
    assert (tmp_path / GROUP / "features/c.0.1.0.0.0").stat().st_size == 3 * 48 + 4
    assert not np.isnan(zarr.open_group(tmp_path / GROUP, mode="r")["features"][:]).any()


def test_other_libraries_refuse_a_flipped_bit(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    cache, _ = written
    path = cache / GROUP / "features/c.0.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)
    features = zarr.open_group(cache / GROUP, mode="r")["features"]
    features[:, 0]
    with pytest.raises(ValueError, match="checksum"):
        features[:, 1]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(cache / GROUP / "features")},
    }
    with pytest.raises(ValueError, match=r"(?i)crc-?32c|checksum|digest"):
        tensorstore.open(spec, read=True).result().read().result()


def test_a_shard_without_rows_opens_in_plain_zarr(tmp_path: Path) -> None:
    TestZarrStore().writer(tmp_path).finish([], {})
    group = zarr.open_group(tmp_path / GROUP, mode="r")
    assert group["features"].shape == (0, 2, 2, 3, 4)
    assert group["features"][:].size == 0
    assert group["key_offsets"][:].tolist() == [0]
