"""The memory of large arrays that were let go is given to new ones.

Fresh memory costs a page fault for every 4 KiB: reading into it takes twice as long or more. A loop
that reads batch after batch gets the memory of the batch before the last one again. An array's
memory is free when the array and all views of it are gone; until then nobody else writes to it.

    array -> memoryview -> block
      ^ views refer to it, and it refers to a memoryview, so its own end is that of the last view
"""

from __future__ import annotations

import math
import os
import sys
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

LEAST_BYTES = 1 << 20  # smaller arrays are what malloc is good at
MOST_BYTES = 4 << 30  # of free memory that is kept, or a sixteenth of the machine's
_WASTE = 1.25  # a block may be so much larger than what is asked for
_OWN_REFERENCES = 2  # a local name, and getrefcount's own argument

Block = npt.NDArray[np.uint8]


class ReusedMemory:
    """Keeps blocks of memory whose arrays are gone, at most `most_bytes` of them. Safe in threads,
    and after a fork."""

    def __init__(self, most_bytes: int | None = None) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.most_bytes = min(MOST_BYTES, memory // 16) if most_bytes is None else most_bytes
        self._start()
        _all.add(self)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._free: deque[Block] = deque()  # oldest first
        self.free_bytes = 0

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of any content, as np.empty does; a large one in memory that was used
        before, where there is some of its size."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not LEAST_BYTES <= size <= self.most_bytes:
            return np.empty(shape, dtype)
        block = self._take(size)
        if block is None:
            block = np.empty(size, np.uint8)
        array: npt.NDArray[Any] = np.ndarray(shape, dtype, memoryview(block))  # type: ignore[arg-type]  # any buffer
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _take(self, size: int) -> Block | None:
        with self._lock:
            for number, block in enumerate(self._free):
                if size <= block.nbytes <= _WASTE * size:
                    del self._free[number]
                    self.free_bytes -= block.nbytes
                    break
            else:
                return None
        # Somebody may hold the memoryview itself, which is an array's `base`.
        return block if sys.getrefcount(block) <= _OWN_REFERENCES else None

    def _give_back(self, block: Block) -> None:
        """Keep a block whose array is gone. Runs in any thread, between any two lines: it must not
        wait for the lock, which its own thread may hold."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._free.append(block)
            self.free_bytes += block.nbytes
            while self.free_bytes > self.most_bytes:
                self.free_bytes -= self._free.popleft().nbytes
        finally:
            self._lock.release()

    def clear(self) -> None:
        """Give all free memory back to the system."""
        with self._lock:
            self._free.clear()
            self.free_bytes = 0


_all: weakref.WeakSet[ReusedMemory] = weakref.WeakSet()


def _after_fork() -> None:
    """A thread that is not there any more may have held the lock."""
    for memory in list(_all):
        memory._start()


os.register_at_fork(after_in_child=_after_fork)
shared = ReusedMemory()  # by all caches of a process
