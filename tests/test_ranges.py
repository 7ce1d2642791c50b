"""Ranges read by machine code are those that numpy cuts out of the file, checked ones or an error that names them; its
crc32c is that of another library, for every width of a register that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from featcache import preads, ranges
from featcache.errors import UserError
from featcache.preads import Reads
from featcache.ranges import Ranges
from featcache.runs import BadRow, Piece, Run

SIZE = 40_000
DATA = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranges") / "file"
    path.write_bytes(DATA.tobytes())
    return path


@pytest.fixture(scope="module")
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@st.composite
def runs(draw: st.DrawFn, path: str = "file") -> Run:
    """Rows of one to four pieces, in any order of the file, to any of the rows of a larger target."""
    sizes = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    gaps = draw(st.lists(st.integers(0, 50), min_size=len(sizes), max_size=len(sizes)))
    first = np.cumsum([0, *sizes])
    source = np.cumsum([gap + size for gap, size in zip(gaps, [0, *sizes[:-1]], strict=True)])
    order = draw(st.permutations(range(len(sizes))))
    pieces = tuple(Piece(int(source[i]), int(first[i]), sizes[i], i) for i in order)
    at = draw(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
    most = SIZE - int(source[-1]) - sizes[-1]
    offsets = draw(st.lists(st.integers(0, most), min_size=len(at), max_size=len(at)))
    target = np.zeros((12, int(first[-1])), np.uint8)
    return Run(path, target, np.array(at), np.array(offsets), pieces)


def wanted(run: Run) -> np.ndarray:
    out = np.zeros_like(run.target)
    for row, offset in zip(run.at, run.offsets, strict=True):
        for source, place, size, _ in run.pieces:
            out[row, place : place + size] = DATA[offset + source : offset + source + size]
    return out


def sums(run: Run) -> np.ndarray:
    """(rows of the run, columns), by another library."""
    full = wanted(run)
    out = np.zeros((len(run.at), len(run.pieces)), np.uint32)
    for i, row in enumerate(run.at):
        for _, place, size, column in run.pieces:
            out[i, column] = crc32c.crc32c(full[row, place : place + size].tobytes())
    return out


def checked(run: Run, crcs: np.ndarray) -> Run:
    return Run(run.path, run.target, run.at, run.offsets, run.pieces, crcs)


@pytest.mark.parametrize("hot", [3000, 9000, 1 << 19])  # checked after so many bytes
@settings(max_examples=60, deadline=None)
@given(run=runs(), checks=st.booleans())
def test_they_are_what_the_file_holds(fd: int, hot: int, run: Run, checks: bool) -> None:
    run.target[:] = 0
    with mock.patch.object(preads, "_HOT", hot):
        Reads(1)._fill_ranges(fd, checked(run, sums(run)) if checks else run)
    np.testing.assert_array_equal(run.target, wanted(run))


@settings(max_examples=60, deadline=None)
@given(run=runs(), data=st.data())
def test_a_wrong_sum_names_its_row_and_column(fd: int, run: Run, data: st.DataObject) -> None:
    crcs = sums(run)
    bad = data.draw(st.integers(0, len(run.at) - 1)), data.draw(st.integers(0, len(run.pieces) - 1))
    crcs[bad] ^= 1
    with mock.patch.object(Reads, "_fill_together", return_value=False), pytest.raises(BadRow) as caught:
        Reads(1)._fill_ranges(fd, checked(run, crcs))
    assert (caught.value.row, caught.value.column) == (run.at[bad[0]], bad[1])


def test_a_short_file_is_an_error_never_zeros(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(DATA[:1000].tobytes())
    fd = os.open(path, os.O_RDONLY)
    target = np.full((3, 5000), 7, np.uint8)
    run = Run(str(path), target, np.arange(3), np.array([0, 500, 0]), (Piece(0, 0, 400), Piece(400, 400, 200)))
    with pytest.raises(UserError, match=r"ends before byte 1100; run `featcache verify`"):
        Reads(1)._fill_ranges(fd, run)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Reads(1)._fill_ranges(fd, run)


def test_nothing_is_written_beyond_the_memory() -> None:
    memory = np.zeros((2, 8), np.uint8)

    def ranges_of(target: np.ndarray, at: int, piece: Piece) -> Ranges:
        return Ranges(Run("file", target, np.array([at]), np.array([0]), (piece,)), 0)

    ranges_of(memory, 1, Piece(0, 3, 5))
    for at, place in ((1, 4), (1, -1), (2, 0), (-1, 0)):
        with pytest.raises(IndexError, match=r"of \(2, 8\)"):
            ranges_of(memory, at, Piece(0, place, 5))
    with pytest.raises(ValueError, match="contiguous and writable"):
        ranges_of(memory[:, ::2], 0, Piece(0, 0, 1))
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="contiguous and writable"):
        ranges_of(memory, 0, Piece(0, 0, 5))


# ------------------------------------------------------------ crc32c

CHECKED = pytest.mark.skipif(not ranges.CHECKS, reason="this processor has no carry-less multiplication")


@pytest.fixture(scope="module", params=ranges.LANES)
def crc(request: pytest.FixtureRequest) -> Callable[[np.ndarray], int]:
    inner = ranges.crc32c_of(request.param)

    @njit
    def compiled(address: int, size: int) -> int:
        return inner(np.uint64(address), np.int64(size))

    return lambda data: compiled(data.ctypes.data, data.size)


@CHECKED
def test_the_sum_is_the_one_in_the_standard(crc: Callable[[np.ndarray], int]) -> None:
    """RFC 3720 B.4: 32 bytes of zeros, of ones, ascending, descending; and the check value of the catalogues."""
    up = np.arange(32, dtype=np.uint8)
    known = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(up): 0x46DD794E, bytes(up[::-1]): 0x113FDB5C}
    for data, value in {**known, b"123456789": 0xE3069283, b"": 0}.items():
        assert crc(np.frombuffer(data, np.uint8)) == value


@CHECKED
@settings(max_examples=300, deadline=None)
@given(start=st.integers(0, 70), size=st.one_of(st.integers(0, 3000), st.integers(0, SIZE - 70)))
def test_any_bytes_at_any_place(crc: Callable[[np.ndarray], int], start: int, size: int) -> None:
    data = DATA[start : start + size]
    assert crc(data) == crc32c.crc32c(data.tobytes())


@CHECKED
def test_every_length_up_to_some_blocks(crc: Callable[[np.ndarray], int]) -> None:
    for size in range(2200):
        assert crc(DATA[1 : 1 + size]) == crc32c.crc32c(DATA[1 : 1 + size].tobytes())


def test_it_is_there_on_every_processor_with_the_instructions() -> None:
    """So that a mistake in asking for them cannot go unseen: it would only be slow."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    assert ({"pclmulqdq", "sse4_2"} <= set(flags)) == ranges.CHECKS
    assert (4 in ranges.LANES) == ({"vpclmulqdq", "avx512f", "pclmulqdq"} <= set(flags))


def test_a_processor_without_them_checks_otherwise(tmp_path: Path) -> None:
    """numba told to make code for any x86-64: rows are read, a wrong sum is named."""
    code = """
import os, sys, numpy as np, crc32c
from featcache import preads, ranges
from featcache.runs import BadRow, Piece, Run
assert not ranges.CHECKS
data = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8)
open(sys.argv[1], "wb").write(data.tobytes())
pieces = tuple(Piece(low, low, 500_000, i) for i, low in enumerate((0, 500_000)))
sums = [[crc32c.crc32c(data[low:low + 500_000].tobytes()) for low in (at, at + 500_000)] for at in (0, 2_000_000)]
target = np.zeros((2, 1_000_000), np.uint8)
run = Run(sys.argv[1], target, np.arange(2), np.array([0, 2_000_000]), pieces, np.array(sums, np.uint32))
preads.Reads(2).read([run])
assert (target[0] == data[:1_000_000]).all() and (target[1] == data[2_000_000:]).all()
run.crcs[1, 1] ^= 1
try:
    preads.Reads(2).read([run])
except BadRow as bad:
    print(bad.row, bad.column)
"""
    plain = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], env=plain, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "1 1\n"), ran.stderr
