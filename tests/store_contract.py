"""Every store passes this contract, whoever writes it: a test class to inherit, with `name` set to
the store's name.

n rows, V views. A store's own file formats are tested beside it; here only the contract of
`storage.store` is used, and what `featcache.storage.commit` does for all stores alike.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.storage import belongings, commit, json_file, manifest, owner
from featcache.storage.store import (
    SHARDS,
    Array,
    ShardForm,
    ShardWriter,
    folder_path,
    get_store,
    record_path,
)

SHARD = "000000"
DTYPES = ["<f2", "<f4", "|u1", "<u2", "<u4", "<i4", "<u8"]
ARRAYS = [
    Array("features", "<f2", (2, 3, 4), ("row", "view", "level", "token", "channel"), split=True),
    Array("attention", "<f4", (2,), ("row", "view", "patch")),
    Array("flip", "|u1", (), ("row", "view")),
    Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
]
ODD_KEYS = [
    "n01/plain",
    "ünïcödé/日本語/🦆",
    "a.b/c.d.e",
    "deep/er/and/deep/er",
    "x" * 230,
    "100%2E",
    "",
    "line\nbreak",
]
ODD_KEYS += ["folder-" * 30 + "/" + "y" * 90, " spaces  in and around "]
STATISTICS = {
    "features": {"min": -1.5, "max": 2, "non_finite": 0, "norm": 3.25},
    "flip": {"min": 0, "max": 1},
}


def numbers(arrays: Sequence[Array], rows: int, views: int, seed: int = 0) -> dict[str, np.ndarray]:
    """(n, V, *item) or (n, *item) of every array, any finite bytes."""
    random = np.random.default_rng(seed)
    out = {}
    for array in arrays:
        shape = (rows, *([views] if array.per_view else []), *array.item)
        low, high = (-99, 99) if np.dtype(array.dtype).kind in "fi" else (0, 99)
        out[array.name] = random.integers(low, high, shape).astype(array.dtype)
    return out


def as_items(
    arrays: Sequence[Array], data: Mapping[str, np.ndarray], views: int
) -> dict[str, np.ndarray]:
    """(n * V, *item) of every array. Of arrays that are not per view, later views hold numbers that
    must not count."""
    out = {}
    for array in arrays:
        values = data[array.name]
        if not array.per_view:
            values = np.stack([values, *[values + 1] * (views - 1)], 1)
        out[array.name] = values.reshape(-1, *array.item)
    return out


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def change_index(path: Path, entries: int, change: Mapping[int, int]) -> None:
    """Write other numbers into the index of a file of so many chunks, and the checksum that fits
    them."""
    data = bytearray(path.read_bytes())
    begin = len(data) - 4 - 16 * entries
    for number, value in change.items():
        data[begin + 8 * number : begin + 8 * number + 8] = value.to_bytes(8, "little")
    data[-4:] = crc32c.crc32c(bytes(data[begin:-4])).to_bytes(4, "little")
    path.write_bytes(data)


def dead_process() -> int:
    """The number of a process that has ended."""
    code = "import os; print(os.getpid())"
    return int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )


class StoreContract:
    """Inherit as `class TestX(StoreContract): name = "x"`."""

    name: str
    form = ShardForm(coordinates={"level": (8, 12)}, attributes={"teacher": "t"})

    @property
    def backend(self) -> ModuleType:
        return get_store(self.name)

    def writer(
        self, cache: Path, arrays: Sequence[Array] = ARRAYS, views: int = 2, shard: str = SHARD
    ) -> ShardWriter:
        (cache / SHARDS).mkdir(parents=True, exist_ok=True)
        writer: ShardWriter = self.backend.writer(cache, shard, arrays, views, self.form)
        return writer

    def fill(
        self,
        writer: ShardWriter,
        arrays: Sequence[Array],
        data: Mapping[str, np.ndarray],
        views: int,
        cuts: Sequence[int] = (),
        keys: Sequence[str] | None = None,
    ) -> None:
        """Append all items, split at the item numbers `cuts` (rows may be split between calls)."""
        rows = len(next(iter(data.values())))
        given = [
            key
            for key in ([f"k{i}" for i in range(rows)] if keys is None else keys)
            for _ in range(views)
        ]
        items = as_items(arrays, data, views)
        edges = sorted({0, len(given), *(cut % (len(given) + 1) for cut in cuts)})
        for low, high in pairwise(edges):
            writer.append(
                given[low:high], {name: values[low:high] for name, values in items.items()}
            )

    def publish(
        self,
        cache: Path,
        data: Mapping[str, np.ndarray],
        *,
        arrays: Sequence[Array] = ARRAYS,
        views: int = 2,
        cuts: Sequence[int] = (),
        shard: str = SHARD,
        keys: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        writer = self.writer(cache, arrays, views, shard)
        self.fill(writer, arrays, data, views, cuts, keys)
        return writer.finish([], STATISTICS)

    def read(
        self, cache: Path, array: Array, views: int, rows: np.ndarray, shard: str = SHARD
    ) -> np.ndarray:
        """(V, n, *item) by plain reads at the offsets that the store tells."""
        out = np.empty((views if array.per_view else 1, len(rows), *array.item), array.dtype)
        for view in range(len(out)):
            path, offsets = self.backend.locate(cache, shard, array, views, view, rows)
            path = Path(path)
            assert offsets.dtype == np.int64
            data = path.read_bytes()
            for place, offset in enumerate(offsets.tolist()):
                item = np.frombuffer(data[offset : offset + array.item_bytes], array.dtype)
                out[view, place] = item.reshape(array.item)
        return out

    def keys(self, cache: Path, record: Mapping[str, Any]) -> list[str]:
        blob, offsets = self.backend.keys(cache, SHARD, record)
        assert (blob.dtype, offsets.dtype) == (np.uint8, np.int64)
        return [blob[low:high].tobytes().decode() for low, high in pairwise(offsets)]

    def problems(self, cache: Path, record: Mapping[str, Any], *, deep: bool = True) -> list[str]:
        return commit.check_shard(cache, SHARD, self.name, record, deep=deep)

    def settle(self, cache: Path, *shards: str) -> None:
        commit.recover(cache, self.name, shards or [SHARD])

    # ------------------------------------------------------------ what is written

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

    # ------------------------------------------------------------ what is damaged

    def test_every_changed_byte_and_every_missing_file_is_named(self, tmp_path: Path) -> None:
        record = self.publish(tmp_path, numbers(ARRAYS, 3, 2))
        for path in [p for p in (tmp_path / SHARDS).rglob("*") if p.is_file()]:
            if path == record_path(tmp_path, SHARD):
                continue
            data = path.read_bytes()
            for at in {0, len(data) // 2, len(data) - 1}:
                path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
                problems = self.problems(tmp_path, record)
                assert len(problems) == 1, (path, at)
                assert str(path) in problems[0]
            path.write_bytes(data[:-1])
            assert str(path) in self.problems(tmp_path, record, deep=False)[0]
            path.unlink()
            assert str(path) in self.problems(tmp_path, record, deep=False)[0]
            path.write_bytes(data)
        assert self.problems(tmp_path, record) == []

    def test_damaged_keys_are_refused_by_their_files_name(self, tmp_path: Path) -> None:
        """Whatever file is damaged, keys are right or refused; the file that holds them is
        noticed."""
        record = self.publish(tmp_path, numbers(ARRAYS, 3, 2))
        noticed = set()
        for path in [p for p in folder_path(tmp_path, SHARD, self.name).rglob("*") if p.is_file()]:
            data = path.read_bytes()
            flipped = [
                data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in {0, len(data) // 2}
            ]
            for changed in (*flipped, data[:-1], b"", None):
                path.unlink() if changed is None else path.write_bytes(changed)
                try:
                    assert self.keys(tmp_path, record) == ["k0", "k1", "k2"]
                except UserError as error:
                    assert str(path) in str(error)  # noqa: PT017 (the other outcome is right as well)
                    noticed.add(path)
            path.write_bytes(data)
        assert noticed
        assert self.keys(tmp_path, record) == ["k0", "k1", "k2"]

    # ------------------------------------------------------------ who died, who races

    def unrecorded(self, cache: Path) -> dict[str, bytes]:
        """A shard whose writer died between its two renames; returns the files of an undisturbed
        one."""
        self.publish(cache, numbers(ARRAYS, 3, 2))
        whole = files_below(cache)
        record_path(cache, SHARD).rename(folder_path(cache, SHARD, self.name) / commit.RECORD)
        return whole

    def test_settle_adopts_a_whole_shard_without_record(self, tmp_path: Path) -> None:
        whole = self.unrecorded(tmp_path)
        self.settle(tmp_path)
        assert files_below(tmp_path) == whole

    def test_settle_removes_a_broken_shard_without_record(self, tmp_path: Path) -> None:
        """One changed byte in any file is enough."""
        self.unrecorded(tmp_path / "one")
        folder = folder_path(tmp_path / "one", SHARD, self.name)
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        for number, name in enumerate(files):
            cache = shutil.copytree(tmp_path / "one", tmp_path / str(number))
            path = folder_path(cache, SHARD, self.name) / name
            data = path.read_bytes()
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
            self.settle(cache)
            assert files_below(cache) == {}, name

    def test_settle_leaves_a_complete_shard_alone(self, tmp_path: Path) -> None:
        self.publish(tmp_path, numbers(ARRAYS, 3, 2))
        before = files_below(tmp_path)
        self.settle(tmp_path, SHARD, "000001")
        assert files_below(tmp_path) == before

    def test_settle_removes_a_dead_writers_work_and_keeps_a_live_ones(self, tmp_path: Path) -> None:
        live = self.writer(tmp_path)
        other = self.writer(tmp_path, shard="000001")
        kept = {path.name for path in (tmp_path / SHARDS).iterdir()}
        mine = f"{owner._host()}-{os.getpid()}-"
        folder = next(p for p in (tmp_path / SHARDS).iterdir() if p.name.startswith(SHARD))
        assert mine in folder.name
        dead = folder.name.replace(mine, f"{owner._host()}-{dead_process()}-")
        shutil.copytree(folder, folder.with_name(dead))
        self.settle(tmp_path)
        assert {path.name for path in (tmp_path / SHARDS).iterdir()} == kept
        live.discard()
        other.discard()

    def test_settle_does_not_touch_another_machines_writer(self, tmp_path: Path) -> None:
        writer = self.writer(tmp_path)
        folder = next(p for p in (tmp_path / SHARDS).iterdir())
        elsewhere = folder.with_name(folder.name.replace(owner._host(), "other-host_example+0"))
        shutil.copytree(folder, elsewhere)
        writer.discard()
        self.settle(tmp_path)
        assert elsewhere.is_dir()

    def test_every_file_is_known_as_the_stores_own(self, tmp_path: Path) -> None:
        """Whole or half written: nothing else may be deleted."""
        half = self.writer(tmp_path)
        folder = next(iter((tmp_path / SHARDS).iterdir()))
        assert list(belongings.foreign_in_shard(folder, self.name)) == []
        half.discard()
        record = self.publish(tmp_path, numbers(ARRAYS, 3, 2))
        assert all(get_store(self.name).FILES.fullmatch(file) for file in record["files"])
        folder = folder_path(tmp_path, SHARD, self.name)
        (folder / "a").mkdir()
        for name in ("thesis.tex", "a/thesis.tar", ".hidden", "a/zarr.json.txt", "v0.tar.gz"):
            (folder / name).write_text("mine")
        assert len(list(belongings.foreign_in_shard(folder, self.name))) == 5

    def test_the_loser_of_a_race_discards(self, tmp_path: Path) -> None:
        first, second = self.writer(tmp_path), self.writer(tmp_path)
        winner, loser = numbers(ARRAYS, 3, 2, seed=1), numbers(ARRAYS, 3, 2, seed=2)
        self.fill(first, ARRAYS, winner, 2)
        self.fill(second, ARRAYS, loser, 2)
        record = first.finish([], STATISTICS)
        before = {name: data for name, data in files_below(tmp_path).items() if ".tmp/" not in name}
        second.finish([], STATISTICS)
        assert files_below(tmp_path) == before
        assert self.problems(tmp_path, record) == []
        got = self.read(tmp_path, ARRAYS[0], 2, np.arange(3))
        np.testing.assert_array_equal(got, np.moveaxis(winner["features"], 1, 0))

    def test_discard_leaves_nothing(self, tmp_path: Path) -> None:
        writer = self.writer(tmp_path)
        self.fill(writer, ARRAYS, numbers(ARRAYS, 2, 2), 2)
        open_files = (
            len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
        )
        writer.discard()
        assert list((tmp_path / SHARDS).iterdir()) == []
        if open_files:
            assert len(list(Path("/proc/self/fd").iterdir())) < open_files
