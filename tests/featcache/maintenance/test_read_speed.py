"""A disk's speed is measured within bounds, past the page cache where that goes, and nothing is
left."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from featcache.maintenance import read_speed

MIB = 1 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_speed, "BYTES", 12 * MIB)
    monkeypatch.setattr(read_speed, "SECONDS", 60.0)  # bytes are the bound here


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def no_nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that makes no file without a name, as NFS."""
    plain = os.open

    def refuse(path: object, flags: int, *args: object, **more: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(path))
        return plain(path, flags, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("nameless", [True, False])
def test_all_that_was_written_is_read_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        no_nameless(monkeypatch)
    before = open_files()
    found = read_speed.measure(tmp_path)
    assert found.bytes == 12 * MIB
    assert found.seconds > 0
    assert found.bytes_per_s == found.bytes / found.seconds
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


def test_no_name_is_there_while_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a killed process leaves nothing either."""
    no_nameless(monkeypatch)
    with read_speed.scratch_file(tmp_path) as fd:
        assert os.write(fd, b"x") == 1
        assert list(tmp_path.iterdir()) == []


def test_the_file_is_gone_where_reading_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_nameless(monkeypatch)

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    before = open_files()
    with pytest.raises(OSError, match="Input/output error"):
        read_speed.measure(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


def test_reads_go_past_the_page_cache_where_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, direct = os.preadv, set()

    def note(fd: int, *args: object) -> int:
        direct.add(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return plain(fd, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", note)
    found = read_speed.measure(tmp_path)
    assert found.direct in direct
    assert len(direct) == 1 or not found.direct


def test_a_file_system_that_refuses_direct_reads_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.preadv

    def refuse(fd: int, *args: object) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", refuse)
    found = read_speed.measure(tmp_path)
    assert (found.bytes, found.direct) == (12 * MIB, False)


def test_time_is_a_bound_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a written block advances by 0.7 seconds: two blocks are begun in the first."""
    monkeypatch.setattr(read_speed, "SECONDS", 1.0)
    now, plain = [0.0], os.pwrite

    def slow(*args: object) -> int:
        now[0] += 0.7
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", slow)
    monkeypatch.setattr(read_speed.time, "monotonic", lambda: now[0])
    assert read_speed.measure(tmp_path).bytes == 8 * MIB


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits is measured; where not one block does, that is the error."""
    plain, room = os.pwrite, [2]

    def full(*args: object) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    assert read_speed.measure(tmp_path).bytes == 8 * MIB
    with pytest.raises(OSError, match="no room for 4 MiB"):
        read_speed.measure(tmp_path)


def test_little_of_what_is_free_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        read_speed.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 50 * MIB})
    )
    assert read_speed.measure(tmp_path).bytes == 4 * MIB


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(OSError, match="/proc"), read_speed.scratch_file(Path("/proc")):
        pass
