"""`--devices` starts one process for each device, all on one cache; leases share out the shards.

The calling process works on the first device itself. Whatever becomes of the others, it finishes
what they leave.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

from featcache.errors import UsageError
from featcache.runtime import process_counts
from featcache.runtime.meter import Counts, meter
from featcache.runtime.numbers import is_whole

_LOG = logging.getLogger(__name__)


def parse_devices(text: str) -> list[str]:
    """Parse 'all' or 'cuda:0,cuda:1' -> the devices, each once."""
    import torch

    count = torch.cuda.device_count()
    if text == "all":
        if not count:
            raise UsageError(
                "--devices all: this machine has no CUDA device; leave it out, or name some: "
                "cpu,cpu"
            )
        return [f"cuda:{i}" for i in range(count)]
    names = text.split(",")
    for name in names:
        kind, _, number = name.partition(":")
        if name != "cpu" and not (kind == "cuda" and is_whole(number) and int(number) < count):
            here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise UsageError(f"--devices {text!r}: {name!r} is not here; allowed: {here}")
    return names


@contextlib.contextmanager
def worker_processes(names: Sequence[str], words: Sequence[str]) -> Iterator[list[Counts]]:
    """Run the command line `words`, which says nothing of devices, once more for each of these.
    They are waited for, or stopped where the caller fails. What they counted is added to this
    process's counts, and to the list, as they end."""
    counted = list[Counts]()
    with contextlib.ExitStack() as stack:
        logs, counts = (
            [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in names]
            for _ in range(2)
        )
        started = [
            _start([*words, "--device", name], log, own)
            for name, log, own in zip(names, logs, counts, strict=True)
        ]
        try:
            yield counted
        except BaseException:
            for process in started:
                process.terminate()
            raise
        finally:
            for process in started:
                process.wait()
            counted += process_counts.take_over(counts)
            for each in counted:
                meter.add(each)
        for name, process, log in zip(names, started, logs, strict=True):
            if process.returncode:
                _note_failure(name, process.returncode, log)


def _start(words: list[str], log: IO[str], counts: IO[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "featcache", *words],
        stdout=log,
        stderr=log,
        env={**os.environ, process_counts.VARIABLE: str(counts.fileno())},
        pass_fds=[counts.fileno()],
    )


def _note_failure(name: str, status: int, log: IO[str]) -> None:
    log.seek(0)
    last = (log.read().strip().splitlines() or [f"exit status {status}"])[-1]
    _LOG.warning("the process on %s failed, its shards were done by the others: %s", name, last)
