"""A device's time is measured without waiting for it: on a GPU between marks in its queue, which
are read when it has passed them; on a CPU by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from featcache.runtime import device as devices

Marks = tuple[torch.cuda.Event, torch.cuda.Event]


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Queue a mark behind all that a stream has to do."""
    # who waits for it sleeps: loader threads want the core
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(stream)
    return event


class Seconds:
    """Measures a time: on the host's clock, or between pairs of marks in a GPU's queue."""

    def __init__(self, seconds: float = 0.0, marks: Sequence[Marks] = ()) -> None:
        self._seconds, self._marks = seconds, marks

    def item(self) -> float:
        """Return the number; waits until the device has passed the last mark."""
        for begun, ended in self._marks:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        self._marks = ()
        return self._seconds


class StepClock:
    """Measures a step from here: on a GPU the time in its queue, since the host is ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if devices.is_gpu(device) else None
        self._mark = None if self._stream is None else mark(self._stream)
        self._begun = time.perf_counter()

    def seconds(self) -> Seconds:
        """Return the time until now."""
        if self._stream is None or self._mark is None:
            return Seconds(time.perf_counter() - self._begun)
        return Seconds(marks=[(self._mark, mark(self._stream))])
