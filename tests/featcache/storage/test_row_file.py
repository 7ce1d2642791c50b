"""A file that only grows: its bytes, its running checksum, what is pushed out, and a disk that is
full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.storage import row_file
from featcache.storage.row_file import RowFile

SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)


@given(
    st.lists(
        st.tuples(SHAPES, st.sampled_from(["<f2", "<f4", "|u1", "<u2", "<i4", "<u8", "|b1"])),
        max_size=6,
    ),
    st.booleans(),
)
def test_a_file_holds_its_appends_in_c_order(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[tuple[int, ...], str]],
    fortran: bool,
) -> None:
    path = tmp_path_factory.mktemp("rows") / "new/file"
    random, file, expected = np.random.default_rng(0), RowFile(path), b""
    for shape, dtype in parts:
        rows = np.asarray(random.integers(0, 200, shape)).astype(dtype)
        file.append(np.asfortranarray(rows) if fortran else rows)
        expected += rows.tobytes("C")
        assert (file.bytes, file.crc) == (len(expected), crc32c.crc32c(expected))
    file.close()
    assert path.read_bytes() == expected
    assert (file.bytes, file.crc) == (len(expected), crc32c.crc32c(expected))


def test_strided_rows_are_written_as_numpy_shows_them(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.uint16).reshape(6, 4)[1::2, ::-2]
    file = RowFile(tmp_path / "file")
    file.append(rows)
    file.close()
    assert np.fromfile(tmp_path / "file", np.uint16).tolist() == [7, 5, 15, 13, 23, 21]


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        RowFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("last", ["close", "abort"])
def test_an_interrupt_as_the_file_closes_does_not_close_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """A signal's handler runs as the call returns; its number may be another file's by then."""
    file, close, fds = RowFile(tmp_path / "file"), os.close, []

    def interrupted(fd: int) -> None:
        close(fd)
        fds.append(fd)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(file, last)()
    file.abort()
    assert len(fds) == 1


def test_a_write_that_takes_less_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    file = RowFile(tmp_path / "file")
    file.append(np.arange(10, dtype=np.uint8))
    file.append(np.arange(4, dtype=np.uint8))
    monkeypatch.undo()
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes([*range(10), *range(4)])


def test_dirty_pages_are_pushed_out_as_the_file_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time ten more bytes are there, from the beginning of the file; and all of it is synced
    at the end."""
    calls: list[Any] = []
    fsync = os.fsync
    monkeypatch.setattr(row_file, "PUSH_BYTES", 10)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: calls.append(rest), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", "forget", raising=False)
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), fsync(fd))[1])
    file = RowFile(tmp_path / "file")
    for count in (4, 4, 1, 1, 9, 30, 2):
        file.append(np.zeros(count, np.uint8))
    assert calls == [(0, 10, "forget"), (0, 49, "forget")]
    file.close()
    assert calls[2:] == ["sync"]


def test_a_system_without_fadvise_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_file, "PUSH_BYTES", 1)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    file = RowFile(tmp_path / "file")
    file.append(np.arange(3, dtype=np.uint8))
    file.close()
    assert (tmp_path / "file").read_bytes() == b"\0\1\2"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = RowFile(tmp_path / "file")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        file.append(np.zeros(5, np.uint8))
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    file.abort()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_failed_sync_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = RowFile(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        file.close()
    file.abort()


def test_abandon_closes_once_and_for_all(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "file")
    fd = file.fd
    file.abort()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    other = os.open(tmp_path / "file", os.O_RDONLY)  # may well get the same number
    file.abort()
    os.fstat(other)
    os.close(other)
