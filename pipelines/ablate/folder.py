"""The folder of one table: whose it is, who works in it, and what is done.

    DIR/.ablate               the mark of this program, and the lock of the one that works
        seed-0/...            what the jobs make
        jobs/seed-0/...json   of each job its command, and once it is done its result
        results.json, results.md

A job is done where its record says so, by the same commands as now, and the file that proves it has
the bytes it had then: an evaluation is bound to its run's config.json.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.runtime import strict_json
from featcache.storage import json_file
from pipelines.ablate.plan import Job, digests, plain_words

MARKER = ".ablate"
JOBS = "jobs"


class Folder:
    """Reads and writes the records of the jobs of one plan below `out`."""

    def __init__(self, out: Path, jobs: list[Job]) -> None:
        self.out, self.jobs = out, jobs
        self._digests = digests(jobs, out)

    def record(self, job: Job) -> dict[str, Any]:
        """Return what is known of a job; nothing where it never began, or its record is none."""
        try:
            return strict_json.as_object(strict_json.read_file(self._path(job)))
        except (OSError, ValueError):
            return {}

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return the record of a job that is done; None of any other."""
        found = self.record(job)
        is_same = found.get("digest") == self._digests[job.name]
        proof = _digest(job.proof)
        return found if is_same and proof is not None and found.get("proof") == proof else None

    def begin(self, job: Job) -> bool:
        """Note a job's command, so that another one in the same place is noticed, and empty the
        folder of one that starts over. Return whether it goes on from what it left before."""
        self._write(job, {"words": plain_words(job, self.out)})
        if job.makes is None:
            return False
        self._refuse_link(job.makes)
        if job.restarted and job.makes.is_dir():
            shutil.rmtree(job.makes)
        return job.makes.is_dir()

    def finish(self, job: Job, facts: dict[str, Any]) -> None:
        """Note that a job is done. Raises UserError where it left nothing."""
        proof = _digest(job.proof)
        if proof is None:
            raise UserError(
                f"{job.name} ended without an error and left no {str(job.proof)!r}; run the same "
                "command again"
            )
        content = {"words": plain_words(job, self.out), "digest": self._digests[job.name]}
        self._write(job, {**content, "proof": proof, **facts})

    def check_unchanged(self) -> None:
        """Raise UserError where a folder was filled by another command than the plan's; results of
        evaluations are made again instead."""
        for job in (job for job in self.jobs if job.makes is not None):
            before, now = self.record(job).get("words"), plain_words(job, self.out)
            if before is not None and before != now:
                raise UserError(
                    f"{str(job.makes)!r} was made by another command: {_difference(before, now)}; "
                    f"give another --out, or remove {str(self.out / f'seed-{job.seed}')!r} to make "
                    "it again"
                )

    def _path(self, job: Job) -> Path:
        return self.out / JOBS / f"{job.name}.json"

    def _write(self, job: Job, content: dict[str, Any]) -> None:
        path = self._path(job)
        self._refuse_link(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_file(path, (json.dumps(content, indent=1) + "\n").encode())

    def _refuse_link(self, path: Path) -> None:
        """What lies behind a link is somebody's."""
        inside = path.relative_to(self.out).parents
        for part in (path, *(self.out / each for each in inside if each != Path())):
            if part.is_symlink():
                raise UserError(f"{str(part)!r} is a link; put the folder itself there")


def _digest(path: Path) -> str | None:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


def _difference(before: Any, now: list[str]) -> str:
    if not isinstance(before, list):
        return "its record is damaged"
    gone = [str(word) for word in before if word not in now]
    new = [word for word in now if word not in before]
    return f"{' '.join(gone[:6]) or 'nothing'} before, {' '.join(new[:6]) or 'nothing'} now"


@contextmanager
def hold(out: Path, about: dict[str, Any]) -> Iterator[int]:
    """Make or open DIR and hold it; yield the lock, which commands inherit, so that one that
    outlives its runner still holds it. Raises UserError where it is somebody else's, of another
    table, or held."""
    check(out, about)
    out.mkdir(parents=True, exist_ok=True)
    with (out / MARKER).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run works in {str(out)!r}, or a command that it started; wait for it, or "
                "give another --out"
            ) from None
        lock.seek(0)
        if not lock.read():
            lock.write(json.dumps(about) + "\n")
            lock.flush()
        yield lock.fileno()


def check(out: Path, about: dict[str, Any]) -> None:
    """Raise UserError unless DIR is free, or holds this table at this scale."""
    marker = out / MARKER
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_file(marker))):
        raise UserError(
            f"--out {str(out)!r} holds something that this program did not write; only its own "
            "folder is used again: give another --out"
        )
    try:
        holds = _is_file(marker) and marker.stat().st_size > 0
        found = strict_json.read_file(marker) if holds else about
    except ValueError:
        found = None
    if found != about:
        raise UserError(
            f"--out {str(out)!r} holds {_told(found)}, {_told(about)} is asked for; give another "
            "--out"
        )


def _told(about: Any) -> str:
    if not isinstance(about, dict):
        return "another program's mark"
    length = ", reduced" if about.get("reduced") else ""
    return f"the table {about.get('table')} at scale {about.get('scale')}{length}"


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
