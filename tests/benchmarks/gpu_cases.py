"""Measurements that do what measurements should not, for tests of how they are run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.worker import WorkerOptions


class SmallBench:
    """Imports nothing large."""

    def __init__(self, options: WorkerOptions, emit: Callable[[dict[str, Any]], None]) -> None:
        self.emit = emit

    def row(self, label: str, value: float | None, unit: str = "", **more: Any) -> None:
        self.emit({"label": label, "value": value, "unit": unit, **more})

    def forget(self) -> None:
        """Nothing is kept."""


def open_small(
    options: WorkerOptions, emit: Callable[[dict[str, Any]], None]
) -> tuple[SmallBench, dict[str, Any]]:
    return SmallBench(options, emit), {"machine": {"device": "none"}, "versions": {}}


def gives(bench: Any, value: float = 1.0) -> None:
    bench.row("a row", value, "ratio", at_most=1.03)


def fails(bench: Any) -> None:
    bench.row("before it fails", 2.0)
    raise RuntimeError("CUDA error:\n an illegal memory access")


def sleeps(bench: Any, note: str) -> None:
    """Never ends, nor does the process that it starts, whose number it notes."""
    bench.row("before it sleeps", 3.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note).write_text(str(child.pid))
    time.sleep(600)


def dies(bench: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(bench: Any) -> None:
    os._exit(3)
