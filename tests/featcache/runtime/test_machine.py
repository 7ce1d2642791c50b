"""Limits of the control group are found in both versions of its file system, here a folder."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from featcache.runtime import machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty file system of control groups; this process is in /a/b of both versions."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/a/b\n")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_no_limit(group: Path) -> None:
    assert (machine.core_quota(), machine.memory_limit()) == (None, None)
    put(group / "a/b", cpu__max="max 100000", memory__max="max")
    put(group / "cpu/a/b", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    put(group / "memory/a", memory__limit_in_bytes="9223372036854771712")
    assert (machine.core_quota(), machine.memory_limit()) == (None, None)


def test_the_least_of_the_group_and_those_above_counts(group: Path) -> None:
    put(group / "a/b", cpu__max="400000 100000", memory__max="8000000000")
    put(group / "a", cpu__max="150000 100000", memory__max="max")
    put(group, memory__max="6000000000")
    assert (machine.core_quota(), machine.memory_limit()) == (1.5, 6_000_000_000)


def test_the_first_version(group: Path) -> None:
    put(group / "cpu/a/b", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    put(group / "memory/a", memory__limit_in_bytes="1000000")
    assert (machine.core_quota(), machine.memory_limit()) == (0.5, 1_000_000)


def test_a_group_out_of_sight_is_not_walked_to(group: Path) -> None:
    """Only what lies below the file system is read, wherever the kernel says the group is."""
    (group.parent / "membership").write_text("0::/../../outside\nnonsense\n")
    put(group.parent / "outside", memory__max="1")
    put(group.parent, memory__max="2")
    put(group, memory__max="3000")
    assert machine.memory_limit() == 3000


def test_without_control_groups(group: Path) -> None:
    (group.parent / "membership").unlink()
    assert (machine.core_quota(), machine.memory_limit()) == (None, None)


def test_cores_files_and_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert machine.allowed_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert machine.file_limits() == resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "not there")
    assert machine.shared_memory() is None
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    found = machine.shared_memory()
    assert found is not None
    assert found[0] == os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
