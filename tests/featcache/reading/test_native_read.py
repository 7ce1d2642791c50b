"""Ranges read by machine code are those that numpy cuts out of the file, checked ones or an error
that names them; its crc32c is that of another library, for every width of a register that this
machine has."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import njit

from featcache.errors import UserError
from featcache.reading import crc32c_jit, native_read, range_reader
from featcache.reading.byte_ranges import ByteRange, RangeBatch, RowChecksumError, split_batches
from featcache.reading.range_reader import RangeReader

SIZE, FILES = 40_000, 3
DATA = np.random.default_rng(0).integers(0, 256, (FILES, SIZE), np.uint8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("ranges")
    for i, data in enumerate(DATA):
        (folder / str(i)).write_bytes(data.tobytes())
    return [str(folder / str(i)) for i in range(FILES)]


@pytest.fixture
def reader() -> Iterator[RangeReader]:
    reader = RangeReader(1)
    reader._loops_compiled = True
    yield reader
    reader.close()


@st.composite
def batches(draw: st.DrawFn) -> RangeBatch:
    """Rows of one to four ranges, in any order of their files, to any of the rows of a larger
    target."""
    sizes = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    gaps = draw(st.lists(st.integers(0, 50), min_size=len(sizes), max_size=len(sizes)))
    first = np.cumsum([0, *sizes])
    source = np.cumsum([gap + size for gap, size in zip(gaps, [0, *sizes[:-1]], strict=True)])
    order = draw(st.permutations(range(len(sizes))))
    ranges = tuple(ByteRange(int(source[i]), int(first[i]), sizes[i], i) for i in order)
    at = draw(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
    most = SIZE - int(source[-1]) - sizes[-1]
    offsets = draw(st.lists(st.integers(0, most), min_size=len(at), max_size=len(at)))
    file = np.sort(draw(st.lists(st.integers(0, FILES - 1), min_size=len(at), max_size=len(at))))
    names, file = np.unique(file, return_inverse=True)
    target = np.zeros((12, int(first[-1])), np.uint8)
    return RangeBatch(
        [str(name) for name in names], target, np.array(at), file, np.array(offsets), ranges
    )


def with_paths(batch: RangeBatch, paths: list[str], crcs: np.ndarray | None = None) -> RangeBatch:
    """The batch with the paths of its files, and its checksums."""
    return replace(batch, paths=[paths[int(name)] for name in batch.paths], crcs=crcs)


def wanted(batch: RangeBatch) -> np.ndarray:
    out = np.zeros_like(batch.target)
    for row, file, offset in zip(batch.rows, batch.file_index, batch.offsets, strict=True):
        for item_offset, row_offset, size, _ in batch.ranges:
            first = offset + item_offset
            out[row, row_offset : row_offset + size] = DATA[
                int(batch.paths[file]), first : first + size
            ]
    return out


def sums(batch: RangeBatch) -> np.ndarray:
    """(rows of the batch, columns), by another library."""
    full = wanted(batch)
    out = np.zeros((len(batch.rows), len(batch.ranges)), np.uint32)
    for i, row in enumerate(batch.rows):
        for _, row_offset, size, column in batch.ranges:
            item = full[row, row_offset : row_offset + size]
            out[i, column] = crc32c.crc32c(item.tobytes())
    return out


ANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("hot", [3000, 9000, 1 << 19])  # checked after so many bytes
@ANY
@given(
    batch=batches(),
    checks=st.booleans(),
    close=st.sampled_from([1, 8]),
    call=st.sampled_from([1, 9000, 1 << 25]),
)
def test_they_are_what_the_files_hold(
    paths: list[str],
    reader: RangeReader,
    hot: int,
    batch: RangeBatch,
    checks: bool,
    close: int,
    call: int,
) -> None:
    batch.target[:] = 0
    settings = (
        (range_reader, "_CHECKED_BYTES", hot),
        (range_reader, "_GATHER_ITEMS", close),
        (native_read, "_MAX_CALL_BYTES", call),
    )
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(mock.patch.object(*setting))
        reader.read([with_paths(batch, paths, sums(batch) if checks else None)])
    np.testing.assert_array_equal(batch.target, wanted(batch))


@ANY
@given(batch=batches(), part_bytes=st.integers(1, 20_000), files=st.integers(1, 4))
def test_parts_are_the_batch_cut_up(batch: RangeBatch, part_bytes: int, files: int) -> None:
    parts = list(split_batches([batch], part_bytes, files))
    assert all(
        1 <= len(part.paths) <= files and set(part.file_index) == set(range(len(part.paths)))
        for part in parts
    )
    for name in ("rows", "offsets"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name)
        )
    paths = [batch.paths[i] for i in batch.file_index]
    assert [part.paths[i] for part in parts for i in part.file_index] == paths
    assert all(part.row_bytes * len(part.rows) <= max(part_bytes, part.row_bytes) for part in parts)


@ANY
@given(batch=batches(), data=st.data())
def test_a_wrong_sum_names_its_row_and_column(
    paths: list[str], reader: RangeReader, batch: RangeBatch, data: st.DataObject
) -> None:
    crcs = sums(batch)
    bad = (
        data.draw(st.integers(0, len(batch.rows) - 1)),
        data.draw(st.integers(0, len(batch.ranges) - 1)),
    )
    crcs[bad] ^= 1
    with (
        mock.patch.object(RangeReader, "_fill_by_gather", return_value=False),
        pytest.raises(RowChecksumError) as caught,
    ):
        reader.read([with_paths(batch, paths, crcs)])
    assert (caught.value.row, caught.value.column) == (batch.rows[bad[0]], bad[1])
    assert caught.value.path == paths[int(batch.paths[batch.file_index[bad[0]]])]


def test_a_short_file_is_an_error_never_zeros(
    tmp_path: Path, reader: RangeReader, paths: list[str]
) -> None:
    short = tmp_path / "short"
    short.write_bytes(DATA[0, :1000].tobytes())
    target = np.full((4, 5000), 7, np.uint8)
    ranges = ByteRange(0, 0, 400), ByteRange(400, 400, 200)
    batch = RangeBatch(
        [paths[1], str(short)],
        target,
        np.arange(4),
        np.array([0, 1, 1, 1]),
        np.array([0, 0, 500, 0]),
        ranges,
    )
    with pytest.raises(UserError, match=r"short: ends before byte 1100; run `featcache verify`"):
        reader.read([batch])
    os.close(reader._files._files[str(short)].fd)
    with pytest.raises(UserError, match="short: Bad file descriptor"):
        reader.read([batch])
    del reader._files._files[str(short)]  # closed


def test_nothing_is_written_beyond_the_memory(paths: list[str]) -> None:
    memory, zero = np.zeros((2, 8), np.uint8), np.zeros(1, np.int64)

    def fill(target: np.ndarray, row: int, row_offset: int, size: int = 5) -> None:
        with Path(paths[0]).open("rb") as file:
            batch = RangeBatch(
                paths[:1], target, np.array([row]), zero, zero, (ByteRange(0, row_offset, size),)
            )
            native_read.read_ranges([file.fileno()], batch, 0, never)

    fill(memory, 1, 3)
    np.testing.assert_array_equal(memory, [[0] * 8, [0, 0, 0, *DATA[0, :5]]])
    for row, row_offset in ((1, 4), (1, -1), (2, 0), (-1, 0)):
        with pytest.raises(IndexError, match=r"of \(2, 8\)"):
            fill(memory, row, row_offset)
    with pytest.raises(ValueError, match="contiguous and writable"):
        fill(memory[:, ::2], 0, 0, 1)
    memory.flags.writeable = False
    with pytest.raises(ValueError, match="contiguous and writable"):
        fill(memory, 0, 0)


def never(file: int, view: memoryview, offset: int) -> None:
    raise AssertionError((file, len(view), offset))


# ------------------------------------------------------------ crc32c

CHECKED = pytest.mark.skipif(
    not crc32c_jit.CHECKS, reason="this processor has no carry-less multiplication"
)


@pytest.fixture(scope="module", params=crc32c_jit.LANES)
def crc(request: pytest.FixtureRequest) -> Callable[[np.ndarray], int]:
    inner = crc32c_jit.crc32c_of(request.param)

    @njit
    def compiled(address: int, size: int) -> int:
        return inner(np.uint64(address), np.int64(size))

    return lambda data: compiled(data.ctypes.data, data.size)


@CHECKED
def test_the_sum_is_the_one_in_the_standard(crc: Callable[[np.ndarray], int]) -> None:
    """RFC 3720 B.4: 32 bytes of zeros, of ones, ascending, descending; and the check value of the
    catalogues."""
    up = np.arange(32, dtype=np.uint8)
    known = {
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(up): 0x46DD794E,
        bytes(up[::-1]): 0x113FDB5C,
    }
    for data, value in {**known, b"123456789": 0xE3069283, b"": 0}.items():
        assert crc(np.frombuffer(data, np.uint8)) == value


@pytest.mark.slow_after(1)
@CHECKED
@settings(max_examples=300, deadline=None)
@given(start=st.integers(0, 70), size=st.one_of(st.integers(0, 3000), st.integers(0, SIZE - 70)))
def test_any_bytes_at_any_place(crc: Callable[[np.ndarray], int], start: int, size: int) -> None:
    data = DATA[0, start : start + size]
    assert crc(data) == crc32c.crc32c(data.tobytes())


@CHECKED
def test_every_length_up_to_some_blocks(crc: Callable[[np.ndarray], int]) -> None:
    for size in range(2200):
        assert crc(DATA[0, 1 : 1 + size]) == crc32c.crc32c(DATA[0, 1 : 1 + size].tobytes())


def test_it_is_there_on_every_processor_with_the_instructions() -> None:
    """So that a mistake in asking for them cannot go unseen: it would only be slow."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    assert ({"pclmulqdq", "sse4_2"} <= set(flags)) == crc32c_jit.CHECKS
    assert (4 in crc32c_jit.LANES) == ({"vpclmulqdq", "avx512f", "pclmulqdq"} <= set(flags))


NO_FEATURES = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    "without", [NO_FEATURES, {"NUMBA_DISABLE_JIT": "1"}], ids=["features", "compiler"]
)
def test_what_cannot_be_compiled_is_checked_otherwise(
    tmp_path: Path, without: dict[str, str]
) -> None:
    """numba told to make code for any x86-64, or none: rows are read, a wrong sum is named."""
    code = """
import os, sys, numpy as np, crc32c
from featcache.reading import range_reader, crc32c_jit
from featcache.reading.byte_ranges import RowChecksumError, ByteRange, RangeBatch, split_batches
assert not crc32c_jit.CHECKS
data = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8)
open(sys.argv[1], "wb").write(data.tobytes())
ranges = tuple(ByteRange(low, low, 500_000, i) for i, low in enumerate((0, 500_000)))
sums = [
    [crc32c.crc32c(data[low:low + 500_000].tobytes()) for low in (at, at + 500_000)]
    for at in (0, 2_000_000)
]
target = np.zeros((2, 1_000_000), np.uint8)
one, offsets = np.zeros(2, np.int64), np.array([0, 2_000_000])
sums = np.array(sums, np.uint32)
batch = RangeBatch(sys.argv[1:], target, np.arange(2), one, offsets, ranges, sums)
range_reader.RangeReader(2).read([batch])
assert (target[0] == data[:1_000_000]).all() and (target[1] == data[2_000_000:]).all()
batch.crcs[1, 1] ^= 1
try:
    range_reader.RangeReader(2).read([batch])
except RowChecksumError as bad:
    print(bad.row, bad.column)
target[:] = 0
batch = RangeBatch(sys.argv[1:], target, np.arange(2), one, offsets, ranges)
range_reader.RangeReader(2).read([batch])
assert (target[0] == data[:1_000_000]).all() and (target[1] == data[2_000_000:]).all()
"""
    plain = {**os.environ, **without, "NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file"], env=plain, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "1 1\n"), ran.stderr
