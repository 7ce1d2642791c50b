"""Training ends after the step in hand when SIGTERM, SIGUSR1 or SIGUSR2, a scheduler's
notices, or Ctrl-C asks it to, or when its launcher is no longer there.

Every process of a run must end after the same step, since saving is a collective. With several
processes each tells the others at every step by an all-reduce, whose result all look at the same
number of steps later, when it is known without waiting for the newest work of a device.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from featcache.errors import StoppedError
from featcache.runtime import signals
from student import checkpoint
from student.data.device_queue import LateNumbers, lag

_NOTE = b"\nnote: stopping after this step, with a checkpoint; Ctrl-C again stops at once\n"


def note_stopping() -> None:
    """Say on stderr that the run ends after the step in hand; a signal's handler may call it."""
    os.write(2, _NOTE)  # print may be in the middle of something


class StopNotice:
    """Notes a scheduler's notice and the first Ctrl-C inside its block; the second Ctrl-C is a
    KeyboardInterrupt. `stopping` is called at the first Ctrl-C, by the signal's handler."""

    def __init__(self, acc: Accelerator, stopping: Callable[[], None] = note_stopping) -> None:
        self.acc, self.stopping = acc, stopping
        self.asked: str | None = None
        self._told: deque[LateNumbers] = deque()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopNotice:
        if threading.current_thread() is threading.main_thread():
            for number in (*signals.NOTICES, signal.SIGINT):
                # None: set by something that is not Python, which could not be put back
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        echo = signals.is_echo(number)
        if number == signal.SIGINT and self.asked == "SIGINT":
            if echo:
                return
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if number == signal.SIGINT:
            self.stopping()

    def due(self) -> bool:
        """Return whether this step is the last, for all processes; to be asked once after each
        step."""
        if self.asked is None and signals.launcher_has_ended():
            self.asked = "the end of its launcher"
        if self.acc.num_processes == 1:
            return self.asked is not None
        # made on the device, by a kernel: a copy from the host would be waited for
        mine = torch.full((), float(self.asked is not None), device=self.acc.device)
        self._told.append(LateNumbers(self.acc.reduce(mine, "sum")))
        if len(self._told) <= max(lag(self.acc.device), 1):
            return False
        return bool(self._told.popleft().read())


def stopped_error(step: int, total: int, why: str | None, resume: bool) -> StoppedError:
    """Return the one line that ends a run after the checkpoint of `step` is saved."""
    return StoppedError(
        f"stopped after step {step} of {total}{f' by {why}' if why else ''}, its checkpoint is "
        f"saved; {resume_hint(resume)}"
    )


def stopped_at_once(run: Path, resume: bool) -> StoppedError:
    """Return the one line that ends a run before its first step or at the second Ctrl-C, when
    nothing is waited for."""
    step = checkpoint.latest_step(run)
    if step is not None:
        return StoppedError(
            f"stopped; the checkpoint of step {step} is kept, {resume_hint(resume)}"
        )
    if (run / checkpoint.CONFIG).is_file():
        return StoppedError(
            f"stopped before the first checkpoint; {resume_hint(resume)}, which is the start"
        )
    return StoppedError("stopped before the first step; run the same command again")


def resume_hint(resume: bool) -> str:
    """Return the words for how to go on: the very command where it said --resume already."""
    return (
        "the same command goes on from there"
        if resume
        else "the same command with --resume goes on from there"
    )
