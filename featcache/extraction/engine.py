"""An engine has the shards of an extraction made by processes that it starts, on this machine or on
others.

Each engine is a file `X_engine.py` of this folder, found by its name, with one function

    run(work: EngineWork, options: EngineOptions, report: EngineReport) -> None

that returns once every shard is complete. Nothing of it crosses to another process but plain values
and names of our own functions: a process plans the extraction by itself, and loads its own teacher.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from featcache.storage.files import address, files_of
from featcache.storage.mount import mount_at
from featcache.storage.store import record_path

if TYPE_CHECKING:
    from featcache.extraction.plan import ExtractJob
    from featcache.extraction.progress import ExtractProgress

# Plans an extraction again from the words of a command line: a function of a module of ours.
PlanAgain = Callable[[Sequence[str]], list["ExtractJob"]]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Hold what was asked of an engine; None leaves it the choice."""

    address: str | None = None  # of a cluster that is there
    actors: tuple[int, int | None] | None = None  # least and most processes
    gpus_per_actor: float | None = None
    device: str | None = None  # cpu or cuda


@dataclass(frozen=True, kw_only=True)
class EngineWork:
    """Hold what is to be extracted, as this process plans it and as another one plans it again."""

    jobs: Sequence[ExtractJob]
    words: Sequence[str]  # of a command line, without the device
    plan_again: PlanAgain
    begin: Callable[[], None]  # called once the processes can be had, before anything is written
    batch_size: int
    workers: int  # decoding threads of each process
    strict: bool
    progress: ExtractProgress
    say: Callable[[str], None]

    @property
    def ids(self) -> list[tuple[str, str]]:
        """Return folder and id of each job, which every process must find the same."""
        return job_ids(self.jobs)


@dataclass
class EngineReport:
    """Hold what an engine has done so far, however its work ends."""

    processes: int = 0  # beside this one, whose counts were added to this one's


class Engine(Protocol):
    """A module that makes shards; see above."""

    def run(self, work: EngineWork, options: EngineOptions, report: EngineReport) -> None: ...


def get_engine(name: str) -> Engine:
    """Return the engine of this name, one of those that `--engine` allows."""
    found: Any = importlib.import_module(f"featcache.extraction.{name}_engine")
    engine: Engine = found
    return engine


def job_ids(jobs: Sequence[ExtractJob]) -> list[tuple[str, str]]:
    """Return folder and id of each job, by names that any process takes."""
    return [(address(job.out), str(job.plan.manifest()["id"])) for job in jobs]


def look_again(out: Path) -> None:
    """Bring what other machines have written of a cache: list a folder, whose file system may
    remember that a name was not there, or an object store."""
    if files_of(out.absolute()).may_be_far:
        mount_at(out.absolute()).refresh()
        return
    for folder in (out, record_path(out, "x").parent):
        if folder.is_dir():
            next(folder.iterdir(), None)
