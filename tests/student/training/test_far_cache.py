"""Training from a cache in a real S3 server, with and without a stage, is training from the same
cache on disk."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from featcache.objects import client
from featcache.reading.cache import Cache
from featcache.runtime.meter import meter
from featcache.storage import files
from student.training import metrics
from tests import faulty_proxy
from tests import student_fixtures as fx
from tests.conftest import files_below
from tests.s3_server import BUCKET, S3Server
from tests.test_end_to_end import assert_undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_admin")]

URL = f"s3://{BUCKET}/train"
OPTIONS = ("--steps", "16", "--batch-size", "4", "--save-every", "4")


@pytest.fixture(scope="module", autouse=True)
def _uploaded(bucket: S3Store) -> None:
    for name, data in files_below(fx.cache_path()).items():
        obstore.put(bucket, f"train/{name}", data)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The mounts that are made from now on."""
    found: list[Any] = []
    plain = files.mount

    def mount(folder: str, place: Any) -> None:
        found.append(place)
        plain(folder, place)

    monkeypatch.setattr(files, "mount", mount)
    return found


def local(run: Path) -> list[dict[str, Any]]:
    fx.good(fx.train("mralign", run, "--cache", fx.cache_path(), *OPTIONS, "--sampling", "block"))
    return numbers(run)


def numbers(run: Path) -> list[dict[str, Any]]:
    """All that is computed, step by step."""
    measured = ("time", "images_per_s", "data_wait", "seconds", "memory_mb")
    return [
        {name: value for name, value in row.items() if name not in measured}
        for row in metrics.read(run)
    ]


def test_losses_are_those_of_a_cache_on_disk(tmp_path: Path, places: list[Any]) -> None:
    wanted = local(tmp_path / "here")
    fx.good(fx.train("mralign", tmp_path / "there", "--cache", URL, *OPTIONS))
    assert numbers(tmp_path / "there") == wanted
    assert fx.same_weights(tmp_path / "there", tmp_path / "here")


def sent_bytes(proxy: faulty_proxy.FaultyProxy, part: str) -> int:
    """The bytes that the server sent of files with this part in their names."""
    return sum(count for path, counts in proxy.bytes_of.items() if part in path for count in counts)


class Watch(threading.Thread):
    """Looks again and again how many bytes a stage holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.done = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            held = 0
            for path in self.folder.glob("*"):
                try:
                    held += path.stat().st_size
                except OSError:
                    continue
            self.most = max(self.most, held)


def test_a_stage_of_a_quarter_of_the_cache(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = meter.read().bytes_read
    wanted = local(tmp_path / "here")
    read_bytes = meter.read().bytes_read - before
    with Cache(fx.cache_path()) as cache:
        limit = cache.bytes // 4
    watch = Watch(tmp_path / "stage")
    watch.start()
    stage = ("--stage", tmp_path / "stage", "--stage-limit", limit)
    with faulty_proxy.before(s3.endpoint) as proxy:  # without faults: it counts
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        fx.good(fx.train("mralign", tmp_path / "there", "--cache", URL, *OPTIONS, *stage))
    watch.done.set()
    watch.join()
    assert numbers(tmp_path / "there") == wanted
    assert fx.same_weights(tmp_path / "there", tmp_path / "here")
    assert 0 < watch.most <= limit
    assert sent_bytes(proxy, "shards/000000.zarr/") <= 1.05 * read_bytes
    # what describes the cache is asked for once
    describes = (".json", ".safetensors")
    assert {len(proxy.bytes_of[path]) for path in proxy.bytes_of if path.endswith(describes)} == {1}


@pytest.mark.parametrize("codec", ["fp16", "t3"])
def test_of_levels_that_are_not_read_nothing_is_fetched(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch, bucket: S3Store, codec: str
) -> None:
    """One level of three, whose rows lie closer than a request is worth elsewhere."""
    teacher = "synthetic:levels=4,tokens=16,width=768,size=32"
    here = fx.extract(fx.pictures(), tmp_path / "c", "--codec", codec, teacher=teacher)
    for name, data in files_below(here).items():
        obstore.put(bucket, f"one-{codec}/{name}", data)
    words = (*OPTIONS, "--images", fx.pictures())
    before = meter.read().bytes_read
    fx.good(fx.train("kd", tmp_path / "here", "--cache", here, *words, "--sampling", "block"))
    read_bytes = meter.read().bytes_read - before
    with faulty_proxy.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        place = ("--cache", f"s3://{BUCKET}/one-{codec}", "--stage", tmp_path / "stage")
        fx.good(fx.train("kd", tmp_path / "there", *place, *words))
    assert numbers(tmp_path / "there") == numbers(tmp_path / "here")
    assert sent_bytes(proxy, "shards/000000.zarr/") <= 1.05 * read_bytes


def test_killed_and_resumed_with_what_its_stage_holds(tmp_path: Path) -> None:
    options = ("--cache", URL, "--steps", "60", "--batch-size", "4", "--save-every", "7")
    options += ("--stage", str(tmp_path / "stage"), "--stage-limit", "100kB")
    fx.good(fx.train("mralign", tmp_path / "whole", *options[:-4]))
    settings = [part for text in fx.RECIPES["mralign"] for part in ("--set", text)]
    run = tmp_path / "killed"
    command = [
        sys.executable, "-m", "student", "train", "--recipe", "mralign", *options, *settings,
        "--out", str(run), "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=fx.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not (run / metrics.NAME).is_file() or len(metrics.read(run)) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    held = sorted((tmp_path / "stage").glob("*.data"))
    assert held
    fx.good(fx.train("mralign", run, *options, "--resume"))
    assert_undisturbed(run, tmp_path / "whole")
    assert not any(path.exists() for path in held)  # taken over under names of its own


def test_faults_on_the_way_change_no_number(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = local(tmp_path / "here")
    with faulty_proxy.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        now_and_then = faulty_proxy.now_and_then(1, 0.06)
        proxy.faults = lambda method, path, number: (
            "slow" if number in (9, 40) else now_and_then(method, path, number)
        )
        stage = ("--stage", tmp_path / "stage", "--stage-limit", "50kB")
        ran = fx.good(fx.train("mralign", tmp_path / "there", "--cache", URL, *OPTIONS, *stage))
        assert sum(proxy.made[kind] for kind in faulty_proxy.KINDS) > 5
        assert proxy.made["slow"] == 2
    assert numbers(tmp_path / "there") == wanted
    assert "retrying: " in ran.err


def test_a_store_that_goes_down_ends_the_run_in_a_line(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MOST_S", 3.0)
    with faulty_proxy.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = lambda method, path, number: "reset" if "features" in path else ""
        ran = fx.train("mralign", tmp_path / "there", "--cache", URL, *OPTIONS)
    assert ran.status == 1
    assert "Traceback" not in ran.err
    assert f"cannot read {URL}/shards/" in ran.err.splitlines()[-1]


def test_two_processes_share_a_stage_and_its_limit(tmp_path: Path) -> None:
    """Their losses are those of two that read the disk."""

    def train(name: str, *options: str) -> None:
        settings = [part for text in fx.RECIPES["mralign"] for part in ("--set", text)]
        command = [
            sys.executable, "-m", "torch.distributed.run",
            "--standalone",  # on a free port
            "--nproc-per-node", "2", "-m", "student", "train", "--recipe", "mralign", *OPTIONS,
            *settings, "--sampling", "block", *options, "--out", str(tmp_path / name),
            "--device", "cpu",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=fx.environment(), capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    train("here", "--cache", str(fx.cache_path()))
    with Cache(fx.cache_path()) as cache:
        limit = cache.bytes // 4
    watch = Watch(tmp_path / "stage")
    watch.start()
    stage = ("--stage", str(tmp_path / "stage"), "--stage-limit", str(limit))
    train("there", "--cache", URL, *stage)
    watch.done.set()
    watch.join()
    assert numbers(tmp_path / "there") == numbers(tmp_path / "here")
    assert 0 < watch.most <= limit


def test_what_was_pushed_and_pulled_in_part_trains_as_a_local_copy_of_it(tmp_path: Path) -> None:
    part = ("--levels", "last:1", "--views", "2")
    fx.good(fx.feat("push", str(fx.cache_path()), f"s3://{BUCKET}/shared"))
    fx.good(fx.feat("pull", f"s3://{BUCKET}/shared", str(tmp_path / "pulled"), *part))
    fx.good(fx.feat("copy", str(fx.cache_path()), str(tmp_path / "copied"), *part))
    for name in ("pulled", "copied"):
        fx.good(fx.train("mvp", tmp_path / f"run-{name}", "--cache", tmp_path / name, *OPTIONS))
    assert numbers(tmp_path / "run-pulled") == numbers(tmp_path / "run-copied")
    assert fx.same_weights(tmp_path / "run-pulled", tmp_path / "run-copied")
