"""Several processes on one cache: together, in shares, after another's death, on several devices,
stopped by hand.

Whatever happens on the way, the files in the end are those of one undisturbed process.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from featcache.errors import UsageError
from featcache.extraction import extract, launcher
from featcache.extraction.progress import ExtractProgress
from featcache.storage import commit, manifest
from featcache.storage.store import SHARDS
from tests.conftest import SYNTHETIC, Running, files_below, make_plan, python, undisturbed

Start = Callable[..., Running]
ARGS = (
    "--teacher",
    SYNTHETIC,
    "--size",
    28,
    "--views",
    3,
    "--levels",
    "1,3",
    "--rows-per-shard",
    2,
)
# Decoding takes a moment, so that processes meet; or for ever from the fifth picture on.
SLOW = """
import time
import featcache.views.pixel_path as i
d = i.decode
i.decode = lambda b: (time.sleep(0.08), d(b))[1]
"""
STUCK = """
import itertools, time
import featcache.views.pixel_path as i
decode, count = i.decode, itertools.count()
i.decode = lambda data: (time.sleep(1000 if next(count) >= 4 else 0), decode(data))[1]
"""
FAST = "from featcache.extraction import shard_queue; shard_queue.WAIT_S = 0.05"


@functools.cache
def whole(pictures: Path) -> dict[str, bytes]:
    """The cache of seven shards, by one process in one go."""
    out = pictures.parent / "whole"
    extract.run(make_plan(pictures, rows_per_shard=2), out, batch_size=4)
    return files_below(out)


def command(pictures: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "extract",
        *ARGS,
        "--images",
        pictures,
        "--out",
        out,
        "--batch-size",
        4,
        "--workers",
        2,
        *more,
    )


def wait_for(what: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def records(out: Path) -> list[Path]:
    return sorted(path for path in (out / SHARDS).glob("*.json") if path.name[0] == "0")


# ---------------------------------------------------------------- at once, and in shares


@pytest.mark.slow
def test_three_processes_at_once_give_the_same_bytes(
    pictures: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "c"
    running = [start(*command(pictures, out), before=f"{SLOW}\n{FAST}") for _ in range(3)]
    assert [each.wait() for each in running] == [0, 0, 0], [each.said for each in running]
    assert files_below(out) == whole(pictures)


@pytest.mark.slow
def test_shares_cover_everything_once_and_the_last_completes(
    pictures: Path, tmp_path: Path
) -> None:
    plan, seen = make_plan(pictures, rows_per_shard=2), []
    for i in (2, 0, 1):
        before = records(tmp_path / "c")
        assert not (tmp_path / "c/quarantine.json").exists()
        progress = ExtractProgress()
        extract.run(plan, tmp_path / "c", batch_size=4, share=(i, 3), progress=progress)
        new = [int(path.stem) for path in records(tmp_path / "c") if path not in before]
        assert new == list(range(i, 7, 3))
        assert progress.pictures == progress.total == sum(min(2, 13 - 2 * shard) for shard in new)
        seen += new
    assert sorted(seen) == list(range(7))
    assert files_below(tmp_path / "c") == whole(pictures)


def test_more_shares_than_shards(photos: Path, tmp_path: Path) -> None:
    for i in range(5):
        extract.run(make_plan(photos, rows_per_shard=10), tmp_path / "c", share=(i, 5))
        assert len(records(tmp_path / "c")) == min(i + 1, 2)


@pytest.mark.slow
def test_a_share_by_the_command(pictures: Path, tmp_path: Path, start: Start) -> None:
    second = start(*command(pictures, tmp_path / "c", "--shard", "1/2"))
    assert second.wait() == 0, second.said
    first = start(*command(pictures, tmp_path / "c", "--shard", "0/2"))
    assert first.wait() == 0, first.said
    assert files_below(tmp_path / "c") == whole(pictures)
    assert "other shares complete it" in second.said


# ---------------------------------------------------------------- killed at every stage

# Lets a process that runs this die as it enters a function, MODULE:NAME, for the n-th time.
DYING = """
import importlib, os, signal, threading

def patch(target, call):
    module, _, path = target.partition(":")
    place = importlib.import_module("featcache." + module)
    *holders, name = path.split(".")
    for holder in holders:
        place = getattr(place, holder)
    original, lock, calls = getattr(place, name), threading.Lock(), []
    def dies(*args, **kwargs):
        with lock:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(place, name, dies)
"""
# Each stage: the function that the killed process enters for the n-th time, and dies in.
STAGES = {
    "before the manifest": ("storage.json_file:write_json", 1),
    "half a manifest": ("storage.json_file:os.fsync", 1),
    "after the manifest": ("storage.json_file:sync_folder", 1),
    "before the copy": ("storage.json_file:write_json", 2),
    "before the tail": ("storage.json_file:write_file", 3),
    "before a lease": ("storage.lease:acquire", 2),
    "while a lease is taken": ("storage.json_file:link_or_create", 2),
    "holding a lease": ("storage.commit:recover", 3),
    "decode": ("views.pixel_path:decode", 8),
    "render": ("views.render:render", 20),
    "teacher": ("extraction.device_pipeline:run_teacher", 5),
    "encode": ("extraction.rows:mask_order", 6),
    "append": ("storage.row_file:RowFile.append", 70),
    "before the groups above the shards": ("storage.json_file:write_file", 4),
    "between those groups": ("storage.json_file:write_file", 5),
    "index": ("storage.chunk_index:ChunkFile.finish", 8),
    "labels": ("storage.zarr_store:ZarrShardWriter._write_chunk", 6),
    "metadata": ("storage.zarr_metadata:shard_metadata", 2),
    "inner record": ("storage.json_file:write_json", 4),
    "before the renames": ("storage.commit:publish", 2),
    "between the renames": ("storage.commit:_publish_record", 2),
    "after the first shard": ("storage.zarr_store:ZarrShardWriter.__init__", 2),
    "before the release": ("storage.lease:Lease.release", 2),
    "quarantine report": ("extraction.extract:report_quarantine", 1),
}
# Forks from a process that has loaded everything and run nothing: two seconds in all instead of
# three for each.
KILLED = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from featcache import teachers
from featcache.extraction import extract, plan
from featcache.pictures.open_source import open_source
from featcache.views.policy import Policy
import featcache.storage.zarr_store
import zarr
teachers.modules()

folder, root = Path(sys.argv[1]), Path(sys.argv[2])
teacher, stages = sys.argv[3], json.loads(sys.argv[4])
options = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
children = {}
for stage, (target, call) in stages.items():
    children[stage] = os.fork()
    if children[stage] == 0:
        patch(target, call)
        loaded = teachers.load(teacher)
        levels, policy = (1, loaded.depth), Policy(size=28)
        made = plan.Plan(
            source=open_source(folder), teacher=loaded, policy=policy, views=3, levels=levels,
            rows_per_shard=5, **options,
        )
        extract.run(made, root / stage, batch_size=4, workers=2)
        os._exit(0)
for stage, child in children.items():
    _, status = os.waitpid(child, 0)
    print(stage, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived", flush=True)
"""


@pytest.fixture(scope="module")
def killed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    ran = python(DYING + KILLED, pictures, root, SYNTHETIC, json.dumps(STAGES))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"{stage} 9" for stage in STAGES], ran.stdout + ran.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_run_again_gives_the_same_bytes(
    pictures: Path, killed: Path, stage: str
) -> None:
    before = files_below(killed / stage) if (killed / stage).exists() else {}
    assert before != undisturbed(pictures)
    extract.run(make_plan(pictures), killed / stage, batch_size=4, workers=2)
    after = files_below(killed / stage)
    assert after.keys() == undisturbed(pictures).keys()
    assert after == undisturbed(pictures)


# ---------------------------------------------------------------- killed, stopped


@pytest.mark.slow
def test_a_killed_process_is_succeeded_by_one_that_waits(
    pictures: Path, tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "c"
    stuck = start(*command(pictures, out), before=STUCK)
    wait_for(lambda: len(records(out)) == 2 and list((out / SHARDS).glob("000002.lease")))
    patient, hasty = (start(*command(pictures, out), before=FAST) for _ in range(2))
    wait_for(lambda: len(records(out)) == 6)
    wait_for(lambda: "waiting for 1 shard that other processes work on" in hasty.said)
    hasty.signal(signal.SIGTERM)
    assert hasty.wait() == 75
    assert hasty.said.splitlines()[-1].startswith("stopped: 6 of 7 shards")
    assert len(records(out)) == 6
    stuck.signal(signal.SIGKILL)
    assert stuck.wait() == -9
    assert patient.wait() == 0, patient.said
    assert files_below(out) == whole(pictures)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name
)
def test_stopped_by_hand_it_says_what_is_left_and_continues(
    pictures: Path, tmp_path: Path, start: Start, number: signal.Signals
) -> None:
    out = tmp_path / "c"
    running = start(*command(pictures, out), before=SLOW)
    # within the next shard
    wait_for(lambda: records(out) and list((out / SHARDS).glob("*.tmp/pixel_hash/c.0.0")))
    running.signal(number)
    assert running.wait() == 75
    found = re.fullmatch(
        rf"stopped: (\d) of 7 shards of '{out}' are complete and kept, (\d+) pictures are "
        r"left; the same command continues",
        running.said.strip(),
    )
    assert found, running.said
    complete = records(out)
    assert int(found[1]) == len(complete)
    assert int(found[2]) == 13 - sum(min(2, 13 - 2 * int(path.stem)) for path in complete)
    left = files_below(out)
    assert not [name for name in left if "tmp" in name or "lease" in name]
    assert all(whole(pictures)[name] == data for name, data in left.items())
    again = start(*command(pictures, out))
    assert again.wait() == 0, again.said
    assert files_below(out) == whole(pictures)


def test_the_loser_of_a_shard_discards(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts whose clocks disagree may work on one shard: leases only save work."""
    original, plan = commit.publish, make_plan(pictures, rows_per_shard=2)

    def overtaken(folder: Path, cache: Path, shard: str, *rest: object) -> None:
        monkeypatch.setattr(commit, "publish", original)
        (cache / SHARDS / f"{shard}.lease").unlink()
        extract.run(plan, cache, batch_size=4)
        assert files_below(cache).keys() > whole(pictures).keys()  # ours is not published yet
        original(folder, cache, shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(commit, "publish", overtaken)
    extract.run(plan, tmp_path / "c", batch_size=4, share=(3, 7))
    assert files_below(tmp_path / "c") == whole(pictures)


# ---------------------------------------------------------------- devices


@pytest.mark.slow
def test_two_devices_give_what_one_gives(pictures: Path, tmp_path: Path, start: Start) -> None:
    running = start(
        *command(pictures, tmp_path / "c", "--devices", "cpu,cpu"), before=f"{SLOW}\n{FAST}"
    )
    assert running.wait() == 0, running.said
    assert "failed" not in running.said
    assert files_below(tmp_path / "c") == whole(pictures)
    assert manifest.read(tmp_path / "c")["provenance"]["batch_size"] == 4


@pytest.mark.parametrize(
    "text", ["", "cpu,", "cuda:97", "cuda", "tpu", "cpu cpu", "cuda:-1", "all,cpu"]
)
def test_unknown_devices(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        launcher.parse_devices(text)
    assert f"--devices {text!r}" in str(caught.value)
    assert "-1 are" not in str(caught.value)
    assert launcher.parse_devices("cpu,cpu") == ["cpu", "cpu"]


@pytest.mark.slow
def test_a_failed_helper_is_told_and_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with launcher.worker_processes(["cpu"], ["extract", "--out", str(tmp_path)]):
        pass
    (told,) = caplog.messages
    assert told.startswith("the process on cpu failed, its shards were done by the others: error: ")
    assert "\n" not in told


def test_helpers_are_stopped_where_the_caller_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), launcher.worker_processes(["cpu", "cpu"], []):
        raise KeyboardInterrupt
    assert time.monotonic() - began < 30


def test_no_devices_no_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with launcher.worker_processes([], []):
        pass
