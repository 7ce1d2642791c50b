"""The Zarr store: the contract of every store, and that other people's Zarr libraries read it, to the byte and to the
flipped bit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import crc32c
import numpy as np
import pytest
import tensorstore
import zarr

from featcache import manifest, zarr_store
from featcache.store import SHARDS, record_path
from tests.store_contract import ARRAYS, StoreContract, files_below, numbers

GROUP = f"{SHARDS}/000000.zarr"


class TestZarrStore(StoreContract):
    name = "zarr"

    def unpublish_record(self, cache: Path) -> None:
        record_path(cache, "000000").rename(cache / GROUP / "record.json")


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    data = numbers(ARRAYS, 5, 2)
    TestZarrStore().publish(tmp_path, data, cuts=[3, 4])
    return tmp_path, data


def test_plain_zarr_python_reads_every_array(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    cache, data = written
    group = zarr.open_group(cache / GROUP, mode="r")
    assert sorted(group.array_keys()) == sorted(array.name for array in ARRAYS)
    for array in ARRAYS[:4]:
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
        np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), values)


def test_one_file_a_view_of_plain_rows_and_four_checksum_bytes(written: tuple[Path, dict[str, np.ndarray]]) -> None:
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
    """Chunks (n, 1, L, T, D), separator '.', NaN for floats, crc32c and nothing else, no sharding codec."""
    cache, _ = written
    meta = json.loads((cache / GROUP / "features/zarr.json").read_text())
    assert meta["zarr_format"] == 3
    assert meta["shape"] == [5, 2, 2, 3, 4]
    assert meta["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": [5, 1, 2, 3, 4]}}
    assert meta["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    assert meta["fill_value"] == "NaN"
    assert [codec["name"] for codec in meta["codecs"]] == ["bytes", "crc32c"]
    assert meta["codecs"][0]["configuration"] == {"endian": "little"}
    small = json.loads((cache / GROUP / "attention/zarr.json").read_text())
    assert small["chunk_grid"]["configuration"]["chunk_shape"] == [5, 2, 2]


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
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / GROUP / "features")}}
    with pytest.raises(ValueError, match=r"(?i)crc-?32c|checksum|digest"):
        tensorstore.open(spec, read=True).result().read().result()


def test_a_shard_without_rows_opens_in_plain_zarr(tmp_path: Path) -> None:
    TestZarrStore().writer(tmp_path).finish([], [])
    group = zarr.open_group(tmp_path / GROUP, mode="r")
    assert group["features"].shape == (0, 2, 2, 3, 4)
    assert group["features"][:].size == 0
    assert group["key_offsets"][:].tolist() == [0]


def test_settle_removes_a_shard_whose_inner_record_is_damaged(tmp_path: Path) -> None:
    """A record that cannot be read proves nothing; extraction must go on, not stop at it."""
    contract = TestZarrStore()
    contract.unrecorded(tmp_path)
    path = tmp_path / GROUP / "record.json"
    path.write_bytes(path.read_bytes()[:-30])
    zarr_store.settle(tmp_path, "000000")
    assert files_below(tmp_path) == {}


def test_settle_never_removes_what_another_process_just_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes share --out. B looks for the record: none. A moves it into place. B looks into the folder: none
    there either. It must not conclude that the folder is broken."""
    contract = TestZarrStore()
    whole = contract.unrecorded(tmp_path)
    inside, outside = tmp_path / GROUP / "record.json", record_path(tmp_path, "000000")
    asked = []
    is_file = Path.is_file

    def publishes_after_the_first_look(path: Path, **options: bool) -> bool:
        answer = is_file(path, **options)
        if path == outside and not asked:
            asked.append(path)
            inside.rename(outside)
        return answer

    monkeypatch.setattr(Path, "is_file", publishes_after_the_first_look)
    zarr_store.settle(tmp_path, "000000")
    monkeypatch.undo()
    assert asked
    assert files_below(tmp_path) == whole


def test_a_stranger_in_the_way_of_publishing_is_an_error_not_a_loss(tmp_path: Path) -> None:
    contract = TestZarrStore()
    writer = contract.writer(tmp_path)
    contract.fill(writer, ARRAYS, numbers(ARRAYS, 2, 2), 2)
    (tmp_path / GROUP).write_text("a file where the folder should be")
    with pytest.raises(OSError, match="000000"):
        writer.finish(["k0", "k1"], [])
    assert not record_path(tmp_path, "000000").exists()
    assert any(name.endswith("features/c.0.0.0.0.0") for name in files_below(tmp_path))
    assert manifest.FORMAT == 1
