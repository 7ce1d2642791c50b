"""A machine of the same name, or this one before it was started again, is another host."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from featcache.errors import UserError
from featcache.storage import commit, json_file, lease, owner
from featcache.storage.store import SHARDS


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The writer of a process of this number, where the file named by the parameter differs."""
    read = owner._read
    monkeypatch.setattr(
        owner, "_read", lambda path: "other" if path == request.param else read(path)
    )
    owner._host.cache_clear()
    name = owner.writer_id()
    monkeypatch.undo()
    owner._host.cache_clear()
    yield name
    owner._host.cache_clear()


BOOT, MACHINE = "/proc/sys/kernel/random/boot_id", "/etc/machine-id"


@pytest.mark.parametrize("elsewhere", [BOOT, MACHINE], indirect=True)
def test_a_machine_of_the_same_name_is_another_host(elsewhere: str, tmp_path: Path) -> None:
    ours = owner.writer_id()
    assert elsewhere.partition("+")[0] == ours.partition("+")[0]
    assert owner.is_writer(elsewhere)
    assert not owner.is_here(elsewhere)
    ended = elsewhere.replace(f"-{os.getpid()}-", "-99999999-")
    assert owner.is_alive(ended)  # as far as can be told here
    (tmp_path / SHARDS).mkdir()
    held = lease.lease_path(tmp_path, "000000")
    held.write_text(ended)
    work = tmp_path / SHARDS / f"000000.zarr.{ended}.tmp"
    work.mkdir()
    assert lease.acquire(tmp_path, "000000") is None
    commit.recover(tmp_path, "zarr", ["000000"])
    assert work.is_dir()
    os.utime(held, (time.time() - 1.5 * lease.STALE_S,) * 2)
    taken = lease.acquire(tmp_path, "000000")
    assert taken is not None
    taken.release()


def test_a_writer_of_an_older_version_is_dead_by_age_alone(tmp_path: Path) -> None:
    """Its host's name says less, so that it may be of a machine of the same name."""
    old = f"{socket.gethostname().replace('.', '_')}+0a1b-{os.getpid()}-5x00ff00ff"
    assert owner.is_writer(old)
    assert not owner.is_here(old)
    left = tmp_path / f".manifest.json.{old}.tmp"
    left.write_text("{")
    json_file.sweep(tmp_path)
    assert left.exists()
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    json_file.sweep(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("name", ["a/b", "..", "läptop", "a b", "x\x1b[2J", ""])
def test_a_hosts_name_never_leaves_its_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    owner._host.cache_clear()
    try:
        assert not set(owner.writer_id()) & set("/. \x1bä")
    finally:
        monkeypatch.undo()
        owner._host.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        ".mybackup.tmp", ".notes.tmp", "thesis.tmp", ".a.b.tmp", ".host-1-2x3.tmp",
        ".x.host+0-1.tmp",
        ".x.host+0-1-2x.tmp", ".x.host+0-1-2x00ff00ff.bak", "host+0-1-2x00ff00ff.tmp", ".tmp",
        ".x.host+0-1-2x00ff00ff.tmp.tmp", ".x.host+0-1-2x00ff00ff\n.tmp",
    ],
)  # fmt: skip
def test_what_has_not_the_whole_form_is_none_of_ours(name: str, tmp_path: Path) -> None:
    assert owner.split_temporary(name) is None
    (tmp_path / SHARDS).mkdir()
    for folder in (tmp_path, tmp_path / SHARDS):
        (folder / name).write_text("precious")
        os.utime(folder / name, (0, 0))
        json_file.sweep(folder)
    assert list(commit.leftovers(tmp_path)) == []
    commit.recover(tmp_path, "zarr", [name.partition(".")[0]])
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_large_file_in_the_place_of_a_lease_stays(tmp_path: Path) -> None:
    (tmp_path / SHARDS).mkdir()
    path = lease.lease_path(tmp_path, "000000")
    path.write_text("my thesis " * 200)
    os.utime(path, (0, 0))
    for act in (lease.acquire, lease.is_held, lease.clear_stale):
        with pytest.raises(UserError, match="is no lease"):
            act(tmp_path, "000000")
    lease.abort(tmp_path)
    assert path.stat().st_size == 2000
