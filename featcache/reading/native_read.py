"""Many byte ranges of a file into memory, their crc32c compared, by one call that holds no lock of
the interpreter.

A thread that reads 90 kB by os.preadv is back after ten microseconds and waits for the interpreter,
which another thread has just then: with two threads, short reads take a fifth longer than the same
calls made from here. Checking a range between two reads waits twice as often, while its bytes leave
the core's own cache.

The checksum is made by carry-less multiplication (Gopal et al., Fast CRC Computation for Generic
Polynomials Using PCLMULQDQ Instruction, Intel 2009): several registers run over the bytes, each
folded onto those a block further on. In the field of polynomials over GF(2), a register A = (high,
low) that stands d bits before B is the same remainder as

    high * (x^(d + 32) mod P)  xor  low * (x^(d - 32) mod P)  xor  B

and the last one is finished by the instruction for crc32c itself. n ranges, m parts of them that
have a checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core.typing import signature

from featcache.reading.byte_ranges import ByteRange, RangeBatch, RowChecksumError, merge_neighbours
from featcache.reading.crc32c_jit import CHECKS, _crc32c
from featcache.runtime.jit import compiled

I64 = npt.NDArray[np.int64]
_AT_ONCE = 32 << 20  # bytes of a call, during which a process does not answer to Ctrl-C

# ------------------------------------------------------------ crc32c


# ------------------------------------------------------------ reading

_pread = types.ExternalFunction(
    "pread", signature(types.int64, types.int32, types.uintp, types.uintp, types.int64)
)


@compiled
def _read(files, memory, width, at, file, offsets, groups, i):  # type: ignore[no-untyped-def]  # numba infers the types
    """Whether range i was read whole."""
    source, place, size = groups[i % len(groups)]
    row = i // len(groups)
    here = np.uint64(memory + at[row] * width + place)
    return _pread(np.int32(files[file[row]]), here, np.uint64(size), offsets[row] + source) == size  # type: ignore[call-overload]


@compiled
def _wrong(memory, width, at, parts, until, crcs, i):  # type: ignore[no-untyped-def]
    """The first part of range i whose bytes differ from its checksum, or -1."""
    row, group = i // (len(until) - 1), i % (len(until) - 1)
    for part in range(until[group], until[group + 1]):
        place, size, column = parts[part]
        if _crc32c(np.uint64(memory + at[row] * width + place), size) != crcs[row, column]:
            return part
    return -1


@compiled
def _read_all(files, memory, width, at, file, offsets, groups, low, high):  # type: ignore[no-untyped-def]
    for i in range(low, high):
        if not _read(files, memory, width, at, file, offsets, groups, i):
            return i, -1
    return high, -1


@compiled
def _read_checked(files, memory, width, at, file, offsets, groups, low, high, parts, until, crcs):  # type: ignore[no-untyped-def]
    for i in range(low, high):
        if not _read(files, memory, width, at, file, offsets, groups, i):
            return i, -1
        part = _wrong(memory, width, at, parts, until, crcs, i)
        if part >= 0:
            return i, part
    return high, -1


def compile_loops() -> None:
    """Compile, or load what was compiled: both open files of their own, for which there may be no
    handle later."""
    none, groups, until = np.zeros(0, np.int64), np.zeros((1, 3), np.int64), np.zeros(2, np.int64)
    source = np.zeros(0, np.int32), 0, 0, none, none, none, groups, 0, 0
    _read_all(*source)
    if CHECKS:
        _read_checked(*source, groups, until, np.zeros((0, 0), np.uint32))
        _wrong(0, 0, none, groups, until, np.zeros((0, 0), np.uint32), 0)


class _Shape(NamedTuple):
    """What pieces come to: `groups` (g, 3) source, place and size; `parts` (m, 3) place, size and
    column of what has a checksum, those of each group up to `until` (g + 1,); a row's bytes from
    `low` to `high` are written."""

    groups: I64
    parts: I64
    until: I64
    low: int
    high: int


@lru_cache(256)
def _shape(pieces: tuple[ByteRange, ...], most: int | None) -> _Shape:
    groups = merge_neighbours(pieces, most)
    ranges = np.array([group[:3] for group in groups], np.int64)
    parts = np.array(
        [(low, high - low, column) for group in groups for low, high, column in group.parts],
        np.int64,
    )
    until = np.cumsum([0, *(len(group.parts) for group in groups)])
    low, high = ranges[:, 1].min(), (ranges[:, 1] + ranges[:, 2]).max()
    return _Shape(ranges, parts.reshape(-1, 3), until, int(low), int(high))


def read_ranges(
    files: Sequence[int],
    run: RangeBatch,
    most: int,
    by_hand: Callable[[int, memoryview, int], None],
) -> None:
    """Fill a run from its open `files` (f,); where it has checksums by about `most` bytes, which
    are compared while a core's own cache holds them. `by_hand(file, view, offset)` fills what a
    call did not read whole. Raises BadRow for a wrong checksum."""
    shape = _shape(run.pieces, None if run.crcs is None else most)
    rows, width = run.target.shape
    if not run.target.flags.carray:
        raise ValueError("memory must be contiguous and writable")
    if run.at.min() < 0 or run.at.max() >= rows or shape.low < 0 or shape.high > width:
        raise IndexError(
            f"rows {run.at.min()} ... {run.at.max()}, bytes {shape.low} ... {shape.high} of "
            f"{rows, width}"
        )
    memory = run.target.ctypes.data, width, run.at
    sums = shape.parts, shape.until, run.crcs
    source = np.array(files, np.int32), *memory, run.file, run.offsets, shape.groups
    i, end = 0, len(run.at) * len(shape.groups)
    step = max(_AT_ONCE // int(shape.groups[:, 2].max()), 1)
    while i < end:
        high = min(i + step, end)
        i, part = (
            _read_all(*source, i, high)
            if run.crcs is None
            else _read_checked(*source, i, high, *sums)
        )
        row, group = divmod(i, len(shape.groups))
        if part < 0 and i < high:
            offset, place, size = shape.groups[group].tolist()
            first = int(run.at[row]) * width + place
            view = run.target.reshape(-1).data[first : first + size]
            by_hand(int(run.file[row]), view, int(run.offsets[row]) + offset)
            part = -1 if run.crcs is None else _wrong(*memory, *sums, i)
            i += 1
        if part >= 0:
            raise RowChecksumError(
                run.paths[run.file[row]], int(run.at[row]), int(shape.parts[part][2])
            )
