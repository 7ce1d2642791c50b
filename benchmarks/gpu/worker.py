"""A worker process imports torch once and runs measurement after measurement on its device."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Measurement, Sizes, function_of
from featcache.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class WorkerOptions:
    """A worker is told where files lie, which device it has, and the sizes."""

    folder: Path  # pictures, caches: what measurements share
    log: Path  # where everything goes that commands print
    device: str | None
    sizes: Sizes
    workers: int  # decoding threads
    bench: str = "benchmarks.gpu.bench:open_bench"  # module:function


class StartError(Exception):
    """A process cannot begin: no such device, or a library that cannot be imported."""


def serve(pipe: Connection, options: WorkerOptions) -> None:
    """Serve measurements from the pipe until it is closed: ("row", ...) for each row, then ("done",
    None) or ("failed", why)."""
    os.setsid()  # what it starts is ended with it
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _print_into(options.log)
    try:
        opens = function_of(options.bench)
        bench, facts = opens(options, lambda row: pipe.send(("row", row)))
        pipe.send(("ready", facts))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", _reason(error)))
        return
    while (order := _next(pipe)) is not None:
        pipe.send(_run(order, bench))


def _next(pipe: Connection) -> Measurement | None:
    try:
        order: Measurement = pipe.recv()
        return order
    except EOFError:
        return None


def _run(order: Measurement, bench: Any) -> tuple[str, str | None]:
    print(f"\n==> {order.name}", flush=True)
    try:
        order.load()(bench, **order.options)
    except BaseException as error:
        traceback.print_exc()
        return "failed", _reason(error)
    finally:
        gc.collect()
        bench.forget()
    return "done", None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _end_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is gone."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _print_into(log: Path) -> None:
    """Let everything that this process and its children print go to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"{platform.python_version()} {sys.argv}", flush=True)
