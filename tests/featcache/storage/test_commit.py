"""A shard becomes visible in spite of deaths, races and other machines' leftovers, and a repair
backs it up.

No store's writer is used: a shard is a folder of two small files, checked as the webdataset store
checks any file.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import crc32c
import pytest

from featcache.errors import UserError
from featcache.storage import commit, json_file, owner
from featcache.storage.store import SHARDS, folder_path, record_path
from featcache.testing.items import dead_process, files_below

STORE, SHARD = "webdataset", "000007"
DAY_S = 24 * 3600
CONTENT = {"a.bin": b"numbers" * 50, "sub/b.bin": b""}


def facts(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "crc32c": f"{crc32c.crc32c(data):08x}"}


def record_of(content: dict[str, bytes]) -> dict[str, Any]:
    return {
        "shard": SHARD,
        "rows": 1,
        "files": {name: facts(data) for name, data in content.items()},
    }


def begin(cache: Path, content: dict[str, bytes] = CONTENT) -> Path:
    """A writer's folder with everything but the record."""
    (cache / SHARDS).mkdir(exist_ok=True)
    folder = commit.begin_shard(cache, SHARD, STORE)
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def published(cache: Path, content: dict[str, bytes] = CONTENT) -> dict[str, bytes]:
    """A complete shard; all files of the cache."""
    commit.publish(begin(cache, content), cache, SHARD, STORE, record_of(content))
    return files_below(cache)


def unrecorded(cache: Path) -> dict[str, bytes]:
    """A shard between its two renames; the files of the complete one."""
    whole = published(cache)
    record_path(cache, SHARD).rename(folder_path(cache, SHARD, STORE) / commit.RECORD)
    return whole


def names(cache: Path) -> set[str]:
    return {path.name for path in (cache / SHARDS).iterdir()}


def age(path: Path, seconds: float) -> None:
    """Make a file or a folder, with all below it, so old."""
    then = time.time() - seconds
    for each in (*path.rglob("*"), path):
        os.utime(each, (then, then))


def test_a_writer_does_not_bring_back_a_cache_that_was_moved_away(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moved or removed while it was written") as caught:
        commit.begin_shard(tmp_path / "c", SHARD, STORE)
    assert str(tmp_path / "c" / SHARDS) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- two renames


def test_a_published_shard_is_its_files_and_its_record(tmp_path: Path) -> None:
    files = published(tmp_path)
    folder = f"{SHARDS}/{SHARD}.{STORE}"
    assert set(files) == {f"{folder}/a.bin", f"{folder}/sub/b.bin", f"{SHARDS}/{SHARD}.json"}
    assert files[f"{folder}/a.bin"] == CONTENT["a.bin"]
    assert json_file.read_json(record_path(tmp_path, SHARD)) == record_of(CONTENT)
    assert commit.check_shard(tmp_path, SHARD, STORE, record_of(CONTENT), deep=True) == []


def test_until_the_first_rename_nothing_is_to_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is in the folder, durable, before the folder gets its name."""
    seen = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        final = folder_path(tmp_path, SHARD, STORE).exists()
        seen.append((path.name.split(".")[-1], final, record_path(tmp_path, SHARD).exists()))
        assert (path if path.is_dir() else path.parent).joinpath(commit.RECORD).is_file()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    published(tmp_path)
    assert seen == [("tmp", False, False), ("json", True, False)]


def test_the_loser_of_a_race_keeps_what_is_there(tmp_path: Path) -> None:
    late = begin(tmp_path, {"a.bin": b"other"})
    before = published(tmp_path)
    commit.publish(late, tmp_path, SHARD, STORE, record_of({"a.bin": b"other"}))
    assert files_below(tmp_path) == {
        name: data for name, data in before.items() if ".tmp/" not in name
    }


def test_the_loser_finishes_for_a_winner_that_died_between_the_renames(tmp_path: Path) -> None:
    late = begin(tmp_path)
    whole = {name: data for name, data in unrecorded(tmp_path).items() if ".tmp/" not in name}
    commit.publish(late, tmp_path, SHARD, STORE, record_of(CONTENT))
    assert files_below(tmp_path) == whole


def test_a_stranger_in_the_way_of_publishing_is_an_error_not_a_loss(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    folder_path(tmp_path, SHARD, STORE).write_text("a file where the folder should be")
    with pytest.raises(OSError, match=SHARD):
        commit.publish(folder, tmp_path, SHARD, STORE, record_of(CONTENT))
    assert not record_path(tmp_path, SHARD).exists()
    assert (folder / "a.bin").read_bytes() == CONTENT["a.bin"]


def test_two_writers_of_one_process_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / SHARDS).mkdir()
    folders = {commit.begin_shard(tmp_path, SHARD, STORE) for _ in range(5)}
    assert len(folders) == 5
    assert all(not commit.is_abandoned(folder) for folder in folders)


# ---------------------------------------------------------------- settling


def test_settle_adopts_what_proves_itself(tmp_path: Path) -> None:
    whole = unrecorded(tmp_path)
    commit.recover(tmp_path, STORE, ["000001"])
    assert files_below(tmp_path) != whole
    commit.recover(tmp_path, STORE, [SHARD])
    assert files_below(tmp_path) == whole


@pytest.mark.parametrize(
    "damage", ["a changed byte", "a missing file", "a cut record", "no record"]
)
def test_settle_removes_what_does_not(tmp_path: Path, damage: str) -> None:
    """A record that cannot be read proves nothing; extraction must go on, not stop at it."""
    unrecorded(tmp_path)
    folder = folder_path(tmp_path, SHARD, STORE)
    record, data = folder / commit.RECORD, folder / "a.bin"
    if damage == "a changed byte":
        data.write_bytes(b"N" + CONTENT["a.bin"][1:])
    elif damage == "a missing file":
        data.unlink()
    elif damage == "a cut record":
        record.write_bytes(record.read_bytes()[:-30])
    else:
        record.unlink()
    commit.recover(tmp_path, STORE, [SHARD])
    assert names(tmp_path) == set()


def test_settle_leaves_other_shards_and_other_stores_alone(tmp_path: Path) -> None:
    unrecorded(tmp_path)
    before = files_below(tmp_path)
    commit.recover(tmp_path, STORE, ["000008"])
    commit.recover(tmp_path, "zarr", [SHARD])
    assert files_below(tmp_path) == before


def test_settle_never_removes_what_another_process_just_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes share --out. B looks for the record: none. A moves it into place. B looks into
    the folder: none there either. It must not conclude that the folder is broken."""
    whole = unrecorded(tmp_path)
    inside, outside = (
        folder_path(tmp_path, SHARD, STORE) / commit.RECORD,
        record_path(tmp_path, SHARD),
    )
    asked = []
    is_file = Path.is_file

    def publishes_after_the_first_look(path: Path, **options: bool) -> bool:
        answer = is_file(path, **options)
        if path == outside and not asked:
            asked.append(path)
            inside.rename(outside)
        return answer

    monkeypatch.setattr(Path, "is_file", publishes_after_the_first_look)
    commit.recover(tmp_path, STORE, [SHARD])
    monkeypatch.undo()
    assert asked
    assert files_below(tmp_path) == whole


def test_two_may_adopt_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While B checks the bytes, A, which does the same, is done."""
    whole = unrecorded(tmp_path)
    check = commit.check_shard

    def slow_check(*args: Any, **options: Any) -> list[str]:
        problems = check(*args, **options)
        (folder_path(tmp_path, SHARD, STORE) / commit.RECORD).rename(record_path(tmp_path, SHARD))
        return problems

    monkeypatch.setattr(commit, "check_shard", slow_check)
    commit.recover(tmp_path, STORE, [SHARD])
    assert files_below(tmp_path) == whole


# ---------------------------------------------------------------- who is dead


def leftover(cache: Path, writer: str) -> Path:
    path = cache / SHARDS / f"{SHARD}.{STORE}.{writer}.tmp"
    path.mkdir(parents=True)
    (path / "a.bin").write_bytes(b"half")
    return path


def test_here_a_writer_is_dead_when_its_process_is(tmp_path: Path) -> None:
    host = owner._host()
    mine = owner.writer_id()
    started = mine.rpartition("-")[2].partition("x")[0]
    assert mine.startswith(f"{host}-{os.getpid()}-{started}x")
    assert not commit.is_abandoned(leftover(tmp_path, f"{host}-{os.getpid()}-{started}x00000000"))
    assert commit.is_abandoned(leftover(tmp_path, f"{host}-{dead_process()}-{started}x00000000"))
    assert commit.is_abandoned(leftover(tmp_path, f"{host}-0x7-{started}x00000000"))


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the system does not tell when a process started"
)
def test_another_process_of_the_same_number_is_not_taken_for_the_writer(tmp_path: Path) -> None:
    assert commit.is_abandoned(leftover(tmp_path, f"{owner._host()}-{os.getpid()}-1x00000000"))


@pytest.mark.parametrize(
    "writer",
    ["elsewhere+0a1b-12-5x00ff00ff", "two-words_and-more+0-1-5x0", "old.style-12-0011aabb"],
)
def test_of_other_hosts_a_day_without_change_is_death(tmp_path: Path, writer: str) -> None:
    """Process numbers of other machines, and of other containers of this one, say nothing here."""
    path = leftover(tmp_path, writer)
    assert not commit.is_abandoned(path)
    age(path, DAY_S - 600)
    assert not commit.is_abandoned(path)
    age(path, DAY_S + 600)
    assert commit.is_abandoned(path)
    (path / "a.bin").write_bytes(b"more")  # the file is new, its folder is not
    then = time.time() - 2 * DAY_S
    os.utime(path, (then, then))
    assert not commit.is_abandoned(path)


def test_settle_removes_another_hosts_work_only_when_it_is_old(tmp_path: Path) -> None:
    new, old = leftover(tmp_path, "elsewhere+0-12-5x1"), leftover(tmp_path, "elsewhere+0-12-5x2")
    age(old, 2 * DAY_S)
    commit.recover(tmp_path, STORE, [SHARD])
    assert names(tmp_path) == {new.name}


def test_a_leftover_that_goes_while_it_is_looked_at_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leftover(tmp_path, "elsewhere+0-12-5x1")
    age(path, 2 * DAY_S)
    rglob = Path.rglob

    def goes(self: Path, pattern: str) -> list[Path]:
        found = list(rglob(self, pattern))
        shutil.rmtree(self)
        return found

    monkeypatch.setattr(Path, "rglob", goes)
    assert not commit.is_abandoned(path)


def test_leftovers_are_each_named_once(tmp_path: Path) -> None:
    """Folders of dead writers, temporary files of theirs beside the manifest and the records, and
    replaced shards."""
    dead = f"{owner._host()}-{dead_process()}-1x00000000"
    published(tmp_path)
    for path in (
        tmp_path / f".manifest.json.{dead}.tmp",
        tmp_path / SHARDS / f".{SHARD}.json.{dead}.tmp",
    ):
        path.write_bytes(b"half")
    found = {
        *tmp_path.glob(".*.tmp"),
        *(tmp_path / SHARDS).glob(".*.tmp"),
        leftover(tmp_path, dead),
    }
    (tmp_path / f".manifest.json.{owner.writer_id()}.tmp").write_bytes(b"being written")
    (tmp_path / "notes.txt").write_bytes(b"of the user")
    listed = list(commit.leftovers(tmp_path))
    assert set(listed) == found
    assert len(listed) == len(found) == 3


# ---------------------------------------------------------------- what a repair does


def test_backup_and_restore(tmp_path: Path) -> None:
    before = published(tmp_path)
    commit.move_to_backup(tmp_path, SHARD, STORE)
    assert not record_path(tmp_path, SHARD).exists()
    assert not folder_path(tmp_path, SHARD, STORE).exists()
    assert len(files_below(tmp_path)) == len(before)
    assert list(commit.leftovers(tmp_path)) == []  # its replacement has not come
    commit.recover(tmp_path, STORE, [SHARD])
    commit.move_to_backup(tmp_path, SHARD, STORE)  # once more does no harm
    commit.restore_backup(tmp_path, SHARD, STORE)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("missing", ["record", "folder"])
def test_a_shard_of_which_a_part_is_missing_can_be_backed_up(tmp_path: Path, missing: str) -> None:
    published(tmp_path)
    if missing == "record":
        record_path(tmp_path, SHARD).unlink()
    else:
        shutil.rmtree(folder_path(tmp_path, SHARD, STORE))
    left = files_below(tmp_path)
    commit.move_to_backup(tmp_path, SHARD, STORE)
    assert files_below(tmp_path).keys().isdisjoint(left)
    commit.restore_backup(tmp_path, SHARD, STORE)
    assert files_below(tmp_path) == left


def test_a_death_between_the_two_moves_of_a_backup_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And after the first of them nobody takes the shard for complete."""
    before = published(tmp_path)
    rename, moved = Path.rename, []

    def dies_at_the_second(path: Path, target: Path) -> Path:
        if moved:
            raise KeyboardInterrupt
        moved.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        commit.move_to_backup(tmp_path, SHARD, STORE)
    monkeypatch.undo()
    assert not record_path(tmp_path, SHARD).exists()
    commit.move_to_backup(tmp_path, SHARD, STORE)
    assert not folder_path(tmp_path, SHARD, STORE).exists()
    commit.restore_backup(tmp_path, SHARD, STORE)
    assert files_below(tmp_path) == before


def test_a_replaced_shard_stays_and_the_old_one_goes(tmp_path: Path) -> None:
    published(tmp_path, {"a.bin": b"damaged"})
    commit.move_to_backup(tmp_path, SHARD, STORE)
    published(tmp_path)
    complete = {f"{SHARD}.json", f"{SHARD}.{STORE}"}
    listed = list(commit.leftovers(tmp_path))
    assert len(listed) == 2
    assert {path.name for path in listed} == names(tmp_path) - complete
    commit.restore_backup(tmp_path, SHARD, STORE)  # a new shard has come: nothing to undo
    assert names(tmp_path) == complete
    assert commit.check_shard(tmp_path, SHARD, STORE, record_of(CONTENT), deep=True) == []


def test_a_backup_can_be_removed(tmp_path: Path) -> None:
    published(tmp_path)
    commit.move_to_backup(tmp_path, SHARD, STORE)
    commit.remove_backup(tmp_path, SHARD, STORE)
    commit.remove_backup(tmp_path, SHARD, STORE)
    assert names(tmp_path) == set()


def test_a_shard_that_is_damaged_again_is_backed_up_again(tmp_path: Path) -> None:
    """A repair died after the new shard came and before the old one was forgotten."""
    published(tmp_path, {"a.bin": b"damaged"})
    commit.move_to_backup(tmp_path, SHARD, STORE)
    second = {name: data for name, data in published(tmp_path).items() if ".bad" not in name}
    commit.move_to_backup(tmp_path, SHARD, STORE)
    assert not record_path(tmp_path, SHARD).exists()
    commit.restore_backup(tmp_path, SHARD, STORE)
    assert files_below(tmp_path) == second


@pytest.mark.parametrize("again", [False, True])
def test_restore_replaces_what_was_never_finished(tmp_path: Path, again: bool) -> None:
    """The replacement's writer died between its two renames; a second repair may begin where the
    first one did."""
    old = published(tmp_path, {"a.bin": b"damaged"})
    commit.move_to_backup(tmp_path, SHARD, STORE)
    unrecorded(tmp_path)
    if again:
        commit.move_to_backup(tmp_path, SHARD, STORE)
    commit.restore_backup(tmp_path, SHARD, STORE)
    assert files_below(tmp_path) == old


# ---------------------------------------------------------------- checks


def test_check_says_what_is_wrong_with_each_file(tmp_path: Path) -> None:
    published(tmp_path)
    folder = folder_path(tmp_path, SHARD, STORE)
    record = record_of({**CONTENT, "c.bin": b"never written"})
    (folder / "a.bin").write_bytes(CONTENT["a.bin"][:-1] + b"?")
    (folder / "sub/b.bin").write_bytes(b"12")
    lines = [f"{folder}/sub/b.bin: 2 bytes, 0 recorded", f"{folder}/c.bin: missing"]
    assert commit.check_shard(tmp_path, SHARD, STORE, record, deep=False) == lines
    deep = commit.check_shard(tmp_path, SHARD, STORE, record, deep=True)
    assert deep == [f"{folder}/a.bin: checksum differs", *lines]


@pytest.mark.parametrize("count", [0, 1, 8, 9, 19, 20, 99])
def test_file_crc_is_of_the_first_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Read in pieces of any size; of a file that is shorter, all there is."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(20)))
    expected = crc32c.crc32c(bytes(range(20))[:count])
    for piece in (1, 3, 1 << 20):
        monkeypatch.setattr(commit, "_READ_BYTES", piece)
        assert commit.file_crc(path, count) == expected
