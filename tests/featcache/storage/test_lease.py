"""Leases: one holder at a time, a dead one's is taken over, a live one's is kept fresh.

Another host is a lease whose text names one; its age is the file's own time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featcache.storage import lease, owner
from featcache.storage.store import SHARDS
from tests.conftest import python

ELSEWHERE = "other_host+1234-77-abcx00000000"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / SHARDS).mkdir()
    return tmp_path


@pytest.fixture
def taken(cache: Path) -> Iterator[lease.Lease]:
    held = lease.acquire(cache, "000000")
    assert held is not None
    yield held
    held.release()


def left_by(cache: Path, writer: str, age_s: float = 0.0) -> Path:
    path = lease.lease_path(cache, "000000")
    path.write_text(writer)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def dead_owner() -> str:
    ran = python("from featcache.storage.owner import writer_id; print(writer_id())")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_a_lease_is_exclusive_until_it_is_released(cache: Path) -> None:
    first = lease.acquire(cache, "000000")
    assert first is not None
    assert lease.is_held(cache, "000000")
    assert lease.acquire(cache, "000000") is None
    other = lease.acquire(cache, "000001")
    assert other is not None
    first.release()
    assert not lease.is_held(cache, "000000")
    again = lease.acquire(cache, "000000")
    assert again is not None
    for each in (again, other):
        each.release()
    assert list((cache / SHARDS).iterdir()) == []  # nothing temporary either


def test_another_process_does_not_get_it(cache: Path, taken: lease.Lease) -> None:
    code = """
import sys
from pathlib import Path
from featcache.storage import lease
print(lease.acquire(Path(sys.argv[1]), "000000"), lease.is_held(Path(sys.argv[1]), "000000"))
"""
    ran = python(code, cache)
    assert ran.stdout.split() == ["None", "True"], ran.stderr


def test_of_many_that_ask_one_gets_it(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: lease.acquire(cache, "000000"), range(32)))
    holders = [each for each in got if each is not None]
    assert len(holders) == 1
    holders[0].release()


def test_one_of_a_dead_process_is_taken_over_at_once(cache: Path) -> None:
    path = left_by(cache, dead_owner())
    assert not lease.is_held(cache, "000000")
    held = lease.acquire(cache, "000000")
    assert held is not None
    assert path.read_text().startswith(owner.writer_id().rpartition("-")[0])
    held.release()
    assert not path.exists()


def test_one_of_a_zombie_is_taken_over(cache: Path) -> None:
    """A process that has ended but was not waited for, as in containers without an init."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, owner.writer_id().encode())
        os._exit(0)
    try:
        left_by(cache, os.read(read, 1000).decode())
        deadline = time.monotonic() + 10
        while "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]:
            assert time.monotonic() < deadline
        held = lease.acquire(cache, "000000")
        assert held is not None
        held.release()
    finally:
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("text", ["", "x", "a-b", "\x00\x01", ELSEWHERE])
@pytest.mark.parametrize(
    ("age_s", "free"), [(0, False), (lease.STALE_S - 20, False), (lease.STALE_S + 20, True)]
)
def test_one_of_another_host_is_taken_over_by_age(
    cache: Path, text: str, age_s: float, free: bool
) -> None:
    """So is one whose text was cut by a crash."""
    path = left_by(cache, text, age_s)
    assert lease.is_held(cache, "000000") is not free
    held = lease.acquire(cache, "000000")
    assert (held is not None) is free
    if held is not None:
        held.release()
    else:
        assert path.read_text() == text


def test_bytes_that_are_no_text_are_no_traceback(cache: Path) -> None:
    path = left_by(cache, "")
    path.write_bytes(b"\xff\xfe\x80")
    os.utime(path, (time.time() - 1000,) * 2)
    held = lease.acquire(cache, "000000")
    assert held is not None
    held.release()


def test_a_live_holder_of_this_host_keeps_it_however_old(cache: Path, taken: lease.Lease) -> None:
    os.utime(taken.path, (time.time() - 10 * lease.STALE_S,) * 2)
    assert lease.is_held(cache, "000000")
    assert lease.acquire(cache, "000000") is None


def test_a_holder_keeps_its_lease_fresh(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the other hosts."""
    monkeypatch.setattr(lease, "TOUCH_S", 0.02)
    held = lease.acquire(cache, "000000")
    assert held is not None
    os.utime(held.path, (1.0, 1.0))
    deadline = time.monotonic() + 10
    while held.path.stat().st_mtime < time.time() - 60:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()
    assert not held._thread.is_alive()


def test_a_lease_that_vanished_is_released_in_peace(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TOUCH_S", 0.01)
    held = lease.acquire(cache, "000000")
    assert held is not None
    held.path.unlink()
    time.sleep(0.05)
    assert held._thread.is_alive()
    held.release()


def test_two_may_take_over_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the same stale lease; either of them then works, and nothing of the other's is
    left in the end."""
    left_by(cache, ELSEWHERE, lease.STALE_S + 50)
    second: list[lease.Lease | None] = []
    replace = lease._replace

    def slow(path: Path, probe: Path) -> bool:
        monkeypatch.setattr(lease, "_replace", replace)
        # in the moment between the look and the taking over
        second.append(lease.acquire(cache, "000000"))
        return replace(path, probe)

    monkeypatch.setattr(lease, "_replace", slow)
    first = lease.acquire(cache, "000000")
    for each in (first, *second):
        if each is not None:
            each.release()
    assert any((first, *second))
    assert list((cache / SHARDS).iterdir()) == []


def test_where_there_are_no_hard_links(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: object, target: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    first = lease.acquire(cache, "000000")
    assert first is not None
    assert owner.is_here(first.path.read_text())
    assert lease.acquire(cache, "000000") is None
    first.release()
    left_by(cache, dead_owner())
    held = lease.acquire(cache, "000000")
    assert held is not None
    held.release()
