"""What every store must do, whoever writes it: a test class to inherit, with `name` set to the store's name.

n rows, V views. A store's own file formats are tested beside it; here only the contract of `featcache.store` is used.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featcache import manifest
from featcache.store import SHARDS, Array, record_path, store

DTYPES = ["<f2", "<f4", "|u1", "<u2", "<u4", "<i4", "<u8"]
KEYS = (
    Array("key", "|u1", (), ("byte",), per_view=False),
    Array("key_offsets", "<i8", (), ("row_edge",), per_view=False),
)
ARRAYS = [
    Array("features", "<f2", (2, 3, 4), ("row", "view", "level", "token", "channel"), split=True),
    Array("attention", "<f4", (2,), ("row", "view", "patch")),
    Array("flip", "|u1", (), ("row", "view")),
    Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
    *KEYS,
]


def numbers(arrays: Sequence[Array], rows: int, views: int, seed: int = 0) -> dict[str, np.ndarray]:
    """(n, V, *item) or (n, *item) of every array but the keys, any finite bytes."""
    random = np.random.default_rng(seed)
    out = {}
    for array in arrays:
        if array.name not in ("key", "key_offsets"):
            shape = (rows, *([views] if array.per_view else []), *array.item)
            low, high = (-99, 99) if np.dtype(array.dtype).kind in "fi" else (0, 99)
            out[array.name] = random.integers(low, high, shape).astype(array.dtype)
    return out


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class StoreContract:
    """Inherit as `class TestX(StoreContract): name = "x"`."""

    name: str

    @property
    def backend(self) -> ModuleType:
        return store(self.name)

    def writer(self, cache: Path, arrays: Sequence[Array] = ARRAYS, views: int = 2, shard: str = "000000") -> Any:
        (cache / SHARDS).mkdir(parents=True, exist_ok=True)
        return self.backend.writer(cache, shard, arrays, views)

    def fill(
        self, writer: Any, arrays: Sequence[Array], data: dict[str, np.ndarray], views: int, cuts: Sequence[int] = ()
    ) -> None:
        """Append all items, split at the item numbers `cuts` (rows may be split between calls)."""
        rows = len(next(iter(data.values())))
        edges = sorted({0, rows * views, *(cut % (rows * views + 1) for cut in cuts)})
        flat = {a.name: data[a.name].reshape(-1, *a.item) for a in arrays if a.name in data and a.per_view}
        for low, high in pairwise(edges):
            part = {name: values[low:high] for name, values in flat.items()}
            writer.append(part, {})
        writer.append_rows({a.name: data[a.name] for a in arrays if a.name in data and not a.per_view})

    def publish(
        self,
        cache: Path,
        data: dict[str, np.ndarray],
        *,
        arrays: Sequence[Array] = ARRAYS,
        views: int = 2,
        cuts: Sequence[int] = (),
        shard: str = "000000",
    ) -> dict[str, Any]:
        writer = self.writer(cache, arrays, views, shard)
        self.fill(writer, arrays, data, views, cuts)
        return writer.finish([f"k{i}" for i in range(len(next(iter(data.values()))))], [])

    def read(self, cache: Path, array: Array, views: int, rows: int, shard: str = "000000") -> np.ndarray:
        """(V, n, *item) by plain reads at the offsets that the store tells."""
        out = np.empty((views if array.per_view else 1, rows, *array.item), array.dtype)
        for view in range(len(out)):
            path, offsets = self.backend.locate(cache, shard, array, views, view, np.arange(rows))
            data = path.read_bytes()
            for row, offset in enumerate(offsets.tolist()):
                item = np.frombuffer(data[offset : offset + array.item_bytes], array.dtype)
                out[view, row] = item.reshape(array.item)
        return out

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
            *KEYS,
        ]
        data = numbers(arrays, rows, views)
        record = self.publish(cache, data, arrays=arrays, views=views, cuts=cuts)
        assert record["rows"] == rows
        for array in arrays[:3]:
            got = self.read(cache, array, views, rows)
            expected = np.moveaxis(data[array.name], 1, 0) if array.per_view else data[array.name][None]
            np.testing.assert_array_equal(got, expected)
        assert self.backend.check(cache, "000000", record, deep=True) == []

    @pytest.mark.parametrize("cuts", [[], [1], [3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 5]])
    def test_any_split_of_the_stream_gives_the_same_bytes(self, tmp_path: Path, cuts: list[int]) -> None:
        data = numbers(ARRAYS, 5, 2)
        self.publish(tmp_path / "whole", data)
        self.publish(tmp_path / "parts", data, cuts=cuts)
        assert files_below(tmp_path / "whole") == files_below(tmp_path / "parts")

    def test_rows_of_no_items_are_legal(self, tmp_path: Path) -> None:
        """A shard all of whose pictures are quarantined."""
        writer = self.writer(tmp_path)
        record = writer.finish([], [{"key": "bad", "reason": "because"}])
        assert record["rows"] == 0
        assert record["quarantined"] == [{"key": "bad", "reason": "because"}]
        assert manifest.read_json(record_path(tmp_path, "000000")) == record
        assert self.backend.check(tmp_path, "000000", record, deep=True) == []

    def test_record_holds_counts_digest_ranges_and_every_file(self, tmp_path: Path) -> None:
        data = numbers(ARRAYS, 4, 2)
        record = self.publish(tmp_path, data)
        assert manifest.read_json(record_path(tmp_path, "000000")) == record
        assert record["shard"] == "000000"
        assert record["keys_digest"] == manifest.keys_digest(["k0", "k1", "k2", "k3"])
        for array in ARRAYS[:4]:
            values = data[array.name].astype(np.float64)
            assert record["ranges"][array.name] == [values.min(), values.max()], array.name
        total = sum(facts["bytes"] for facts in record["files"].values())
        assert total == sum(len(content) for content in files_below(tmp_path).values()) - len(
            record_path(tmp_path, "000000").read_bytes()
        )

    def test_a_wrong_item_shape_is_refused(self, tmp_path: Path) -> None:
        writer = self.writer(tmp_path)
        with pytest.raises(ValueError, match=r"attention.*\(3,\).*\(2,\)"):
            writer.append({"attention": np.zeros((1, 3), np.float32)}, {})
        writer.discard()
        assert files_below(tmp_path) == {}

    # ------------------------------------------------------------ what is damaged

    def test_every_changed_byte_and_every_missing_file_is_named(self, tmp_path: Path) -> None:
        record = self.publish(tmp_path, numbers(ARRAYS, 3, 2))
        for name in files_below(tmp_path):
            path = tmp_path / name
            if path == record_path(tmp_path, "000000"):
                continue
            data = path.read_bytes()
            for at in {0, len(data) // 2, len(data) - 1}:
                path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
                problems = self.backend.check(tmp_path, "000000", record, deep=True)
                assert len(problems) == 1, (name, at)
                assert str(path) in problems[0]
            path.write_bytes(data[:-1])
            assert str(path) in self.backend.check(tmp_path, "000000", record, deep=False)[0]
            path.unlink()
            assert str(path) in self.backend.check(tmp_path, "000000", record, deep=False)[0]
            path.write_bytes(data)
        assert self.backend.check(tmp_path, "000000", record, deep=True) == []

    # ------------------------------------------------------------ who died, who races

    def unrecorded(self, cache: Path) -> dict[str, bytes]:
        """A shard whose writer died between its two renames; returns the files of an undisturbed one."""
        self.publish(cache, numbers(ARRAYS, 3, 2))
        whole = files_below(cache)
        self.unpublish_record(cache)
        assert not record_path(cache, "000000").exists()
        return whole

    def unpublish_record(self, cache: Path) -> None:
        """Put a published shard back into the state between the two renames."""
        pytest.fail("a store's own suite says how")

    def damage(self, cache: Path) -> None:
        """Change one byte of the unrecorded shard's data."""
        path = next(p for p in sorted((cache / SHARDS).rglob("*")) if p.is_file() and p.stat().st_size > 40)
        path.write_bytes(b"\x01" + path.read_bytes()[1:])

    def test_settle_adopts_a_whole_shard_without_record(self, tmp_path: Path) -> None:
        whole = self.unrecorded(tmp_path)
        self.backend.settle(tmp_path, "000000")
        assert files_below(tmp_path) == whole

    def test_settle_removes_a_broken_shard_without_record(self, tmp_path: Path) -> None:
        self.unrecorded(tmp_path)
        self.damage(tmp_path)
        self.backend.settle(tmp_path, "000000")
        assert files_below(tmp_path) == {}

    def test_settle_leaves_a_complete_shard_alone(self, tmp_path: Path) -> None:
        self.publish(tmp_path, numbers(ARRAYS, 3, 2))
        before = files_below(tmp_path)
        self.backend.settle(tmp_path, "000000")
        self.backend.settle(tmp_path, "000001")
        assert files_below(tmp_path) == before

    def test_settle_removes_a_dead_writers_work_and_keeps_a_live_ones(self, tmp_path: Path) -> None:
        live = self.writer(tmp_path)
        other = self.writer(tmp_path, shard="000001")
        kept = set(files_below(tmp_path))
        pid = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for folder in [p for p in (tmp_path / SHARDS).iterdir() if "000000" in p.name]:
            mine = f"{socket.gethostname()}-{os.getpid()}-"
            assert mine in folder.name
            shutil.copytree(folder, folder.with_name(folder.name.replace(mine, f"{socket.gethostname()}-{pid}-")))
        assert set(files_below(tmp_path)) != kept
        self.backend.settle(tmp_path, "000000")
        assert set(files_below(tmp_path)) == kept
        live.discard()
        other.discard()

    def test_settle_does_not_touch_another_machines_writer(self, tmp_path: Path) -> None:
        writer = self.writer(tmp_path)
        folder = next(p for p in (tmp_path / SHARDS).iterdir())
        elsewhere = folder.with_name(folder.name.replace(socket.gethostname(), "other-host.example"))
        shutil.copytree(folder, elsewhere)
        writer.discard()
        self.backend.settle(tmp_path, "000000")
        assert elsewhere.is_dir()

    def test_the_loser_of_a_race_discards(self, tmp_path: Path) -> None:
        first, second = self.writer(tmp_path), self.writer(tmp_path)
        winner, loser = numbers(ARRAYS, 3, 2, seed=1), numbers(ARRAYS, 3, 2, seed=2)
        self.fill(first, ARRAYS, winner, 2)
        self.fill(second, ARRAYS, loser, 2)
        record = first.finish(["k0", "k1", "k2"], [])
        before = {name: data for name, data in files_below(tmp_path).items() if ".tmp/" not in name}
        second.finish(["k0", "k1", "k2"], [])
        assert files_below(tmp_path) == before
        assert self.backend.check(tmp_path, "000000", record, deep=True) == []
        np.testing.assert_array_equal(self.read(tmp_path, ARRAYS[0], 2, 3), np.moveaxis(winner["features"], 1, 0))

    def test_discard_leaves_nothing(self, tmp_path: Path) -> None:
        writer = self.writer(tmp_path)
        self.fill(writer, ARRAYS, numbers(ARRAYS, 2, 2), 2)
        writer.discard()
        assert files_below(tmp_path) == {}
