"""What a GPU has computed is read some steps later, so that the host never waits for the work that
it has just queued.

A tensor's own `item()` is no such reading, however old the tensor is: the copy it asks for is
queued behind all that was queued since. So a copy to page-locked memory is queued at once, with a
mark behind it, and the reader waits for the mark alone. On a CPU all is known at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from featcache.runtime import device as devices
from featcache.runtime.device_clock import Seconds, mark

# Steps until what a step left on a GPU is looked at, and batches that the host is ahead at most:
# the device has its next step queued always, and each costs the memory of one more batch.
LATE_STEPS = 2


def lag(device: torch.device) -> int:
    """Return the steps until what a step left on a device is looked at."""
    return LATE_STEPS if devices.is_gpu(device) else 0


class LateNumbers:
    """Holds a copy of a small tensor, on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values.detach(), None
        if devices.is_gpu(values.device):
            self._values = self._values.to("cpu", non_blocking=True)  # page-locked
            self._copied = mark(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """Return the tensor on the host; waits for the device to have come to the copy."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._values

    def number(self, index: int) -> LateNumber:
        """Return one of the numbers of a vector, to be read later."""
        return LateNumber(self, index)


class LateNumber:
    """Is one number of a vector that is on its way to the host."""

    def __init__(self, numbers: LateNumbers, index: int) -> None:
        self._numbers, self._index = numbers, index

    def item(self) -> float:
        """Return the number; waits for the device to have come to its copy."""
        return self._numbers.read()[self._index].item()


class LateChecks:
    """Looks at flags that a device may raise, `lag` of them later."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[LateNumbers, Callable[[], None]]] = deque()

    def add(self, raised: Tensor, tell: Callable[[], None]) -> None:
        """Add a flag, and what raises the error when it is up."""
        self._waiting.append((LateNumbers(raised), tell))
        self.look(self.lag)

    def look(self, keep: int = 0) -> None:
        """Look at all flags but the newest `keep`, oldest first."""
        while len(self._waiting) > keep:
            raised, tell = self._waiting.popleft()
            if raised.read().any():
                tell()


class Rate:
    """Measures how many come in a second."""

    def __init__(self, count: int, seconds: Seconds) -> None:
        self._count, self._seconds = count, seconds

    def item(self) -> float:
        return round(self._count / max(self._seconds.item(), 1e-9), 2)
