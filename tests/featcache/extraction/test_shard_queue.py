"""The loop that shares out shards: who gets which, what is waited for, and what is given back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from featcache.extraction import shard_queue
from featcache.extraction.shard_queue import free_shards
from featcache.storage import lease
from featcache.storage.store import record_path

SHARDS = ["000000", "000001"]


@dataclass(frozen=True)
class Job:
    """A folder whose shards are made by writing their records."""

    out: Path
    store: str = "zarr"

    def make(self, shard: str) -> None:
        record_path(self.out, shard).write_text("{}")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_queue, "WAIT_S", 0.0)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    for name in ("a", "b"):
        (tmp_path / name / "shards").mkdir(parents=True)
    return [Job(tmp_path / "a"), Job(tmp_path / "b")]


def never(shards: int) -> None:
    pytest.fail("nothing is held by others")


def leases_of(job: Job) -> list[str]:
    return sorted(path.stem for path in (job.out / "shards").glob("*.lease"))


def test_each_shard_comes_with_the_jobs_that_lack_it_under_their_leases(jobs: list[Job]) -> None:
    first, second = jobs
    first.make("000001")
    seen = []
    for shard, lacking in free_shards(jobs, SHARDS, never):
        seen.append((shard, lacking))
        assert [leases_of(job) for job in lacking] == [[shard]] * len(lacking)
        for job in lacking:
            job.make(shard)
    assert seen == [("000000", [first, second]), ("000001", [second])]
    assert leases_of(first) == leases_of(second) == []


def test_complete_shards_take_no_lease_and_lose_a_dead_ones(jobs: list[Job]) -> None:
    for job in jobs:
        for shard in SHARDS:
            job.make(shard)
    dead = lease.lease_path(jobs[0].out, "000001")
    dead.write_text("elsewhere-1-0x0")
    os.utime(dead, (0, 0))
    before = {path: path.stat().st_mtime_ns for path in jobs[1].out.rglob("*")}
    told: list[tuple[str, int]] = []
    queue = free_shards(jobs, SHARDS, never, recount=lambda *facts: told.append(facts))
    assert list(queue) == []
    assert {path: path.stat().st_mtime_ns for path in jobs[1].out.rglob("*")} == before
    assert not dead.exists()
    assert told == [("000000", -1), ("000001", -1)]


def test_a_shard_held_for_one_job_comes_again(jobs: list[Job]) -> None:
    """The free job is given first; the other when its holder has left it behind."""
    first, second = jobs
    held = lease.acquire(second.out, "000000")
    assert held is not None
    told: list[tuple[str, int]] = []
    seen = []

    def waiting(shards: int) -> None:
        assert shards == 1
        held.release()

    for shard, lacking in free_shards(
        jobs, ["000000"], waiting, recount=lambda *facts: told.append(facts)
    ):
        seen.append(lacking)
        for job in lacking:
            job.make(shard)
    assert seen == [[first], [second]]
    assert told == [("000000", 1)]


def test_what_its_holder_completes_is_not_given(jobs: list[Job]) -> None:
    job = jobs[0]
    held = lease.acquire(job.out, "000000")
    assert held is not None
    told: list[tuple[str, int]] = []

    def waiting(shards: int) -> None:
        job.make("000000")
        held.release()

    queue = free_shards([job], ["000000"], waiting, recount=lambda *facts: told.append(facts))
    assert list(queue) == []
    assert told == [("000000", -1)]


def test_it_is_looked_at_again_under_the_lease(jobs: list[Job]) -> None:
    asked: list[bool] = []

    def lacks(job: Job, shard: str, *, leased: bool) -> bool:
        asked.append(leased)
        assert leases_of(job) == (["000000"] if leased else [])
        return not leased

    assert list(free_shards(jobs[:1], ["000000"], never, lacks=lacks)) == []
    assert asked == [False, True]


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_leases_are_given_back_where_the_work_ends_early(jobs: list[Job], how: str) -> None:
    free = free_shards(jobs, SHARDS, never)
    next(free)
    assert [leases_of(job) for job in jobs] == [["000000"], ["000000"]]
    if how == "closed":
        free.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            free.throw(KeyboardInterrupt())
    assert [leases_of(job) for job in jobs] == [[], []]
