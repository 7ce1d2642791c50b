"""A file is replaced whole, after its bytes are on the disk, or not at all."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_a_full_disk_is_an_oserror_of_the_file(writer: str, tmp_path: Path) -> None:
    """No file may have more than 8 kB; both libraries raise errors of their own."""
    path, tensors = tmp_path / "a", {"x": torch.zeros(1 << 16)}
    path.write_text("before")

    def write() -> None:
        with json_file.replaced(path) as temporary:
            if writer == "safetensors":
                return save_file(tensors, temporary)
            with temporary.open("wb") as file:
                torch.save(tensors, file)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "before"
