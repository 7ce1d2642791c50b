"""crc32c is computed by carry-less multiplication, in machine code that is generated here.

The method is that of Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
Instruction, Intel 2009: several registers run over the bytes, each folded onto those a block
further on. In the field of polynomials over GF(2), a register A = (high, low) that stands d bits
before B is the same remainder as

    high * (x^(d + 32) mod P)  xor  low * (x^(d - 32) mod P)  xor  B

and the last one is finished by the instruction for crc32c itself.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_POLYNOMIAL = 0x11EDC6F41  # P of crc32c, x^32 first
_REGISTERS = 8  # of them at work at a time: a product takes as many steps to be ready
# by the number of 16-byte lanes of a register
_NAMES = {1: "llvm.x86.pclmulqdq", 2: "llvm.x86.pclmulqdq.256", 4: "llvm.x86.pclmulqdq.512"}


def _lanes() -> tuple[int, ...]:
    """The numbers of 16-byte lanes that this machine (as numba is told to see it) multiplies at
    once; none where it cannot."""
    has = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    needed = {1: {"+pclmul", "+sse4.2", "+crc32"}, 2: {"+vpclmulqdq", "+avx2"}, 4: {"+avx512f"}}
    missing = next((lanes for lanes, features in needed.items() if not features <= has), 8)
    return tuple(lanes for lanes in needed if lanes < missing)


LANES = _lanes()
READS = not config.DISABLE_JIT  # type: ignore[attr-defined]  # loops can be compiled at all
CHECKS = READS and bool(LANES)  # and they can compare checksums


def _power(n: int) -> int:
    """x^n mod P as the instruction wants it: 33 bits, x^31 in the second lowest."""
    remainder = 1
    for _ in range(n):
        remainder = remainder << 1 ^ (remainder >> 31) * _POLYNOMIAL
    return int(f"{remainder:032b}"[::-1], 2) << 1


def crc32c_of(lanes: int) -> Any:
    """Return (address, bytes) -> crc32c, a function for compiled code."""
    word, byte, short = ir.IntType(64), ir.IntType(8), ir.IntType(32)
    register = ir.VectorType(word, 2 * lanes)
    width = 16 * lanes
    block = width * _REGISTERS

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        def number(value: int) -> ir.Constant:
            return ir.Constant(word, value)

        def function(name: str, result: ir.Type, *arguments: ir.Type) -> Any:
            return cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(result, arguments), name
            )

        def load(kind: ir.Type, position: Any) -> Any:
            return builder.load(builder.inttoptr(position, kind.as_pointer()), align=1)

        def fold(first: Any, onto: Any, bits: int) -> Any:
            powers = ir.Constant(register, [_power(bits + 32), _power(bits - 32)] * lanes)
            high, low = (
                builder.call(multiply, [first, powers, ir.Constant(byte, which)])
                for which in (0x00, 0x11)
            )
            return builder.xor(builder.xor(high, low), onto)

        multiply = function(_NAMES[lanes], register, register, register, byte)
        next_word = function("llvm.x86.sse42.crc32.64.64", word, word, word)
        next_byte = function("llvm.x86.sse42.crc32.32.8", short, short, byte)
        address, size = args
        crc = cgutils.alloca_once_value(builder, number(0xFFFFFFFF))

        # whole blocks, by multiplication
        blocks = builder.udiv(size, number(block))
        with builder.if_then(builder.icmp_unsigned(">", blocks, number(0))):
            start = builder.insert_element(
                ir.Constant(register, [0] * 2 * lanes), number(0xFFFFFFFF), short(0)
            )
            registers = []
            for i in range(_REGISTERS):
                data = load(register, builder.add(address, number(i * width)))
                registers.append(
                    cgutils.alloca_once_value(builder, data if i else builder.xor(data, start))
                )
            with cgutils.for_range(builder, builder.sub(blocks, number(1))) as loop:
                here = builder.add(
                    address, builder.mul(builder.add(loop.index, number(1)), number(block))
                )
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
