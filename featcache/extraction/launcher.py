"""`--devices` starts one process for each device, all on one cache; leases share out the shards.

The calling process works on the first device itself. Whatever becomes of the others, it finishes
what they leave.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

from featcache.errors import UsageError
from featcache.runtime.numbers import is_whole

_LOG = logging.getLogger(__name__)
_OWN = ("--devices", "--device", "--check-teacher")  # options that a helper is not given


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
def worker_processes(names: Sequence[str], words: Sequence[str] | None = None) -> Iterator[None]:
    """Run a command once more for each device: `words`, or this process's own. They are waited for,
    or stopped where the caller fails."""
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in names]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "featcache", *_arguments(name, words)],
                stdout=log,
                stderr=log,
            )
            for name, log in zip(names, logs, strict=True)
        ]
        try:
            yield
        except BaseException:
            for process in started:
                process.terminate()
            raise
        finally:
            for process in started:
                process.wait()
        for name, process, log in zip(names, started, logs, strict=True):
            if process.returncode:
                _note_failure(name, process.returncode, log)


def _note_failure(name: str, status: int, log: IO[str]) -> None:
    log.seek(0)
    last = (log.read().strip().splitlines() or [f"exit status {status}"])[-1]
    _LOG.warning("the process on %s failed, its shards were done by the others: %s", name, last)


def _arguments(device: str, given: Sequence[str] | None = None) -> list[str]:
    """Return a command line, this process's own where none is given, with one device in place of
    several, and without the check that was made already."""
    out, words = [], iter(sys.argv[1:] if given is None else given)
    for word in words:
        if word in _OWN:
            next(words, None)
        elif not word.startswith(tuple(f"{name}=" for name in _OWN)):
            out.append(word)
    return [*out, "--device", device]
