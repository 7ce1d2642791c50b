"""Run the jobs of a plan: those that are done are skipped, the first that fails ends the run, and
the same command goes on from there."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from featcache.console.progress_bar import eta
from featcache.console.text import echo
from featcache.errors import UserError, command_line
from pipelines.ablate.folder import Folder
from pipelines.ablate.plan import Job


def run_jobs(folder: Folder, jobs: Sequence[Job], lock: int, made_by: dict[str, Any]) -> None:
    """Run what is not done of some jobs, in order. Raises UserError at the first that fails."""
    total, started = len(folder.jobs), time.perf_counter()
    for job in jobs:
        if folder.result(job) is not None:
            continue
        gone = time.strftime("%H:%M:%S", time.gmtime(time.perf_counter() - started))
        number = folder.jobs.index(job) + 1
        echo(f"\n[{number} of {total}] {job.name}: {gone} gone, {told_eta(folder)}")
        went_on = folder.begin(job)
        said, seconds = run(job, lock)
        result = json.loads(said.splitlines()[-1]) if job.makes is None else None
        facts = {"seconds": seconds, "went_on": went_on, "made_by": made_by, "result": result}
        folder.finish(job, facts)
        if result is not None:
            echo(f"{job.row} {job.column}: top-1 {result['top1']:.2f} %, {seconds:.0f} s")


def run(job: Job, lock: int) -> tuple[str, float]:
    """Print and run a job's command; return its stdout, shown as it comes but for a result, and its
    seconds."""
    echo(f"$ {command_line('python', '-m', *job.words)}")
    started, lines = time.perf_counter(), []
    process = subprocess.Popen(
        [sys.executable, "-m", *job.words], stdout=subprocess.PIPE, text=True, pass_fds=(lock,)
    )
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if job.makes is not None:
                    echo(line, nl=False)
                lines.append(line)
            process.wait()
        except BaseException:
            process.terminate()  # it stops in order, as on Ctrl-C, and can go on
            process.wait()
            raise
    if process.returncode:
        raise UserError(
            f"{job.name} failed with exit status {process.returncode}: `python -m "
            f"{' '.join(job.words[:3])} ...`, printed above with its own message; fix that and run "
            "the same command again, which goes on from there"
        )
    return "".join(lines), round(time.perf_counter() - started, 1)


def told_eta(folder: Folder) -> str:
    """Say when all will be done, from the seconds of jobs of the same kind; kinds of which none is
    done take the mean of all."""
    seconds: dict[str, list[float]] = {}
    open_kinds: list[str] = []
    for job in folder.jobs:
        found = folder.result(job)
        if found is None:
            open_kinds.append(job.kind)
        elif not found.get("went_on"):  # else its seconds are those of its last part
            seconds.setdefault(job.kind, []).append(float(found["seconds"]))
    if not seconds:
        return "ETA unknown"
    usual = statistics.mean(value for values in seconds.values() for value in values)
    left = sum(statistics.mean(seconds.get(kind, [usual])) for kind in open_kinds)
    return eta(left, 1.0)
