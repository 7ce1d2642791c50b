"""Kill -9 at random moments, two writers at once, stale leases: the cache that is finished
afterwards has the bytes of one that nobody disturbed, and nothing else lies in its folder."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache import teachers
from featcache.extraction import extract
from featcache.extraction.plan import Plan
from featcache.pictures.open_source import open_source
from featcache.storage import lease
from featcache.testing.items import files_below
from featcache.views.policy import Policy

PICTURES = 72
SYNTHETIC = "synthetic:levels=3,tokens=16,width=24"
# imports the libraries of all families: seconds that a forked writer saves
teachers.load(SYNTHETIC, None, "cpu")
VIT = "timm:vit_tiny_patch16_224,img_size=32"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_noise(tmp_path_factory.mktemp("pictures"), PICTURES)


def save_noise(folder: Path, count: int) -> Path:
    """So many pictures, and a broken one."""
    draw = np.random.default_rng(0)
    for i in range(count):
        noise = draw.integers(0, 255, (12, 12, 3), np.uint8)
        Image.fromarray(noise).resize((96, 80)).save(folder / f"p{i:03d}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def work(
    pictures: str, out: str, teacher: str, store: str, ready: Any = None, go: Any = None
) -> float:
    """One writer, as `featcache extract` would be; with `go` it waits before it touches the cache.
    Returns seconds."""
    plan = Plan(
        source=open_source(pictures),
        teacher=teachers.load(teacher, "random:0" if teacher == VIT else None, "cpu"),
        policy=Policy(size=32),
        views=2,
        levels=(1, 3),
        store=store,
        rows_per_shard=4,
    )
    if ready is not None:
        ready.set()
        assert go.wait(60)
    began = time.monotonic()
    extract.run(plan, Path(out), batch_size=3, workers=2)
    return time.monotonic() - began


def start_two(*args: str) -> list[BaseProcess]:
    """Two processes that have imported and loaded everything and begin together, so that they are
    killed at work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.featcache.storage.test_crash"])
    events = [(context.Event(), context.Event()) for _ in range(2)]
    pair = [context.Process(target=work, args=(*args, *each)) for each in events]
    for process in pair:
        process.start()
    assert all(ready.wait(60) for ready, _ in events)
    for _, go in events:
        go.set()
    return list(pair)


def disturb(
    args: tuple[str, str, str, str], moments: random.Random, seconds: float, most: int
) -> int:
    """Kill up to `most` writers at random moments, two at a time, then let two finish. Returns how
    many died."""
    out, died = Path(args[1]), 0
    while died < most:
        pair, killed = start_two(*args), 0
        for process in pair:
            time.sleep(moments.uniform(0, seconds))
            if killed < most - died:
                killed += process.exitcode is None
                process.kill()  # which may find that it has just ended by itself
        codes = [process.join(60) or process.exitcode for process in pair]
        died += codes.count(-signal.SIGKILL)
        if codes != [-signal.SIGKILL] * 2:  # somebody was left to finish
            break
    elsewhere = lease.lease_path(out, "000004")  # of a machine that went away an hour ago
    elsewhere.parent.mkdir(parents=True, exist_ok=True)  # nobody may have come so far
    elsewhere.write_text("other_host+0000-1-1x00000000")
    os.utime(elsewhere, (time.time() - 3600,) * 2)
    for process in start_two(*args):
        process.join(120)
        assert process.exitcode == 0
    return died


def compare(pictures: Path, folder: Path, teacher: str, store: str, kills: int) -> None:
    """Caches that were disturbed, until so many writers have died, against one that was not."""
    # two moments one after the other
    seconds = work(str(pictures), str(folder / "whole"), teacher, store) / 2
    whole = files_below(folder / "whole")
    assert any("quarantine" in name for name in whole)
    moments, died = random.Random(0), 0
    for _ in range(10 * kills):
        out = folder / "disturbed"
        died += disturb((str(pictures), str(out), teacher, store), moments, seconds, kills - died)
        found = files_below(out)
        assert sorted(found) == sorted(whole)
        for name, data in whole.items():
            assert found[name] == data, name
        shutil.rmtree(out)
        if died == kills:
            return
    pytest.fail(f"only {died} of {kills} writers could be killed at work, in {10 * kills} caches")


@pytest.mark.slow
@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_killed_writers_leave_the_same_bytes(pictures: Path, tmp_path: Path, store: str) -> None:
    compare(pictures, tmp_path, SYNTHETIC, store, kills=6)


@pytest.mark.slow
def test_thirty_kills_leave_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    compare(pictures, tmp_path, SYNTHETIC, "zarr", kills=30)


@pytest.mark.slow
def test_killed_writers_of_a_real_vit_leave_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    compare(pictures, tmp_path, VIT, "zarr", kills=6)
