"""When training is asked to end: SIGTERM, a scheduler's notice, or Ctrl-C; it ends after the step
in hand.

Every process of a run must end after the same step, since saving is a meeting of all. With several,
each tells the others at every step, and what they told is looked at one step later, when it is
known without waiting for a device.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from featcache.errors import StoppedError
from student import checkpoint

_NOTE = b"\nnote: stopping after this step, with a checkpoint; Ctrl-C again stops at once\n"


class StopNotice:
    """Within it SIGTERM and the first Ctrl-C are noted; the second Ctrl-C is a
    KeyboardInterrupt."""

    def __init__(self, acc: Accelerator) -> None:
        self.acc = acc
        self.asked: str | None = None
        self._told: Tensor | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopNotice:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == "SIGINT":
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if number == signal.SIGINT and self.acc.is_main_process:
            os.write(2, _NOTE)  # print may be in the middle of something

    def due(self) -> bool:
        """To be asked once after each step: whether this was the last one, for all processes."""
        if self.acc.num_processes == 1:
            return self.asked is not None
        before, mine = (
            self._told,
            torch.tensor(float(self.asked is not None), device=self.acc.device),
        )
        self._told = self.acc.reduce(mine, "sum")
        return before is not None and bool(before.item())


def stopped_error(step: int, total: int, why: str | None, resume: bool) -> StoppedError:
    """The one line, after the checkpoint of `step` is saved."""
    return StoppedError(
        f"stopped after step {step} of {total}{f' by {why}' if why else ''}, its checkpoint is "
        f"saved; {resume_hint(resume)}"
    )


def stopped_at_once(run: Path, resume: bool) -> StoppedError:
    """The one line where nothing was waited for: before the first step, or at the second Ctrl-C."""
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
    """What goes on: the very command where it said --resume already."""
    return (
        "the same command goes on from there"
        if resume
        else "the same command with --resume goes on from there"
    )
