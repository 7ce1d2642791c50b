"""Many byte ranges of a file into memory by one call, which holds no lock of the interpreter.

A thread that reads 90 kB by os.preadv is back after ten microseconds and waits for the interpreter, which another
thread has just then: with two threads, short reads take a fifth longer than the same calls made from here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core.typing import signature

from featcache.compiled import compiled

I64 = npt.NDArray[np.int64]
_pread = types.ExternalFunction("pread", signature(types.int64, types.int32, types.uintp, types.uintp, types.int64))


@compiled
def _read(fd, memory, places, offsets, sizes, low, high):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(low, high):
        if _pread(np.int32(fd), np.uint64(memory + places[i]), np.uint64(sizes[i]), offsets[i]) != sizes[i]:  # type: ignore[call-overload]
            return i
    return high


class Ranges:
    """`sizes` (n,) bytes from `offsets` of a file to `places` in `memory`."""

    def __init__(self, memory: npt.NDArray[np.uint8], places: I64, offsets: I64, sizes: I64) -> None:
        if len(places) and not (places.min() >= 0 and (places + sizes).max() <= memory.size):
            raise IndexError(f"ranges to {places.min()} ... {(places + sizes).max()} of {memory.size} bytes")
        if not memory.flags.carray:
            raise ValueError("memory must be contiguous and writable")
        self._memory, self._address = memory, memory.ctypes.data
        self._arrays = places, offsets, sizes

    def view(self, i: int) -> tuple[memoryview, int]:
        """Where range i goes, and where it comes from."""
        places, offsets, sizes = self._arrays
        return self._memory.data[places[i] : places[i] + sizes[i]], int(offsets[i])

    def read(self, fd: int, low: int, high: int) -> int:
        """Fill the ranges [low, high); `high`, or the first that could not be read whole."""
        return int(_read(fd, self._address, *self._arrays, low, high))
