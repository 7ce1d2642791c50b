"""A real Slurm for tests: munged, slurmctld and two slurmd of this user run in a temporary folder,
with a key, sockets and ports of their own, and are stopped by their process ids.

The package of Debian and Ubuntu is enough (apt-get install slurm-wlm munge). Both nodes are this
machine: Slurm is told that each has more CPUs than it may have, since what the tests run mostly
waits. Not shown: control groups, accounting, GPUs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import student_fixtures as fx

ROOT = Path(__file__).parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
)
NODES = ("first", "second")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# A job that is queued again begins after cred_expire seconds, of which 5 are the least.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=5
NodeName=first NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster of two nodes, and the environment in which jobs are submitted to it."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *words: object) -> str:
        """Run one of Slurm's commands -> what it prints."""
        ran = subprocess.run(
            [*map(str, words)], env=self.environment, cwd=self.folder, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def submit(self, *words: object) -> str:
        """`sbatch WORDS` -> the number of the job."""
        return self.ask("sbatch", "--parsable", *words).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, or of one of an array, N_M."""
        said = self.ask("scontrol", "show", "job", number, "--oneliner")
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait_for(self, ready: Callable[[], bool], job: str, timeout_s: float = 240) -> None:
        """Poll until something is so; fails with what a job wrote where it takes too long."""
        end = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < end, f"{self.job(job)}\n{self.said(job)}"
            time.sleep(0.1)

    def end(self, job: str) -> dict[str, str]:
        """Wait until a job has ended for good -> what Slurm knows of it."""
        self.wait_for(lambda: self.job(job)["JobState"] in ENDED, job)
        return self.job(job)

    def said(self, job: str) -> str:
        """What a job wrote, in all of its starts."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Skips where Slurm is not installed; .ci/run installs it and forbids that."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        if os.environ.get("FEATCACHE_REQUIRE_SLURM"):
            pytest.fail(f"FEATCACHE_REQUIRE_SLURM is set, and there is no {', '.join(missing)}")
        pytest.skip(f"no {', '.join(missing)}; to run these tests: apt-get install slurm-wlm munge")
    with _started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@contextmanager
def _started(folder: Path) -> Iterator[Slurm]:
    environment = {
        **fx.environment(folder / "home"),
        "PATH": PATH,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    cluster = Slurm(folder, environment)
    _configure(folder)
    with ExitStack() as running:
        # The folder is open to this user alone, which munged has to be told by --force.
        files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file")]
        files += [f"--seed-file={folder}/munge.seed", f"--key-file={folder}/munge.key"]
        running.enter_context(_daemon(folder, environment, "munged", "--foreground", "--force",
                                      *files))  # fmt: skip
        _wait(lambda: (folder / "munge.socket").exists(), folder)
        running.enter_context(_daemon(folder, environment, "slurmctld", "-D", "-i"))
        for node in NODES:
            running.enter_context(_daemon(folder, environment, "slurmd", "-D", "-N", node))
        _wait(lambda: _idle(cluster), folder)
        try:
            yield cluster
        finally:
            cluster.ask("scancel", "--user", str(os.getuid()), "--full")
            _wait(lambda: not cluster.ask("squeue", "--noheader"), folder)


def _configure(folder: Path) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    with ExitStack() as held:  # all at once, so that they differ
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=host, user=os.getuid(), folder=folder, ports=ports)
    )


@contextmanager
def _daemon(folder: Path, environment: dict[str, str], *words: str) -> Iterator[None]:
    """One of Slurm's daemons in the foreground of a process of ours, until the block is left."""
    program = shutil.which(words[0], path=PATH)
    assert program is not None
    with (folder / "daemons.log").open("ab") as log:
        process = subprocess.Popen(
            [program, *words[1:]], env=environment, cwd=folder, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(cluster: Slurm) -> bool:
    ran = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=cluster.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ran.stdout.split() == ["idle"] * len(NODES)


def _wait(ready: Callable[[], bool], folder: Path, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end, (folder / "daemons.log").read_text()
        time.sleep(0.1)
