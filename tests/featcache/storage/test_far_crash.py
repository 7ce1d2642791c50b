"""Writers of one cache in a real S3 server, raced and killed with -9 at random moments: the cache
that is finished afterwards has the bytes of one on disk that nobody disturbed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from featcache import teachers
from featcache.extraction import extract
from featcache.extraction.plan import Plan
from featcache.objects.url import parse
from featcache.pictures.open_source import open_source
from featcache.storage import mount, mounted
from featcache.testing.items import files_below
from featcache.views.policy import Policy
from tests.featcache.storage.test_crash import save_noise
from tests.s3_server import BUCKET

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_admin")]

PICTURES, KILLS = 48, 10
SYNTHETIC = "synthetic:levels=3,tokens=16,width=24"
# imports the libraries of all families: seconds that a forked writer saves
teachers.load(SYNTHETIC, None, "cpu")
OTHER = "elsewhere+0a1b2c3d4e5f-12-5x00ff00ff"  # a process of another machine


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_noise(tmp_path_factory.mktemp("pictures"), PICTURES)


def work(
    pictures: str,
    out: str,
    store: str,
    variables: dict[str, str],
    begin: Any = None,
    stale_s: float = 90.0,
) -> None:
    """One writer, as `featcache extract` would be, with a folder of its own; with `begin` it waits
    for the others before it touches the cache."""
    os.environ.update(variables)
    mounted.STALE_S = stale_s
    plan = Plan(
        source=open_source(pictures),
        teacher=teachers.load(SYNTHETIC, None, "cpu"),
        policy=Policy(size=32),
        views=2,
        levels=(1, 3),
        store=store,
        rows_per_shard=4,
    )
    if begin is not None:
        begin.wait(120)
    folder = mount.mount(parse(out)) if out.startswith("s3://") else Path(out)
    extract.run(plan, folder, batch_size=3, workers=2)


def start(count: int, tmp_path: Path, *args: str, stale_s: float = 90.0) -> list[BaseProcess]:
    """Start writers as on machines that share no folder; they begin together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.featcache.storage.test_far_crash"])
    begin = context.Barrier(count + 1)
    # the server that processes are forked from may be older than these
    own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    started = [
        context.Process(
            target=work,
            args=(*args, own | {"XDG_CACHE_HOME": str(tmp_path / f"home-{i}")}, begin, stale_s),
        )
        for i in range(count)
    ]
    for process in started:
        process.start()
    begin.wait(120)
    return list(started)


def finish(started: list[BaseProcess]) -> None:
    for process in started:
        process.join(180)
    assert [process.exitcode for process in started] == [0] * len(started)


def objects(bucket: S3Store, prefix: str) -> dict[str, bytes]:
    names = [each["path"] for page in obstore.list(bucket, f"{prefix}/") for each in page]
    return {
        name.removeprefix(f"{prefix}/"): bytes(obstore.get(bucket, name).bytes()) for name in names
    }


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def whole(
    request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, bytes]]:
    """A store's name, and the files of a cache on disk that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    work(str(pictures), str(folder / "cache"), request.param, {})
    found = files_below(folder / "cache")
    assert any("quarantine" in name for name in found)
    return request.param, found


def assert_same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, data in wanted.items():
        assert found[name] == data, name


def test_eight_writers_at_once(
    whole: tuple[str, dict[str, bytes]], pictures: Path, tmp_path: Path, bucket: S3Store
) -> None:
    store, wanted = whole
    prefix = f"raced-{store}"
    finish(start(8, tmp_path, str(pictures), f"s3://{BUCKET}/{prefix}", store))
    assert_same(objects(bucket, prefix), wanted)


def test_ten_kills(
    whole: tuple[str, dict[str, bytes]], pictures: Path, tmp_path: Path, bucket: S3Store
) -> None:
    """Two at a time, whoever is left is killed too or finishes; in as many caches as it takes."""
    store, wanted = whole
    moments, died, cache = random.Random(1), 0, 0
    while died < KILLS:
        prefix = f"killed-{store}-{cache}"
        args = (str(pictures), f"s3://{BUCKET}/{prefix}", store)
        cache += 1
        while died < KILLS:
            pair = start(2, tmp_path, *args)
            for process in pair:
                time.sleep(moments.uniform(0, 0.5))
                process.kill()
            codes = [process.join(60) or process.exitcode for process in pair]
            died += codes.count(-signal.SIGKILL)
            if codes != [-signal.SIGKILL] * 2:  # somebody had finished
                break
        finish(start(2, tmp_path, *args))
        assert_same(objects(bucket, prefix), wanted)
    assert cache <= KILLS


def test_what_machines_that_went_away_held_is_taken_over(
    whole: tuple[str, dict[str, bytes]], pictures: Path, tmp_path: Path, bucket: S3Store
) -> None:
    """A cache that was begun, with leases that nobody renews, and half of a shard."""
    store, wanted = whole
    prefix = f"stale-{store}"
    obstore.put(bucket, f"{prefix}/manifest.json", wanted["manifest.json"])
    for shard in ("000000", "000003"):
        obstore.put(bucket, f"{prefix}/shards/{shard}.lease", f"{OTHER} 3".encode())
    name = next(name for name in wanted if name.startswith(f"shards/000003.{store}/"))
    obstore.put(bucket, f"{prefix}/{name}", wanted[name][: len(wanted[name]) // 2])
    args = (str(pictures), f"s3://{BUCKET}/{prefix}", store)
    finish(start(2, tmp_path, *args, stale_s=1.0))
    assert_same(objects(bucket, prefix), wanted)
