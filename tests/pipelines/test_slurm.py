"""The sbatch files do their work on a real Slurm: tasks are killed, jobs are noticed, queued again
and cancelled, and what comes out is that of work that nobody disturbed.

What must happen at a certain moment is held there by a file of the user's: a teacher or a recipe
that waits in its first batch. Nothing depends on how long something takes.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from featcache.testing.items import files_below
from student import checkpoint
from student.training import metrics
from tests import processes
from tests import student_fixtures as fx
from tests.slurm_cluster import NODES, ROOT, Slurm
from tests.test_end_to_end import assert_undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]

FILES = ROOT / "pipelines/slurm"
# in place of what the files ask for, which these nodes lack
SMALL = ("--gres=none", "--cpus-per-task=1", "--mem=100M", "--time=20")
STAND_IN = "#!/bin/bash\necho begun\n{}\n"

# Job 0 of the array is killed with a shard in hand, job 1 is noticed with one; the others begin
# when both have one, so that there is one for each.
TEACHER = """
import os, time
from pathlib import Path
from featcache.teachers import synthetic

MARKS, OUT = Path({marks!r}), Path({out!r})
TASK = os.environ.get("SLURM_ARRAY_TASK_ID")
FIRST = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"

def works_on_a_shard():
    names = [path.read_text() for path in OUT.glob("shards/*.lease")]
    return any(name.split("-")[-2] == str(os.getpid()) for name in names)

class Held(synthetic.Synthetic):
    def forward(self, images, levels):
        if TASK is not None and FIRST and works_on_a_shard():
            if TASK in "01":
                (MARKS / TASK).write_text(str(os.getpid()))
                while True:
                    time.sleep(0.05)
            while not all((MARKS / name).exists() for name in "01"):
                time.sleep(0.05)
        return super().forward(images, levels)

def load(name, options, weights):
    return Held(4, 16, 24, 32)
"""

# In its third step a run that was not queued again twice waits until it is noticed.
RECIPE = """
import os, signal, time
from pathlib import Path
from student.recipes import mralign
from student.recipes.mralign import Config, needs

MARKS, STARTS = Path({marks!r}), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
HELD = "SLURM_JOB_ID" in os.environ and STARTS < 2

class Model(mralign.Model):
    steps = 0

    def forward(self, batch):
        self.steps += 1
        if HELD and self.steps == 3:
            (MARKS / f"{{STARTS}}-{{os.environ['RANK']}}").touch()
            while signal.getsignal(signal.SIGTERM).__self__.asked is None:
                time.sleep(0.05)
        return super().forward(batch)
"""


def test_an_array_of_four_of_which_one_is_killed_and_one_is_noticed(
    slurm: Slurm,
    tmp_path: Path,
) -> None:
    """The bytes are those of one process; what the killed one had in hand another one makes."""
    out, whole, teacher = tmp_path / "cache", tmp_path / "whole", tmp_path / "mine.py"
    teacher.write_text(TEACHER.format(marks=str(tmp_path), out=str(out)))
    words = ["--teacher", teacher, "--images", fx.pictures(), "--size", fx.SIZE, "--views", 2]
    words += ["--levels", "last:3", "--rows-per-shard", "2", "--batch-size", "4"]
    array = slurm.submit("--array=0-3", *SMALL, FILES / "extract.sbatch", *words, "--out", out)
    killed, noticed, *others = (f"{array}_{number}" for number in range(4))
    for number, job in enumerate((killed, noticed)):
        slurm.wait_for((tmp_path / str(number)).exists, job)
    os.kill(int((tmp_path / "0").read_text()), signal.SIGKILL)
    slurm.ask("scancel", "--signal=USR1", "--batch", noticed)
    assert slurm.end(killed)["ExitCode"] == f"{128 + signal.SIGKILL}:0"
    for job in (noticed, *others):
        assert slurm.end(job)["JobState"] == "COMPLETED", slurm.said(job)
    assert slurm.job(noticed)["Restarts"] == "1"
    assert "stopped: " in slurm.said(noticed)
    slurm.ask("scontrol", "requeue", killed)
    slurm.wait_for(lambda: slurm.job(killed)["JobState"] == "COMPLETED", killed)

    fx.good(fx.feat(*map(str, ("extract", *words, "--out", whole))))
    fx.good(fx.feat("verify", str(out)))
    assert files_below(out) == files_below(whole)


def test_training_on_two_nodes_that_is_queued_again_twice(
    slurm: Slurm,
    tmp_path: Path,
) -> None:
    """The same losses and weights, to the bit, as of a run of two processes in one go."""
    run, whole, recipe = tmp_path / "run", tmp_path / "whole", tmp_path / "mine.py"
    recipe.write_text(RECIPE.format(marks=str(tmp_path)))
    words: list[Any] = ["--recipe", recipe, "--cache", fx.cache_path(), "--device", "cpu"]
    words += ["--images", fx.pictures(), "--batch-size", 4, "--steps", 12, "--save-every", 12]
    words += [part for text in fx.RECIPES["mralign"] for part in ("--set", text)]
    job = slurm.submit("--nodes=2", *SMALL, FILES / "train.sbatch", *words, "--out", run)
    for start in range(2):
        for rank in range(2):
            slurm.wait_for((tmp_path / f"{start}-{rank}").exists, job)
        slurm.ask("scancel", "--signal=USR1", "--batch", job)
    facts = slurm.end(job)
    said = slurm.said(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), said
    assert facts["NodeList"] == ",".join(NODES)
    assert said.count("2 processes on 2 machines") == 3
    assert said.count("its checkpoint is saved; the same command goes on from there") == 2
    assert checkpoint.latest_step(run) == 12
    processes.good(processes.train(2, *words, "--out", whole))
    assert [row["step"] for row in metrics.read(run)] == list(range(1, 13))
    assert_undisturbed(run, whole)


@pytest.mark.parametrize(("name", "program"), [("extract", "featcache"), ("train", "torchrun")])
def test_a_job_that_is_cancelled_or_fails_does_not_queue_itself_again(
    name: str,
    program: str,
    slurm: Slurm,
    tmp_path: Path,
) -> None:
    """Only a notice does; a cancelled job that came again could never be ended."""
    stand_in = tmp_path / program
    path = f"--export=ALL,PATH={tmp_path}:{slurm.environment['PATH']}"
    words = ("--nodes=1", *(["--array=0"] if name == "extract" else []), *SMALL, path)
    for body, ended in (("sleep 600", "CANCELLED"), ("exit 3", "FAILED")):
        stand_in.write_text(STAND_IN.format(body))
        stand_in.chmod(0o755)
        number = slurm.submit(*words, FILES / f"{name}.sbatch")
        job = f"{number}_0" if name == "extract" else number
        slurm.wait_for(lambda job=job: "begun" in slurm.said(job), job)  # type: ignore[misc]
        if ended == "CANCELLED":
            slurm.ask("scancel", job)
        facts = slurm.end(job)
        # what is over for Slurm: a job that queues itself again is not
        slurm.wait_for(lambda: not slurm.ask("squeue", "--noheader"), job)
        assert (slurm.job(job)["JobState"], facts["Restarts"]) == (ended, "0")
        assert slurm.job(job)["ExitCode"] == {"CANCELLED": "0:15", "FAILED": "3:0"}[ended]
