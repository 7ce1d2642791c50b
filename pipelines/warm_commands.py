"""Run `python -m MODULE ...` in a process that has torch and the packages imported already.

Importing them takes longer than many a command of a small example. A server process imports them
once and forks a child for each command (multiprocessing's `forkserver`), which is a process of its
own in all else: arguments, stdout, exit status, memory.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

# what commands import before they do anything; no thread is started by it, so it may be forked
PRELOADED = ["torch", "timm", "accelerate", "zarr", "featcache.cli", "student.cli"]


def context() -> ForkServerContext:
    """Return the context whose server has imported all. Variables that a library reads as it is
    loaded, such as OMP_WAIT_POLICY, must be set before the first command."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def run(
    module: str,
    arguments: Sequence[str],
    show: Callable[[str], None],
    waiting: Callable[[float], None] = lambda seconds: None,
    every_s: float = 8.0,
) -> tuple[str, int]:
    """Run a command; return its stdout, each line of which is shown as it comes, and its exit
    status. `waiting` is called with the seconds gone, every `every_s` while it runs."""
    here = context()
    reader, writer = here.Pipe(duplex=False)
    errors = Connection(os.dup(2), readable=False)  # as one, it is handed to the child
    facts = (module, list(arguments), writer, errors, str(Path.cwd()), dict(os.environ))
    process = here.Process(target=_main, args=facts)
    done, started = threading.Event(), time.perf_counter()

    def tick() -> None:
        while not done.wait(every_s):
            waiting(time.perf_counter() - started)

    process.start()
    errors.close()
    writer.close()  # the child's own is the last one: its end is the end of the pipe
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        with os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as lines:
            said = []
            for line in lines:
                show(line)
                said.append(line)
        process.join()
    except BaseException:
        process.terminate()  # it stops in order, as on Ctrl-C
        process.join()
        raise
    finally:
        done.set()
        ticker.join()
        reader.close()
    return "".join(said), process.exitcode or 0


def _main(
    module: str,
    arguments: list[str],
    writer: Connection,
    errors: Connection,
    folder: str,
    variables: dict[str, str],
) -> None:
    """Be `python -m MODULE ARGUMENTS` in that folder, with those variables, whose stdout is the
    pipe."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for number, pipe in ((1, writer), (2, errors)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    # the server's own was opened on another file
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [module, *arguments]
    sys.path[:0] = [folder]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
