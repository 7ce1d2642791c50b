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

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.core.typing import signature
from numba.extending import intrinsic

from featcache.compiled import compiled
from featcache.runs import BadRow, Run, joined

I64 = npt.NDArray[np.int64]
_POLYNOMIAL = 0x11EDC6F41  # P of crc32c, x^32 first
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
CHECKS = bool(LANES)  # whether checksums can be compared here


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
def _read(fd, memory, places, offsets, sizes, low):  # type: ignore[no-untyped-def]  # numba infers the types
    for i in range(low, len(sizes)):
        if _pread(np.int32(fd), np.uint64(memory + places[i]), np.uint64(sizes[i]), offsets[i]) != sizes[i]:  # type: ignore[call-overload]
            return i
    return len(sizes)


@compiled
def _check(memory, until, starts, lengths, wanted, i):  # type: ignore[no-untyped-def]
    for part in range(until[i], until[i + 1]):
        if _crc32c(np.uint64(memory + starts[part]), lengths[part]) != wanted[part]:
            return part
    return -1


@compiled
def _read_checked(fd, memory, places, offsets, sizes, until, starts, lengths, wanted, low):  # type: ignore[no-untyped-def]
    for i in range(low, len(sizes)):
        if _pread(np.int32(fd), np.uint64(memory + places[i]), np.uint64(sizes[i]), offsets[i]) != sizes[i]:  # type: ignore[call-overload]
            return i, -1
        part = _check(memory, until, starts, lengths, wanted, i)
        if part >= 0:
            return i, part
    return len(sizes), -1


class Ranges:
    """The ranges of a run, in its order; with its checksums, in ranges of about `most` bytes, which are compared while
    they are in a core's own cache."""

    def __init__(self, run: Run, most: int) -> None:
        groups = joined(run.pieces, most if run.crcs is not None else None)
        source, place, size = (np.array(each, np.int64) for each in zip(*(group[:3] for group in groups), strict=True))
        memory, width = run.target.reshape(-1), run.target.shape[1]
        if not memory.flags.carray or not np.shares_memory(memory, run.target):
            raise ValueError("memory must be contiguous and writable")
        low, high = place.min(), (place + size).max()
        if run.at.min() < 0 or run.at.max() >= len(run.target) or low < 0 or high > width:
            raise IndexError(f"rows {run.at.min()} ... {run.at.max()}, bytes {low} ... {high} of {run.target.shape}")
        rows = run.at[:, None] * width
        self._run, self._memory, self._address = run, memory, memory.ctypes.data
        self._arrays = (rows + place).reshape(-1), (run.offsets[:, None] + source).reshape(-1), np.tile(size, len(rows))
        self._sums: tuple[npt.NDArray[Any], ...] = ()
        if run.crcs is not None:
            self._parts = [part for group in groups for part in group.parts]
            first, last, columns = np.array(self._parts, np.int64).reshape(-1, 3).T
            counts = np.tile([len(group.parts) for group in groups], len(rows))
            starts, lengths = (rows + first).reshape(-1), np.tile(last - first, len(rows))
            self._sums = np.append(0, np.cumsum(counts)), starts, lengths, run.crcs[:, columns].reshape(-1)

    def __len__(self) -> int:
        return len(self._arrays[0])

    def view(self, i: int) -> tuple[memoryview, int]:
        """Where range i goes, and where it comes from."""
        places, offsets, sizes = self._arrays
        return self._memory.data[places[i] : places[i] + sizes[i]], int(offsets[i])

    def read(self, fd: int, low: int) -> int:
        """Fill and compare ranges from `low` on; their number, or the first that could not be read whole."""
        if not self._sums:
            return int(_read(fd, self._address, *self._arrays, low))
        i, part = _read_checked(fd, self._address, *self._arrays, *self._sums, low)
        self._raise(part)
        return int(i)

    def check(self, i: int) -> None:
        """Compare range i, which was filled otherwise."""
        if self._sums:
            self._raise(_check(self._address, *self._sums, i))

    def _raise(self, part: int) -> None:
        if part >= 0:
            row, which = divmod(part, len(self._parts))
            raise BadRow(self._run.path, int(self._run.at[row]), self._parts[which][2])
