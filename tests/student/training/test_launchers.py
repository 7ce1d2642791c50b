"""torchrun and `accelerate launch` really start two processes, and a scheduler's notice reaches
them or their launcher: each ends with 75 after its checkpoint, nothing is left running, and the run
goes on bit for bit.

A launcher keeps the statuses of its processes to itself, so a `sitecustomize` notes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from featcache.errors import UsageError
from student import checkpoint
from student.training import launch_variables, metrics
from tests import processes
from tests import student_fixtures as fx
from tests.test_end_to_end import assert_undisturbed

pytestmark = pytest.mark.slow

OPTIONS = ("--batch-size", "4", "--steps", "60", "--save-every", "50")
NOTES = """
import atexit, json, os, subprocess

begun, begin = [], subprocess.Popen.__init__

def noted(self, *args, **options):
    begun.append(self)
    begin(self, *args, **options)

if "RANK" not in os.environ:
    subprocess.Popen.__init__ = noted
    atexit.register(lambda: open(os.environ["STATUSES"], "w").write(
        json.dumps({each.pid: each.returncode for each in begun})))
"""


def lines_that_work() -> dict[str, list[str]]:
    """The launchers as the message names them that refuses `accelerate launch` on CPUs."""
    alone = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(UsageError) as caught:
        launch_variables.check_processes(alone, 1, sharded=False)
    told = re.findall(r"`([^`]+)`", str(caught.value))
    torchrun = next(line for line in told if line.startswith("torchrun"))
    gpus = next(line for line in told if "--multi_gpu" in line)
    return {
        "torchrun": torchrun.partition(" -m student")[0].replace(" N", " 2").split(),
        "accelerate": [*gpus.split(), "--num_processes", "2"],
    }


@dataclass
class Launched:
    """A launcher in a session of its own, and the two processes that it has started."""

    launcher: subprocess.Popen[str]
    workers: list[psutil.Process]
    run: Path
    statuses: Path

    def end(self) -> tuple[dict[int, int], str]:
        """Wait until nothing runs any more -> statuses of the workers, stderr."""
        out, err = self.launcher.communicate(timeout=100)
        assert out == ""
        _, alive = psutil.wait_procs(self.workers, timeout=60)
        assert alive == []
        assert [pid for pid in psutil.pids() if session(pid) == self.launcher.pid] == []
        noted = json.loads(self.statuses.read_text()) if self.statuses.exists() else {}
        return {int(pid): status for pid, status in noted.items()}, err


def session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return os.getsid(pid)
    return None


def with_programs() -> dict[str, str]:
    """The environment of a shell in which this interpreter's own programs are found first."""
    own = fx.environment()
    return {**own, "PATH": os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])}


Launch = Callable[[str], Launched]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("launched") / "whole"
    ran = processes.train(2, "--cache", fx.cache_path(), *OPTIONS, "--out", run, recipe="mralign")
    processes.good(ran)
    return run


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`student train` by a launcher, five steps on."""
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    run, statuses = tmp_path / "run", tmp_path / "statuses.json"
    settings = [part for text in fx.RECIPES["mralign"] for part in ("--set", text)]
    words = ["-m", "student", "train", "--recipe", "mralign", "--cache", str(fx.cache_path())]
    words += ["--device", "cpu", "--out", str(run), *OPTIONS, *settings]
    path = f"{tmp_path}:{Path(__file__).parents[3]}"
    env = {**with_programs(), "PYTHONPATH": path, "STATUSES": str(statuses)}

    def begin(name: str) -> Launched:
        launcher = subprocess.Popen(
            [*lines_that_work()[name], *words], env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        while not ((run / metrics.NAME).is_file() and len(metrics.read(run)) >= 5):
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.01)
        return Launched(launcher, psutil.Process(launcher.pid).children(), run, statuses)

    return begin


def check_stopped(launched: Launched, err: str, why: str, whole: Path) -> None:
    """One process has spoken, in one line of each kind, and the run goes on to the same numbers."""
    step = checkpoint.latest_step(launched.run)
    assert step is not None, err
    assert 5 <= step < 50
    said = re.findall(r"^(?:recipe|stopped|error).*$", err, re.M)
    assert len(said) == 2, err
    assert re.fullmatch(
        rf"recipe mralign: 24 pictures, .* 60 steps of 8, 2 processes on cpu\S* -> {launched.run}",
        said[0],
    )
    assert said[1] == (
        f"stopped after step {step} of 60 by {why}, its checkpoint is saved; the same command with "
        "--resume goes on from there"
    )
    check_no_traceback(err)
    options = ("--cache", fx.cache_path(), *OPTIONS, "--out", launched.run, "--resume")
    processes.good(processes.train(2, *options, recipe="mralign"))
    assert_undisturbed(launched.run, whole)


def check_no_traceback(err: str) -> None:
    """The launcher's own tracebacks may be there, ours may not."""
    assert re.findall(r'File ".*/(?:student|featcache)/.*', err) == []


@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_a_notice_to_the_launcher(name: str, launch: Launch, whole: Path) -> None:
    """As `kill` of a shell sends it; the launcher hands SIGTERM on."""
    launched = launch(name)
    launched.launcher.send_signal(signal.SIGTERM)
    statuses, err = launched.end()
    assert launched.launcher.returncode == 1
    assert [statuses[each.pid] for each in launched.workers] == [75, 75], err
    check_stopped(launched, err, "SIGTERM", whole)


def test_a_notice_to_each_process(launch: Launch, whole: Path) -> None:
    """As Slurm's --signal and scancel send it, but for the launcher. That one sends SIGTERM to who
    is left when the first has ended, which takes no status away."""
    launched = launch("torchrun")
    for each in launched.workers:
        each.send_signal(signal.SIGUSR1)
    statuses, err = launched.end()
    assert launched.launcher.returncode == 1
    assert [statuses[each.pid] for each in launched.workers] == [75, 75], err
    check_stopped(launched, err, "SIGUSR1", whole)


def test_a_launcher_that_dies_of_a_notice_leaves_nothing_running(
    launch: Launch, whole: Path
) -> None:
    """torchrun does not know SIGUSR1, and ends without a word to its processes."""
    launched = launch("torchrun")
    launched.launcher.send_signal(signal.SIGUSR1)
    _, err = launched.end()
    assert launched.launcher.returncode == -signal.SIGUSR1
    check_stopped(launched, err, "the end of its launcher", whole)


def test_a_process_that_is_killed_ends_the_other_in_one_line(launch: Launch) -> None:
    """Also where it is the one that speaks for all."""
    launched = launch("torchrun")
    lost, other = launched.workers
    lost.kill()
    statuses, err = launched.end()
    assert launched.launcher.returncode == 1
    assert (statuses[lost.pid], statuses[other.pid]) == (-signal.SIGKILL, 1), err
    told = re.findall(r"^(?:stopped|error).*$", err, re.M)
    assert len(told) == 1, err
    assert told[0].startswith("error: process 2 of 2 has lost another one")
    check_no_traceback(err)


def test_accelerate_that_starts_one_process_of_two_is_refused(tmp_path: Path) -> None:
    words = ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "student", "train"]
    words += ["--cache", str(fx.cache_path()), "--out", str(tmp_path / "run")]
    ran = subprocess.run(
        words, env=with_programs(), capture_output=True, text=True, timeout=100, check=False
    )
    (line,) = re.findall(r"^error: .*$", ran.stderr, re.M)
    assert "torchrun --nproc_per_node N -m student train ..." in line
    check_no_traceback(ran.stderr)
    assert not (tmp_path / "run").exists()
