"""Ranges read by machine code are those that numpy cuts out of the file, checked ones or an error that names them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import preads
from featcache.errors import UserError
from featcache.preads import BadRow, Reads
from featcache.ranges import Ranges
from featcache.runs import Piece, Run

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
    with mock.patch.object(preads, "_HOT", hot), mock.patch.object(preads, "_FEW", 1):
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
    zero, five = np.zeros(1, np.int64), np.full(1, 5, np.int64)
    memory = np.zeros(8, np.uint8)
    Ranges(memory, five - 2, zero, five)  # bytes 3 to 7
    for place in (five - 1, zero - 1):
        with pytest.raises(IndexError, match="of 8 bytes"):
            Ranges(memory, place, zero, five)
    with pytest.raises(ValueError, match="contiguous and writable"):
        Ranges(memory[::2], zero, zero, zero + 1)
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="contiguous and writable"):
        Ranges(memory, zero, zero, five)
