"""An archive is read by us: the same numbers by row, view, level and token, every damage named, and
nothing that a stranger wrote into it is believed."""

from __future__ import annotations

import logging
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featcache
from featcache.errors import UserError
from featcache.maintenance import transfer, verify
from featcache.reading import compressed_rows
from featcache.storage import compression, json_file
from featcache.storage.store import SHARDS
from tests.conftest import copy_tree, flip
from tests.featcache.reading.test_cache import (
    FIELDS,
    LEVELS,
    NUMBERS,
    TOKENS,
    VIEWS,
    knows_direct,
    reference,
    write_cache,
)
from tests.shard_index import change_index

CHUNK = f"{SHARDS}/000001.zarr/features/c.0.1.0.0.0"
IN_SHARD = 3  # rows of it; with 3 levels 9 chunks


@pytest.fixture(scope="module", params=["raster", "ranked"])
def archive(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    root = tmp_path_factory.mktemp("archive")
    transfer.copy(
        write_cache(root / "plain", tokens=request.param), root / "archive", compress=True
    )
    return root / "archive"


@pytest.fixture
def copied(archive: Path, tmp_path: Path) -> Path:
    return copy_tree(archive, tmp_path / "copy")


@pytest.mark.parametrize("io", ["buffered", "streaming", "direct"])
def test_everything_is_read(archive: Path, io: str) -> None:
    if io == "direct" and not knows_direct(archive):
        pytest.skip("this file system knows no direct reads")
    with featcache.open(archive, io=io) as cache:
        for view in range(VIEWS):
            for name, values in cache.read(range(8), view, FIELDS).items():
                wanted = NUMBERS[name] if name == "source_size" else NUMBERS[name][:, view]
                np.testing.assert_array_equal(values, wanted, err_msg=name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    view=st.integers(0, VIEWS - 1),
    slots=st.lists(st.integers(0, len(LEVELS) - 1), min_size=1, max_size=4),
    tokens=st.none() | st.integers(1, TOKENS),
    check=st.booleans(),
)
def test_any_rows_levels_and_tokens_are_read(
    archive: Path, rows: list[int], view: int, slots: list[int], tokens: int | None, check: bool
) -> None:
    with featcache.open(archive) as cache:
        levels = [LEVELS[slot] for slot in slots]
        got = cache.read(rows, view, ["features", "feature_stats"], levels, tokens, check=check)
    for name, values in got.items():
        wanted = reference(name, rows, [view] * len(rows), slots, tokens)
        np.testing.assert_array_equal(values, wanted)


def test_threads_read_the_same(archive: Path) -> None:
    with featcache.open(archive) as cache, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(cache.read, [i % 8, (3 * i) % 8], i % 3) for i in range(60)]
        for i, job in enumerate(jobs):
            wanted = NUMBERS["features"][[i % 8, (3 * i) % 8], i % 3]
            np.testing.assert_array_equal(job.result()["features"], wanted)


def test_it_is_said_once_that_this_is_slow(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    compressed_rows.note_archive.cache_clear()
    with caplog.at_level(logging.WARNING), featcache.open(copied) as cache:
        cache.read([1], 0, ["attention"])
        assert caplog.messages == []
        for row in range(3):
            cache.read([row])
    assert caplog.messages == [
        f"{str(copied)!r} is an archive, and slow to read; `featcache copy` writes it out plain"
    ]


# ---------------------------------------------------------------- damage


def read_all(path: Path) -> None:
    with featcache.open(path) as cache:
        for view in range(VIEWS):
            got = cache.read(range(8), view)["features"]
            np.testing.assert_array_equal(got, NUMBERS["features"][:, view])


@pytest.mark.slow
def test_a_flip_anywhere_is_harmless_or_named(copied: Path) -> None:
    """Of a file of compressed chunks, byte by byte: never other numbers."""
    path = copied / CHUNK
    named = 0
    for at in range(path.stat().st_size):
        flip(path, at)
        try:
            read_all(copied)
        except UserError as error:
            named += str(path) in str(error)
        finally:
            flip(path, at)
    assert named > 0.9 * path.stat().st_size
    read_all(copied)


ALL = (1 << 64) - 1


@pytest.mark.parametrize(
    "change",
    [{0: ALL, 1: ALL}, {0: 5}, {1: 0}, {1: 1 << 60}, {16: 0, 17: 1 << 40}, {1: ALL, 3: 2}],
    ids=["missing", "moved", "empty", "huge", "beyond the end", "overflow"],
)
def test_a_rerouted_index_is_refused(copied: Path, change: dict[int, int]) -> None:
    path = copied / CHUNK
    change_index(path, 3 * IN_SHARD, change)
    with pytest.raises(UserError, match=rf"{path}: its index of rows is not"):
        read_all(copied)
    assert verify.verify_cache(copied)[0] == [f"{path}: checksum differs"]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["first", "none"])
def test_a_small_file_that_claims_to_be_huge_takes_no_memory(copied: Path, chunk: str) -> None:
    """Sparse, with right checksums: one chunk is all of it, or all that it could hold is index."""
    path, size = copied / CHUNK, 1 << 30
    chunks = 3 * IN_SHARD
    entries = [(0, size)] + [(size, 0)] * (chunks - 1)
    data = b"".join(n.to_bytes(8, "little") for entry in entries for n in entry)
    with path.open("r+b") as file:
        file.truncate(size)
        if chunk == "first":
            file.seek(size)
            file.write(data + crc32c.crc32c(data).to_bytes(4, "little"))
    record = copied / f"{SHARDS}/000001.json"
    about = json_file.read_json(record)
    about["files"]["features/c.0.1.0.0.0"]["bytes"] = path.stat().st_size
    json_file.write_json(record, about)
    tracemalloc.start()
    try:
        with featcache.open(copied) as cache, pytest.raises(UserError, match=f"{path}"):
            cache.read([5], 1, check=False)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_what_does_not_come_back_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "decode", lambda name, coded, out: out.fill(0) is None)
    compression.encode("blosc", np.zeros(9, np.uint8))
    with pytest.raises(UserError, match="does not give back"):
        compression.encode("blosc", np.ones(9, np.uint8))


def test_who_copies_it_out_is_not_told(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compressed_rows.note_archive.cache_clear()
    with caplog.at_level(logging.WARNING):
        transfer.copy(archive, tmp_path / "plain")
    assert caplog.messages == []


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("at", range(16))
def test_a_chunks_own_header_is_not_believed(copied: Path, at: int) -> None:
    """Whatever it says of sizes, the decompressor writes no further than the memory it is given."""
    path = copied / CHUNK
    data = bytearray(path.read_bytes())
    for value in (0, 1, 127, 255):
        path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        try:
            read_all(copied)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017 (unchanged it is read)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096])
def test_decoding_fills_memory_of_its_size_or_says_no(size: int) -> None:
    random = np.random.default_rng(size)
    chunk = random.integers(0, 9, size).astype(np.uint8)
    coded = compression.encode("blosc", chunk)
    guarded = np.full(size + 64, 77, np.uint8)
    out = guarded[32 : 32 + size]
    assert compression.decode("blosc", coded, out)
    np.testing.assert_array_equal(out, chunk)
    for wrong in (b"", coded[:-1], coded + b"\0", coded[:7], bytes(len(coded))):
        assert not compression.decode("blosc", wrong, out)
    *head, _, block, whole = struct.unpack_from("<4B3I", coded)
    for claimed in (size + 1, 1 << 31, (1 << 32) - 1):
        lie = struct.pack("<4B3I", *head, claimed, block, whole) + coded[16:]
        assert not compression.decode("blosc", lie, out)
    np.testing.assert_array_equal(guarded[:32], 77)
    np.testing.assert_array_equal(guarded[32 + size :], 77)


@settings(max_examples=300)
@given(data=st.binary(min_size=1, max_size=300), flips=st.lists(st.integers(0, 4000), max_size=8))
def test_damaged_chunks_never_write_beyond(data: bytes, flips: list[int]) -> None:
    coded = bytearray(compression.encode("blosc", np.frombuffer(data, np.uint8)))
    for at in flips:
        coded[at % len(coded)] ^= 1 << at % 8
    guarded = np.full(len(data) + 128, 77, np.uint8)
    compression.decode("blosc", bytes(coded), guarded[64 : 64 + len(data)])
    assert (guarded[:64] == 77).all()
    assert (guarded[64 + len(data) :] == 77).all()
