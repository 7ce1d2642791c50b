"""Actors of a Ray cluster extract what one process does: with two nodes, of which one is killed,
and one that joins; with an actor that dies of a shard; stopped by hand.

The cluster is of this machine, on its own address. A teacher in a user's file writes down which
process loads it and which shards each extracts, and holds them until the test lets them go.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from featcache.extraction import ray_cluster
from tests.conftest import Running, files_below
from tests.featcache.extraction.test_launcher import records, wait_for

pytest.importorskip("ray", reason="pip install 'featcache[ray]'")
pytestmark = pytest.mark.slow
Start = Callable[..., Running]
NODE = {"num_cpus": 1, "object_store_memory": ray_cluster.STORE_BYTES}

# In FOLDER: `loads` and `shards` get a line each; `hold` holds every shard that is begun, for as
# long as it is there; the shard that `deadly` names ends its process.
TEACHER = """
import os, time
from pathlib import Path
from featcache.extraction import extract, session
from featcache.teachers import synthetic

FOLDER = Path(__file__).parent

def note(name, *words):
    with (FOLDER / name).open("a") as file:
        file.write(" ".join(map(str, [os.getpid(), *words])) + "\\n")

def write_shard(jobs, shard, *rest):
    note("shards", shard["name"])
    while (FOLDER / "hold").exists():
        time.sleep(0.02)
    deadly = FOLDER / "deadly"
    if deadly.exists() and deadly.read_text() == shard["name"]:
        os._exit(7)
    extract.write_shard(jobs, shard, *rest)

def load(name, options, weights):
    note("loads")
    session.write_shard = write_shard
    return synthetic.load("synthetic", dict(levels=3, tokens=4, width=8, size=28), weights)
"""
ARGS = (
    "extract", "--teacher", "./mine.py", "--images", "pictures", "--size", 28, "--views", 3,
    "--levels", "1,3", "--rows-per-shard", 2, "--batch-size", 4, "--workers", 1,
)  # fmt: skip


class Work:
    """The folder that commands are given in, which relative paths begin at."""

    def __init__(self, folder: Path, start: Start) -> None:
        self.folder, self._start = folder, start
        (folder / "mine.py").write_text(TEACHER)

    def run(self, *args: object, before: str = "") -> Running:
        here = f"import os; os.chdir({str(self.folder)!r}); os.environ.pop('RAY_ADDRESS', 0)"
        return self._start(*ARGS, *args, before=f"{here}\n{before}")

    def lines(self, name: str) -> list[list[str]]:
        path = self.folder / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def clear(self) -> None:
        for name in ("loads", "shards"):
            (self.folder / name).unlink(missing_ok=True)


@pytest.fixture
def work(pictures: Path, tmp_path: Path, start: Start) -> Work:
    folder = tmp_path / "work"
    shutil.copytree(pictures, folder / "pictures")
    return Work(folder, start)


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """A folder whose path is short: sockets have no longer ones."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = folder
        yield Path(folder)
        os.environ.pop("RAY_TMPDIR")
        if before is not None:
            os.environ["RAY_TMPDIR"] = before


@pytest.fixture(scope="module")
def cluster(ray_folder: Path) -> Iterator[Any]:
    """A cluster of one node."""
    ray_cluster.ray_module()
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    yield made
    made.shutdown()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_node_is_killed_and_another_joins(work: Work, cluster: Any, tmp_path: Path) -> None:
    alone = work.run("--out", "alone")
    assert alone.wait(120) == 0, alone.said
    work.clear()
    (work.folder / "hold").touch()
    quick = "from featcache.extraction import ray_engine; ray_engine.NOTE_S = 0.1"
    running = work.run(
        "--out", "c", "--engine", "ray", "--address", cluster.address, "--actors", "2:",
        before=quick,
    )  # fmt: skip
    lacking = "waiting for 1 more actor of 1 CPU each: 1 node holds 1 at most"
    wait_for(lambda: lacking in running.said, 180)
    assert work.lines("shards") == []
    second = cluster.add_node(**NODE)
    wait_for(lambda: len(work.lines("shards")) == 2, 180)
    assert records(work.folder / "c") == []
    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: "was lost" in running.said, 180)
    cluster.add_node(**NODE)
    wait_for(lambda: len(work.lines("shards")) == 3, 180)
    (work.folder / "hold").unlink()
    assert running.wait(180) == 0, running.said
    assert files_below(work.folder / "c") == files_below(work.folder / "alone")

    times = Counter(shard for _, shard in work.lines("shards"))
    assert sorted(times) == [f"{i:06d}" for i in range(7)]
    assert sorted(times.values()) == [1] * 6 + [2]  # that of the node that was killed
    loads = Counter(pid for (pid,) in work.lines("loads"))
    actors = {pid for pid, _ in work.lines("shards")}
    assert len(actors) == 3
    assert set(loads.values()) == {1}
    assert loads.keys() == actors | {str(running.process.pid)}  # which reads its facts
    assert all(map(is_gone, map(int, actors)))
    assert "Traceback" not in running.said
    assert "(raylet)" not in running.said


def test_a_cluster_that_was_joined_stays_and_refuses_other_versions(
    work: Work, cluster: Any
) -> None:
    other = "import PIL; PIL.__version__ = '1.2.3'"
    ran = work.run("--out", "c", "--engine", "ray", "--address", cluster.address, before=other)
    assert ran.wait(180) == 1, ran.said
    told = [line for line in ran.said.splitlines() if line.startswith("error: ")]
    found = re.fullmatch(
        r"error: node \S+ \([\d.]+\) has other versions than this machine, and other bytes may "
        r"come of them: pillow [\d.]+ there and 1\.2\.3 here; .*",
        told[0],
    )
    assert found, ran.said
    assert len(told) == 1
    assert not (work.folder / "c").exists()


def test_a_shard_that_ends_its_actor_twice(work: Work, cluster: Any) -> None:
    (work.folder / "deadly").write_text("000002")
    ran = work.run("--out", "c", "--engine", "ray", "--address", cluster.address, "--actors", "1")
    assert ran.wait(180) == 1, ran.said
    assert work.lines("shards")[-1][1] == "000002"
    assert Counter(shard for _, shard in work.lines("shards"))["000002"] == 2
    (told,) = [line for line in ran.said.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: shard 000002 has ended its actor 2 times, the last on node ")
    assert all(is_gone(int(pid)) for pid, _ in work.lines("shards"))
    assert [path.stem for path in records(work.folder / "c")] == ["000000", "000001"]


def test_stopped_by_hand_nothing_of_ray_is_left(work: Work, ray_folder: Path) -> None:
    (work.folder / "hold").touch()
    running = work.run("--out", "c", "--engine", "ray")
    wait_for(lambda: work.lines("shards"), 180)
    started = psutil.Process(running.process.pid).children(recursive=True)
    actors = [int(pid) for pid, _ in work.lines("shards")]
    assert {each.pid for each in started} >= set(actors)
    running.signal(signal.SIGINT)
    (work.folder / "hold").unlink()
    assert running.wait(120) == 75, running.said
    assert [each for each in started if not is_gone(each.pid)] == []
    found = re.search(r"^stopped: (\d) of 7 shards of '.*' are complete", running.said, re.M)
    assert found, running.said
    assert int(found[1]) == len(records(work.folder / "c"))
    left = files_below(work.folder / "c")
    assert not [name for name in left if "tmp" in name or "lease" in name]
