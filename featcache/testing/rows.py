"""Check that a store gives back what was appended, byte for byte, however it was appended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from featcache.storage import json_file, manifest
from featcache.storage.store import SHARDS, Array, folder_path, record_path
from featcache.testing.case import StoreCase
from featcache.testing.items import (
    ARRAYS,
    DTYPES,
    ODD_KEYS,
    SHARD,
    STATISTICS,
    as_items,
    files_below,
    numbers,
)


class RowsContract(StoreCase):
    """Rows, keys and records of a shard that nothing happened to."""

    @settings(suppress_health_check=[HealthCheck.differing_executors], max_examples=25)
    @given(
        rows=st.integers(1, 6),
        views=st.integers(1, 4),
        dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
        item=st.lists(st.integers(1, 4), min_size=0, max_size=3),
        cuts=st.lists(st.integers(0, 30), max_size=4),
    )
    def test_located_bytes_are_the_items(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        rows: int,
        views: int,
        dtypes: list[str],
        item: list[int],
        cuts: list[int],
    ) -> None:
        cache = tmp_path_factory.mktemp("cache")
        names = tuple("abcd"[: len(item)])
        arrays = [
            Array("big", dtypes[0], tuple(item), ("row", "view", *names), split=True),
            Array("small", dtypes[1], tuple(item), ("row", "view", *names)),
            Array("single", dtypes[2], tuple(item), ("row", *names), per_view=False),
        ]
        data = numbers(arrays, rows, views)
        record = self.publish(cache, data, arrays=arrays, views=views, cuts=cuts)
        assert record["rows"] == rows
        for array in arrays:
            got = self.read(cache, array, views, np.arange(rows))
            expected = (
                np.moveaxis(data[array.name], 1, 0) if array.per_view else data[array.name][None]
            )
            np.testing.assert_array_equal(got, expected)
        assert self.keys(cache, record) == [f"k{i}" for i in range(rows)]
        assert self.problems(cache, record) == []

    def test_rows_are_located_in_any_order_and_more_than_once(self, tmp_path: Path) -> None:
        data = numbers(ARRAYS, 5, 2)
        self.publish(tmp_path, data)
        rows = np.array([4, 0, 0, 3])
        for array in ARRAYS[:3]:
            got = self.read(tmp_path, array, 2, rows)
            np.testing.assert_array_equal(got, np.moveaxis(data[array.name][rows], 1, 0))
        np.testing.assert_array_equal(
            self.read(tmp_path, ARRAYS[3], 2, rows)[0], data["source_size"][rows]
        )
        assert self.backend.locate(tmp_path, SHARD, ARRAYS[0], 2, 1, np.arange(0))[1].shape == (0,)

    @pytest.mark.parametrize("views", [1, 2, 3])
    def test_any_split_of_the_stream_gives_the_same_bytes(self, tmp_path: Path, views: int) -> None:
        """At each item alone, at all of them, and at some: a row may come in parts."""
        data = numbers(ARRAYS, 3, views)
        self.publish(tmp_path / "whole", data, views=views)
        whole = files_below(tmp_path / "whole")
        inner = range(1, 3 * views)
        for number, cuts in enumerate([*([cut] for cut in inner), [*inner], [1, 4]]):
            self.publish(tmp_path / str(number), data, views=views, cuts=cuts)
            assert files_below(tmp_path / str(number)) == whole, cuts

    def test_an_append_of_nothing_changes_nothing(self, tmp_path: Path) -> None:
        data = numbers(ARRAYS, 2, 2)
        self.publish(tmp_path / "plain", data)
        writer = self.writer(tmp_path / "nothings")
        items = as_items(ARRAYS, data, 2)
        for low, high in [(0, 0), (0, 1), (1, 1), (1, 4), (4, 4)]:
            part = {name: values[low:high] for name, values in items.items()}
            writer.append(["k0", "k0", "k1", "k1"][low:high], part)
        writer.finish([], STATISTICS)
        assert files_below(tmp_path / "nothings") == files_below(tmp_path / "plain")

    def test_items_are_stored_in_the_declared_dtype_and_order(self, tmp_path: Path) -> None:
        """Fortran order, strides and another dtype of the same numbers make no difference."""
        data = numbers(ARRAYS, 4, 2)
        self.publish(tmp_path / "plain", data)
        other = {
            name: np.asfortranarray(np.repeat(values, 2, 0)[::2]) for name, values in data.items()
        }
        other["attention"] = other["attention"].astype(np.float64)
        self.publish(tmp_path / "other", other)
        assert files_below(tmp_path / "other") == files_below(tmp_path / "plain")

    def test_rows_of_no_items_are_legal(self, tmp_path: Path) -> None:
        """A shard all of whose pictures are quarantined."""
        writer = self.writer(tmp_path)
        record = writer.finish([{"key": "bad", "reason": "because"}], {})
        assert record["rows"] == 0
        assert record["quarantined"] == [{"key": "bad", "reason": "because"}]
        assert json_file.read_json(record_path(tmp_path, SHARD)) == record
        assert self.problems(tmp_path, record) == []
        assert self.keys(tmp_path, record) == []
        for array in ARRAYS:
            assert self.read(tmp_path, array, 2, np.arange(0)).size == 0

    def test_record_holds_counts_digest_statistics_and_every_file(self, tmp_path: Path) -> None:
        data = numbers(ARRAYS, 4, 2)
        record = self.publish(tmp_path, data)
        assert json_file.read_json(record_path(tmp_path, SHARD)) == record
        assert sorted(record) == [
            "files",
            "keys_digest",
            "quarantined",
            "rows",
            "shard",
            "statistics",
        ]
        assert (record["shard"], record["rows"], record["quarantined"]) == (SHARD, 4, [])
        assert record["keys_digest"] == manifest.keys_digest(["k0", "k1", "k2", "k3"])
        assert record["statistics"] == STATISTICS
        held = files_below(folder_path(tmp_path, SHARD, self.name))
        assert {name: facts["bytes"] for name, facts in record["files"].items()} == {
            name: len(content) for name, content in held.items()
        }
        names = {path.name for path in (tmp_path / SHARDS).iterdir()}
        assert names == {f"{SHARD}.{self.name}", f"{SHARD}.json"}

    @pytest.mark.parametrize(("rows", "views"), [(0, 1), (4, 2), (3, 3)])
    def test_file_shapes_are_those_of_the_files(
        self, tmp_path: Path, rows: int, views: int
    ) -> None:
        record = self.publish(tmp_path, numbers(ARRAYS, rows, views), views=views)
        shapes = self.backend.file_shapes(ARRAYS, views, self.form)
        assert shapes.keys() == record["files"].keys()
        for name, shape in shapes.items():
            stated = record["files"][name].items() - {("crc32c", record["files"][name]["crc32c"])}
            expected = {} if shape is None else shape.facts(rows)
            assert dict(stated) == {"bytes": record["files"][name]["bytes"], **expected}

    def test_odd_keys_come_back(self, tmp_path: Path) -> None:
        data = numbers(ARRAYS, len(ODD_KEYS), 2)
        record = self.publish(tmp_path, data, keys=ODD_KEYS, cuts=[1, 5, 6])
        assert self.keys(tmp_path, record) == ODD_KEYS
        assert record["keys_digest"] == manifest.keys_digest(ODD_KEYS)
        got = self.read(tmp_path, ARRAYS[0], 2, np.arange(len(ODD_KEYS)))
        np.testing.assert_array_equal(got, np.moveaxis(data["features"], 1, 0))

    @settings(suppress_health_check=[HealthCheck.differing_executors], max_examples=15)
    @given(
        keys=st.lists(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=5
        )
    )
    @example(keys=["/"])
    @example(keys=["../up", "./here", "/root"])
    def test_any_keys_come_back(
        self, tmp_path_factory: pytest.TempPathFactory, keys: list[str]
    ) -> None:
        cache = tmp_path_factory.mktemp("cache")
        arrays = ARRAYS[2:]
        data = numbers(arrays, len(keys), 2)
        record = self.publish(cache, data, arrays=arrays, keys=keys)
        assert self.keys(cache, record) == keys
        got = self.read(cache, arrays[0], 2, np.arange(len(keys)))
        np.testing.assert_array_equal(got, data["flip"].T)

    def test_a_wrong_item_shape_is_refused(self, tmp_path: Path) -> None:
        writer = self.writer(tmp_path)
        items = as_items(ARRAYS, numbers(ARRAYS, 1, 1), 1)
        with pytest.raises(ValueError, match=r"attention.*\(1, 3\).*\(1, 2\)"):
            writer.append(["k0"], {**items, "attention": np.zeros((1, 3), np.float32)})
        with pytest.raises(ValueError, match=r"\(1, .*\(2, "):
            writer.append(["k0", "k0"], items)
        writer.discard()
        assert files_below(tmp_path) == {}
