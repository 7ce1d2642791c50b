"""The actor of a Ray cluster holds a teacher and extracts the shards that it is told.

It plans the extraction by itself, from the words of the command line, and returns counts and lines
for people alone. Ray runs its methods in threads: while one extracts, others tell how far it is or
stop it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from featcache.errors import StoppedError, UserError, one_line
from featcache.extraction.engine import PlanAgain, job_ids, look_again

SEEN_S = 60.0  # until a shared folder shows on every node what one has written


@dataclass(frozen=True)
class Setup:
    """Hold what every actor is told: plain values, and the name of a function of ours."""

    plan_again: PlanAgain
    words: Sequence[str]
    ids: list[tuple[str, str]]  # folder and id of each job, as the driver plans them
    folder: str  # that relative paths begin at
    threads: int  # of the teacher's arithmetic: at another number a CPU gives other last bits
    batch_size: int
    workers: int
    strict: bool


@dataclass
class Told:
    """Say how a call ended: `outcome` is done, there, held, stopped or failed."""

    outcome: str
    line: str = ""  # of what failed
    exif_ignored: int = 0
    busy: dict[str, float] = field(default_factory=dict)  # seconds of each stage
    counts: dict[str, Any] = field(default_factory=dict)  # of runtime.meter


class _StopError(BaseException):
    """Ends the shard that is in hand; as an interrupt, no `except Exception` is to catch it."""


def about() -> dict[str, Any]:
    """Return where this process runs, and the versions that its bytes depend on."""
    return {
        "node": f"{socket.gethostname()} ({_address()})",
        "pid": os.getpid(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what the bytes of a cache depend on, and of Ray."""
    import PIL
    import torch

    import featcache

    found = {
        "featcache": featcache.__version__,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }
    for name in ("ray", "timm", "open_clip_torch", "ffcv"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


class ShardActor:
    """Extracts shards in a process of its own, one at a time."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._progress: Any = None
        self._session: Any = None
        self._jobs: list[Any] = []

    def about(self) -> dict[str, Any]:
        return about()

    def load(self, setup: Setup) -> Told:
        """Load the teacher, once, and plan the extraction, which must be the driver's."""
        import torch

        self._setup = setup
        torch.set_num_threads(setup.threads)
        with _telling() as told, _working_folder(setup.folder):
            self._jobs = setup.plan_again(setup.words)
            found = job_ids(self._jobs)
            if found != setup.ids:
                raise UserError(
                    f"the same command means another cache here: {_shown(found)}, and "
                    f"{_shown(setup.ids)} where it was given; the pictures and weights that it "
                    "names must be the same files on every node"
                )
        return told

    def begin(self, is_begun: bool) -> Told:
        """Begin the folders of the cache, or join those that `is_begun` says are there."""
        from featcache.extraction.extract import RunOptions
        from featcache.extraction.progress import ExtractProgress
        from featcache.extraction.session import ExtractSession

        setup = self._setup
        with _telling() as told:
            for job in self._jobs if is_begun else ():
                await_file(job.out, job.out / "manifest.json")
            self._progress = ExtractProgress(report=self._report)
            options = RunOptions(
                batch_size=setup.batch_size,
                workers=setup.workers,
                strict=setup.strict,
                progress=self._progress,
            )
            self._session = ExtractSession.begin(self._jobs, options)
        return told

    def _report(self, progress: Any) -> None:
        if self._stopped.is_set():
            raise _StopError

    def extract(self, shard: str) -> Told:
        """Extract a shard, unless it is there or another writer has it in hand."""
        from featcache.extraction.progress import ExtractProgress
        from featcache.runtime.meter import meter

        before = meter.read()
        progress = self._progress = ExtractProgress(report=self._report)
        with _telling() as told:
            told.outcome = self._session.extract(shard, progress)
        told.exif_ignored, told.busy = progress.exif_ignored, dict(progress.busy)
        told.counts = asdict(meter.read() - before)
        return told

    def pictures(self) -> int:
        """Count the pictures of the shard in hand that are done."""
        return self._progress.pictures if self._progress is not None else 0

    def stop(self) -> None:
        """Let the shard in hand be left at its next batch, with its lease and what was written."""
        self._stopped.set()


@contextlib.contextmanager
def _working_folder(folder: str) -> Iterator[None]:
    """Let relative paths mean what they do at the driver; where that folder is not there, nothing,
    and an error says so."""
    try:
        os.chdir(folder)
    except OSError as error:
        missing = f"{folder!r}, where it was given, is not there: {error.strerror}"
    else:
        yield
        return
    empty = tempfile.mkdtemp()
    os.chdir(empty)
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {missing}") from error
    finally:
        os.chdir("/")
        Path(empty).rmdir()


@contextlib.contextmanager
def _telling() -> Iterator[Told]:
    """Make a line of what a user can cause, which needs no traceback; any other error is Ray's to
    carry."""
    told = Told("done")
    try:
        yield told
    except (_StopError, StoppedError):
        told.outcome = "stopped"
    except UserError as error:
        told.outcome, told.line = "failed", one_line(str(error))


def await_file(
    cache: Path,
    path: Path,
    timeout_s: float = SEEN_S,
    look: Callable[[Path], None] = look_again,
) -> None:
    """Wait until a file that another machine has written is seen here. Raises UserError where it
    never is: the folder is another one."""
    deadline = time.monotonic() + timeout_s
    look(cache)
    while not path.is_file():
        if time.monotonic() >= deadline:
            raise UserError(
                f"{str(path)!r} was written by another node and is not seen here; give a folder "
                "that all nodes and this machine share, or the URL of an object store: --out"
            )
        time.sleep(0.2)
        look(cache)


def _shown(ids: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{folder} of id {number[:12]}" for folder, number in ids)
