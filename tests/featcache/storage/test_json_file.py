"""A file is replaced whole, after its bytes are on the disk, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from featcache.storage import json_file


def test_the_file_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "a", list[tuple[str, bytes]]()
    path.write_bytes(b"old")
    fsync = os.fsync

    def note(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        synced.append((name, path.read_bytes()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    with json_file.replaced(path) as temporary:
        temporary.write_bytes(b"new")
    assert synced == [(temporary.name, b"old"), (tmp_path.name, b"new")]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_leaves_the_file_as_it_was(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(before)

    def write_half() -> None:
        with json_file.replaced(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before] * (before is not None)
