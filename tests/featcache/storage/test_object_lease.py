"""One holder at a time, by a real S3 server; whoever lost a lease is told so."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from featcache.errors import UserError
from featcache.objects.client import Client, client
from featcache.objects.url import parse
from featcache.storage.object_lease import LeaseTable, ObjectLease
from featcache.storage.owner import writer_id
from tests.s3_server import BUCKET

pytestmark = pytest.mark.slow
STALE_S = 0.4
OTHER = "elsewhere+0a1b2c3d4e5f-12-5x00ff00ff"  # a process of another machine


@pytest.fixture
def lab(as_admin: None) -> Client:
    return client(parse(f"s3://{BUCKET}"))


def test_it_is_held_released_and_taken_again(lab: Client) -> None:
    one, two = LeaseTable(lab, STALE_S), LeaseTable(lab, STALE_S)
    lease = one.acquire("a.lease", OTHER)
    assert lease is not None
    assert two.acquire("a.lease", writer_id()) is None
    lease.release()
    assert lab.facts("a.lease") is None
    assert two.acquire("a.lease", writer_id()) is not None


def test_who_renews_keeps_it_and_who_does_not_loses_it(lab: Client) -> None:
    one, two = LeaseTable(lab, STALE_S), LeaseTable(lab, STALE_S)
    lease = one.acquire("b.lease", OTHER)
    assert lease is not None
    for _ in range(4):
        assert two.acquire("b.lease", writer_id()) is None
        time.sleep(0.75 * STALE_S)
        lease.renew()
    assert not lease.lost
    assert two.acquire("b.lease", writer_id()) is None
    time.sleep(1.5 * STALE_S)
    taken = two.acquire("b.lease", writer_id())
    assert taken is not None
    lease.renew()
    assert lease.lost
    lease.release()  # the other's stays
    assert lab.facts("b.lease") is not None
    taken.renew()
    assert not taken.lost


def test_one_of_eight_takes_over(lab: Client) -> None:
    assert LeaseTable(lab, STALE_S).acquire("c.lease", OTHER) is not None
    tables = [LeaseTable(lab, STALE_S) for _ in range(8)]
    assert not any(table.acquire("c.lease", writer_id()) for table in tables)
    time.sleep(1.5 * STALE_S)
    found: list[ObjectLease | None] = []
    threads = [
        threading.Thread(
            target=lambda table=table: found.append(table.acquire("c.lease", writer_id()))
        )
        for table in tables
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each is not None for each in found) == 1


def test_that_of_a_dead_process_of_this_machine_is_taken_at_once(lab: Client) -> None:
    code = "from featcache.storage.owner import writer_id; print(writer_id())"
    root = str(Path(__file__).parents[3])
    dead = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert LeaseTable(lab, 90).acquire("d.lease", dead) is not None
    assert LeaseTable(lab, 90).acquire("d.lease", writer_id()) is not None


def test_what_is_no_lease_is_left_and_told(lab: Client) -> None:
    lab.put("e.lease", b"x" * 5000)
    with pytest.raises(UserError, match=r"s3://lab/e.lease has 5000 bytes, and is no lease"):
        LeaseTable(lab, 0).acquire("e.lease", writer_id())
    assert lab.read("e.lease") == b"x" * 5000
