"""Many byte ranges of a file into memory, their crc32c compared, by one call that holds no lock of the interpreter.

A thread that reads 90 kB by os.preadv is back after ten microseconds and waits for the interpreter, which another
thread has just then: with two threads, short reads take a fifth longer than the same calls made from here. Checking a
range between two reads waits twice as often, while its bytes leave the core's own cache.

The checksum is made by carry-less multiplication (Gopal et al., Fast CRC Computation for Generic Polynomials Using
PCLMULQDQ Instruction, Intel 2009): several registers run over the bytes, each folded onto those a block further on. In
the field of polynomials over GF(2), a register A = (high, low) that stands d bits before B is the same remainder as

    high * (x^(d + 32) mod P)  xor  low * (x^(d - 32) mod P)  xor  B

and the last one is finished by the instruction for crc32c itself. n ranges, m parts of them that have a checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.core.typing import signature
from numba.extending import intrinsic

from featcache.reading.byte_ranges import BadRow, Piece, Run, joined
from featcache.runtime.jit import compiled

I64 = npt.NDArray[np.int64]
_POLYNOMIAL = 0x11EDC6F41  # P of crc32c, x^32 first
_AT_ONCE = 32 << 20  # bytes of a call, during which a process does not answer to Ctrl-C
_REGISTERS = 8  # of them at work at a time: a product takes as many steps to be ready
_NAMES = {1: "llvm.x86.pclmulqdq", 2: "llvm.x86.pclmulqdq.256", 4: "llvm.x86.pclmulqdq.512"}  # by lanes of a register

# ------------------------------------------------------------ crc32c


def _lanes() -> tuple[int, ...]:
    """In how many lanes of 16 bytes this machine (as numba is told to see it) multiplies at once, if it can."""
    has = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    needed = {1: {"+pclmul", "+sse4.2", "+crc32"}, 2: {"+vpclmulqdq", "+avx2"}, 4: {"+avx512f"}}
    missing = next((lanes for lanes, features in needed.items() if not features <= has), 8)
    return tuple(lanes for lanes in needed if lanes < missing)


LANES = _lanes()
READS = not config.DISABLE_JIT  # type: ignore[attr-defined]  # whether there is machine code at all
CHECKS = READS and bool(LANES)  # and whether it can compare checksums


def _power(n: int) -> int:
    """x^n mod P as the instruction wants it: 33 bits, x^31 in the second lowest."""
    remainder = 1
    for _ in range(n):
        remainder = remainder << 1 ^ (remainder >> 31) * _POLYNOMIAL
    return int(f"{remainder:032b}"[::-1], 2) << 1


def crc32c_of(lanes: int) -> Any:
    """(address, bytes) -> crc32c, for compiled code."""
    word, byte, short = ir.IntType(64), ir.IntType(8), ir.IntType(32)
    register = ir.VectorType(word, 2 * lanes)
    width = 16 * lanes
    block = width * _REGISTERS

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        def number(value: int) -> ir.Constant:
            return ir.Constant(word, value)

        def function(name: str, result: ir.Type, *arguments: ir.Type) -> Any:
            return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

        def load(kind: ir.Type, at: Any) -> Any:
            return builder.load(builder.inttoptr(at, kind.as_pointer()), align=1)

        def fold(first: Any, onto: Any, bits: int) -> Any:
            powers = ir.Constant(register, [_power(bits + 32), _power(bits - 32)] * lanes)
            high, low = (builder.call(multiply, [first, powers, ir.Constant(byte, which)]) for which in (0x00, 0x11))
            return builder.xor(builder.xor(high, low), onto)

        multiply = function(_NAMES[lanes], register, register, register, byte)
        next_word = function("llvm.x86.sse42.crc32.64.64", word, word, word)
        next_byte = function("llvm.x86.sse42.crc32.32.8", short, short, byte)
        address, size = args
        crc = cgutils.alloca_once_value(builder, number(0xFFFFFFFF))

        # whole blocks, by multiplication
        blocks = builder.udiv(size, number(block))
        with builder.if_then(builder.icmp_unsigned(">", blocks, number(0))):
            start = builder.insert_element(ir.Constant(register, [0] * 2 * lanes), number(0xFFFFFFFF), short(0))
            registers = []
            for i in range(_REGISTERS):
                data = load(register, builder.add(address, number(i * width)))
                registers.append(cgutils.alloca_once_value(builder, data if i else builder.xor(data, start)))
            with cgutils.for_range(builder, builder.sub(blocks, number(1))) as loop:
                here = builder.add(address, builder.mul(builder.add(loop.index, number(1)), number(block)))
                for i, each in enumerate(registers):
                    data = load(register, builder.add(here, number(i * width)))
                    builder.store(fold(builder.load(each), data, 8 * block), each)
            whole = builder.load(registers[0])
            for each in registers[1:]:
                whole = fold(whole, builder.load(each), 8 * width)
            last = number(0)
            for i in range(2 * lanes):
                last = builder.call(next_word, [last, builder.extract_element(whole, short(i))])
            builder.store(last, crc)

        # the rest, by words, then by bytes
        done = builder.mul(blocks, number(block))
        words = builder.udiv(builder.sub(size, done), number(8))
        here = builder.add(address, done)
        with cgutils.for_range(builder, words) as loop:
            data = load(word, builder.add(here, builder.mul(loop.index, number(8))))
            builder.store(builder.call(next_word, [builder.load(crc), data]), crc)
        done = builder.add(done, builder.mul(words, number(8)))
        here = builder.add(address, done)
        with cgutils.for_range(builder, builder.sub(size, done)) as loop:
            so_far = builder.trunc(builder.load(crc), short)
            so_far = builder.call(next_byte, [so_far, load(byte, builder.add(here, loop.index))])
            builder.store(builder.zext(so_far, word), crc)
        return builder.not_(builder.trunc(builder.load(crc), short))

    @intrinsic
    def crc32c(typing: Any, address: Any, size: Any) -> Any:
        return types.uint32(types.uint64, types.int64), generate

    return crc32c


_crc32c = crc32c_of(max(LANES, default=1))

# ------------------------------------------------------------ reading

_pread = types.ExternalFunction("pread", signature(types.int64, types.int32, types.uintp, types.uintp, types.int64))


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


def load() -> None:
    """Compile, or load what was compiled: both open files of their own, for which there may be no handle later."""
    none, groups, until = np.zeros(0, np.int64), np.zeros((1, 3), np.int64), np.zeros(2, np.int64)
    source = np.zeros(0, np.int32), 0, 0, none, none, none, groups, 0, 0
    _read_all(*source)
    if CHECKS:
        _read_checked(*source, groups, until, np.zeros((0, 0), np.uint32))
        _wrong(0, 0, none, groups, until, np.zeros((0, 0), np.uint32), 0)


class _Shape(NamedTuple):
    """What pieces come to: `groups` (g, 3) source, place and size; `parts` (m, 3) place, size and column of what has a
    checksum, those of each group up to `until` (g + 1,); a row's bytes from `low` to `high` are written."""

    groups: I64
    parts: I64
    until: I64
    low: int
    high: int


@lru_cache(256)
def _shape(pieces: tuple[Piece, ...], most: int | None) -> _Shape:
    groups = joined(pieces, most)
    ranges = np.array([group[:3] for group in groups], np.int64)
    parts = np.array([(low, high - low, column) for group in groups for low, high, column in group.parts], np.int64)
    until = np.cumsum([0, *(len(group.parts) for group in groups)])
    low, high = ranges[:, 1].min(), (ranges[:, 1] + ranges[:, 2]).max()
    return _Shape(ranges, parts.reshape(-1, 3), until, int(low), int(high))


def fill(files: Sequence[int], run: Run, most: int, by_hand: Callable[[int, memoryview, int], None]) -> None:
    """Fill a run from its open `files` (f,); where it has checksums by about `most` bytes, which are compared while a
    core's own cache holds them. `by_hand(file, view, offset)` fills what a call did not read whole. Raises BadRow for a
    wrong checksum."""
    shape = _shape(run.pieces, None if run.crcs is None else most)
    rows, width = run.target.shape
    if not run.target.flags.carray:
        raise ValueError("memory must be contiguous and writable")
    if run.at.min() < 0 or run.at.max() >= rows or shape.low < 0 or shape.high > width:
        raise IndexError(f"rows {run.at.min()} ... {run.at.max()}, bytes {shape.low} ... {shape.high} of {rows, width}")
    memory = run.target.ctypes.data, width, run.at
    sums = shape.parts, shape.until, run.crcs
    source = np.array(files, np.int32), *memory, run.file, run.offsets, shape.groups
    i, end = 0, len(run.at) * len(shape.groups)
    step = max(_AT_ONCE // int(shape.groups[:, 2].max()), 1)
    while i < end:
        high = min(i + step, end)
        i, part = _read_all(*source, i, high) if run.crcs is None else _read_checked(*source, i, high, *sums)
        row, group = divmod(i, len(shape.groups))
        if part < 0 and i < high:
            offset, place, size = shape.groups[group].tolist()
            first = int(run.at[row]) * width + place
            view = run.target.reshape(-1).data[first : first + size]
            by_hand(int(run.file[row]), view, int(run.offsets[row]) + offset)
            part = -1 if run.crcs is None else _wrong(*memory, *sums, i)
            i += 1
        if part >= 0:
            raise BadRow(run.paths[run.file[row]], int(run.at[row]), int(shape.parts[part][2]))
