"""A piece of work gets one line in the run ledger that says what it cost, however it ends.

    with account("copy", cache=path) as line:
        ...
        line["rows"] = 5

`runtime.meter` counts meanwhile; its words are the line's. Beside them stand `start`, `end` (UTC),
`wall_s` (of a clock that is never set back), who ran it and where, and `outcome`: done, stopped or
failed. A process that is killed leaves no line, and a command that was wrong does none of the work.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.catalog import ledger
from featcache.errors import StoppedError, UsageError, UserError
from featcache.runtime import process_counts
from featcache.runtime.meter import Counts, meter
from featcache.storage import manifest
from featcache.storage.files import address

# how the work ended -> what all of its processes counted, and how many of them did
Gather = Callable[[Counts, BaseException | None], tuple[Counts, int]]
Finish = Callable[[Counts], dict[str, Any]]  # all that was counted -> what more the line says


@dataclass(frozen=True)
class Begun:
    """Hold when work began, and what had been counted by then."""

    at: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.perf_counter)
    counts: Counts = field(default_factory=meter.read)


@contextlib.contextmanager
def account(
    command: str,
    *,
    begun: Begun | None = None,
    gather: Gather = lambda counts, error: (counts, 1),
    finish: Finish = lambda counts: {},
    speaks: bool = True,
    **facts: Any,
) -> Iterator[dict[str, Any]]:
    """Write a line about the work inside; yields what else the line says. `begun` where it began
    earlier; `gather` adds the counts of a run's other processes, which do not `speak`: it is called
    in all of them, and before the line is written."""
    begun = begun or Begun()
    error: BaseException | None = None
    try:
        yield facts
    except BaseException as caught:
        error = caught
        raise
    finally:
        if not isinstance(error, UsageError):
            counts, counted = gather(meter.read() - begun.counts, error)
            if speaks and not process_counts.hand_over(counts):
                _name_cache(facts)
                known = {"outcome": outcome_of(error), "counted": counted, **_costs(begun, counts)}
                ledger.log_run(**{"command": command, **known, **finish(counts), **facts})
        error = None  # it holds this frame


def _costs(begun: Begun, counts: Counts) -> dict[str, Any]:
    ended = time.time()
    return {
        "start": ledger.utc(begun.at),
        "end": ledger.utc(ended),
        "time": ledger.utc(ended),
        "wall_s": round(time.perf_counter() - begun.clock, 3),
        "device_s": round(counts.device_s, 6),
        "bytes_read": counts.bytes_read,
        "picture_bytes": counts.picture_bytes,
        "bytes_written": counts.bytes_written,
        "teacher_s": round(counts.teacher_s, 6),
        "teacher_cost": {name: list(each) for name, each in counts.teachers.items()},
        "user": _user(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _user() -> str:
    """Return the name of the user, or the number of one without a name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _name_cache(facts: dict[str, Any]) -> None:
    """Add the id of the cache that was worked on, where it is there by now."""
    if "cache" not in facts:
        return
    # the ledger is read elsewhere
    path, facts["cache"] = facts["cache"], address(facts["cache"])
    if "cache_id" not in facts:
        with contextlib.suppress(UserError, OSError):
            facts["cache_id"] = manifest.read(Path(path))["id"]


def outcome_of(error: BaseException | None) -> str:
    """Tell how work ended: done, stopped by a signal, or failed."""
    if error is None:
        return "done"
    return "stopped" if any(isinstance(each, _STOPS) for each in chain(error)) else "failed"


_STOPS = (StoppedError, KeyboardInterrupt)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those in whose handling it was raised."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__context__
