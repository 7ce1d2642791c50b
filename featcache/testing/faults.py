"""Check that damage is named, and that writers which die or race leave a shard whole or none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from featcache.errors import UserError
from featcache.storage import belongings, commit, owner
from featcache.storage.store import SHARDS, folder_path, get_store, record_path
from featcache.testing.case import StoreCase
from featcache.testing.items import (
    ARRAYS,
    SHARD,
    STATISTICS,
    dead_process,
    files_below,
    numbers,
)


class FaultsContract(StoreCase):
    """Damaged files, dead writers and races."""

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
