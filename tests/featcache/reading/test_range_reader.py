"""Reading under duress: changed, cut and missing files, short reads, forks, threads, few file
descriptors, no page cache.

The caches are those of test_cache.py; whatever happens, what is read is right or an error names
the file.
"""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import operator
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache
from featcache.errors import UserError
from featcache.reading import byte_ranges, file_pool, native_read, range_reader
from featcache.reading.cache import Cache
from featcache.storage import posix_io
from featcache.storage.store import SHARDS, STORES, Array, array_from_dict, get_store
from tests.conftest import copy_tree, flip, python
from tests.featcache.reading import test_cache
from tests.featcache.reading.test_cache import (
    FIELDS,
    KEYS,
    NUMBERS,
    TOKENS,
    VIEWS,
    knows_direct,
    write_cache,
)

CHUNK = f"{SHARDS}/000001.zarr/features/c.0.1.0.0.0"
KINDS = [(name, tokens) for name in STORES for tokens in ("raster", "ranked")]


@pytest.fixture(autouse=True, params=["one by one", "by machine code"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to fill memory, whatever the size of what is read."""
    if request.param == "by machine code":
        monkeypatch.setattr(range_reader, "_INLINE_BYTES", 0)
        monkeypatch.setattr(range_reader, "_SMALL_ITEM_BYTES", 0)
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("range_reader")
    return {kind: write_cache(root / "-".join(kind), *kind) for kind in KINDS}


@pytest.fixture
def copy(folders: dict[tuple[str, str], Path], tmp_path: Path) -> Path:
    return copy_tree(folders["zarr", "raster"], tmp_path / "copy")


def of_one_file(
    path: Path, target: np.ndarray, at: list[int], offsets: list[int], *rest: Any, **more: Any
) -> byte_ranges.RangeBatch:
    one = np.zeros(len(at), np.int64)
    return byte_ranges.RangeBatch(
        [str(path)], target, np.array(at), one, np.array(offsets), *rest, **more
    )


def leave_to_preadv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As machine code says of a read that failed or was cut short."""
    for name in ("_read_all", "_read_checked"):
        monkeypatch.setattr(native_read, name, lambda *args: (args[7], -1))


def check_all(cache: Cache, tokens: int | None = None) -> None:
    """Everything there is, view by view, equals what was written."""
    for view in range(VIEWS):
        for name, values in cache.read(range(len(cache)), view, FIELDS, tokens=tokens).items():
            wanted = NUMBERS[name] if name == "source_size" else NUMBERS[name][:, view]
            wanted = wanted[:, :, :tokens] if name in ("features", "feature_stats") else wanted
            np.testing.assert_array_equal(values, wanted, err_msg=name)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "name", [CHUNK, f"{SHARDS}/000000.zarr/attention/c.0.0.0", f"{SHARDS}/000000.zarr/zarr.json"]
)
@pytest.mark.parametrize("how", ["short", "missing", "longer"])
def test_a_file_of_another_size_is_named_when_the_cache_is_opened(
    copy: Path, name: str, how: str
) -> None:
    path = copy / name
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(data[:-5] if how == "short" else data + b"x")
    with pytest.raises(UserError) as caught:
        featcache.open(copy)
    assert str(path) in str(caught.value)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("io", ["buffered", "streaming", "direct"])
@pytest.mark.parametrize("how", ["short", "missing"])
@pytest.mark.parametrize(
    "name", [CHUNK, f"{SHARDS}/000001.zarr/row_crc/c.0.0.0", f"{SHARDS}/000001.zarr/flip/c.0.0"]
)
@pytest.mark.parametrize("rows", [[7], [5, 6, 7]])
def test_a_file_that_goes_while_the_cache_is_open_is_named(
    copy: Path, name: str, how: str, io: str, rows: list[int]
) -> None:
    if io == "direct" and not knows_direct(copy):
        pytest.skip("this file system does not know O_DIRECT")
    with featcache.open(copy, io=io) as cache:
        path = copy / name
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        with pytest.raises(UserError) as caught:
            cache.read(rows, 1, ["features", "flip"])
        assert str(path) in str(caught.value)
        assert ("ends before byte" if how == "short" else "No such file") in str(caught.value)


@pytest.mark.parametrize("levels", [None, [5], [6, 2]])
@pytest.mark.parametrize("rows", [[6], [5, 6, 7], [7, 6, 6]])
def test_a_flipped_bit_is_never_read_in_silence(
    copy: Path, levels: list[int] | None, rows: list[int]
) -> None:
    """Row 6 is the second of its shard; its level 5 begins after one row and one level."""
    path = copy / CHUNK
    flip(path, 240 + 80 + 33)
    with featcache.open(copy) as cache:
        assert cache.read([5, 7], 1, levels=levels)
        if levels == [6, 2]:
            assert cache.read(rows, 1, levels=levels)
            return
        with pytest.raises(UserError) as caught:
            cache.read(rows, 1, levels=levels)
        for part in (str(path), "row 6", "'n/1'", "view 1", "checksum differs", "repair"):
            assert part in str(caught.value)
        assert cache.read(rows, 1, levels=levels, check=False)


ANYWHERE = st.tuples(
    st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 7)
)


@pytest.mark.slow
@settings(max_examples=300)
@given(where=ANYWHERE, tokens=st.one_of(st.none(), st.integers(1, TOKENS)))
def test_a_flip_anywhere_is_harmless_or_named(
    folders: dict[tuple[str, str], Path], where: tuple, tokens: int | None
) -> None:
    """Any bit of any file of a shard, those of checksums, keys and indices among them."""
    kind, file, at, bit = where
    files = sorted(path for path in folders[kind].glob(f"{SHARDS}/*/**/*") if path.is_file())
    path = files[file % len(files)]
    at %= path.stat().st_size
    flip(path, at, bit)
    message = ""
    try:
        with featcache.open(folders[kind]) as cache:
            assert list(cache.keys) == KEYS
            check_all(cache, tokens)
    except UserError as error:
        message = str(error)
    finally:
        flip(path, at, bit)
    assert not message or str(path) in message


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_flip_in_the_numbers_is_always_named(
    folders: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    """The middle of every array, also of the checksums' own files."""
    with featcache.open(folders[kind]) as cache:
        specs: list[Array] = [
            array_from_dict(name, facts) for name, facts in cache.manifest["arrays"].items()
        ]
    tokens = 2 if kind[1] == "ranked" else None
    for spec in specs:
        file, offsets = get_store(kind[0]).locate(
            folders[kind], "000001", spec, VIEWS, 1, np.array([1])
        )
        path, at = Path(file), int(offsets[0])
        at += (
            4 * 3 * (2 - 1)
            if spec.name == "prefix_crc"
            else min(spec.item_bytes // 2, spec.item_bytes - 1)
        )
        if spec.name == "features" and tokens:
            at = int(offsets[0])  # within the prefix
        flip(path, at, 3)
        try:
            with featcache.open(folders[kind]) as cache, pytest.raises(UserError) as caught:
                cache.read([5, 6, 7], 1, FIELDS, tokens=None if spec.name == "row_crc" else tokens)
        finally:
            flip(path, at, 3)
        assert str(path) in str(caught.value), spec.name


# ---------------------------------------------------------------- sound files in wrong places


def exchange(one: Path, other: Path) -> None:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Caches of two shards whose files have the same sizes."""
    root = tmp_path_factory.mktemp("alike")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_cache, "KEYS", [f"k{i}" for i in range(8)])
        sizes = {"000000": 4, "000001": 4}
        return {kind: write_cache(root / "-".join(kind), *kind, sizes=sizes) for kind in KINDS}


def twins(cache: Path, store: str) -> list[list[tuple[Path, Path]]]:
    """Files that can be exchanged unseen, of equal size and other bytes: of two shards,
    and of two views."""
    folders = [cache / SHARDS / f"{shard}.{store}" for shard in ("000000", "000001")]
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    # keys as Zarr's strings are for others: we read bytes and offsets
    names = [name for name in names if str(name) != "key/c.0"]
    split = {"zarr": ("c.0.0.", "c.0.1."), "webdataset": ("v0.", "v1.")}[store]
    across = [(folders[0] / name, folders[1] / name) for name in names]
    within = [
        (folders[0] / n, folders[0] / n.with_name(n.name.replace(*split)))
        for n in names
        if split[0] in n.name
    ]
    return [
        [
            (one, other)
            for one, other in pairs
            if other.is_file()
            and one.stat().st_size == other.stat().st_size
            and one.read_bytes() != other.read_bytes()
        ]
        for pairs in (across, within)
    ]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_files_in_one_another_s_place_are_never_read_as_their_own(
    alike: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    """All files of two shards at once (every checksum then fits its row), all of two views, and
    each alone."""

    def read() -> None:
        with featcache.open(alike[kind]) as cache:
            check_all(cache, 2 if kind[1] == "ranked" else None)
            check_all(cache)  # what the first tokens need is not all that is there
            assert list(cache.keys) == [f"k{i}" for i in range(8)]

    across, within = twins(alike[kind], kind[0])
    data = [pair for pair in across if "key" not in pair[0].parts[-2]]
    assert len(data) > 4
    assert within
    for swapped in (across, data, within, *([pair] for pair in (*across, *within))):
        for one, other in swapped:
            exchange(one, other)
        try:
            with pytest.raises(UserError) as caught:
                read()
        finally:
            for one, other in swapped:
                exchange(one, other)
        assert str(alike[kind]) in str(caught.value)
    read()


@pytest.mark.parametrize("how", ["another", "in place"])
def test_checksums_are_proven_once_and_again_when_their_file_changes(copy: Path, how: str) -> None:
    path = copy / SHARDS / "000001.zarr/row_crc/c.0.0.0"
    with featcache.open(copy) as cache:
        asked = []
        is_intact = cache._base.store.is_intact
        file_check = byte_ranges.FileCheck(
            lambda p, facts: asked.append(p) or is_intact(p, facts), cache._base.file_record
        )
        memory = np.empty((1, 12), np.uint8)
        ranges = (byte_ranges.ByteRange(0, 0, 12),)
        batch = of_one_file(path, memory, [0], [0], ranges, file_check=file_check)
        for _ in range(3):
            cache._reader.read([batch])
        assert asked == [path]
        data = path.read_bytes()
        if how == "another":
            path.unlink()
            cache.close()
        path.write_bytes(data[:-5] + b"x" + data[-4:])
        # on a file system that tells time in seconds nothing else would differ
        os.utime(path, ns=(0, 0))
        with pytest.raises(UserError, match="not those that were recorded"):
            cache._reader.read([batch])
        assert asked == [path, path]


@pytest.mark.parametrize("wrong", [None, 0, 1, 2])
@pytest.mark.parametrize("most", [0, 6000, 1 << 20], ids=["alone", "by two", "all at once"])
def test_neighbours_are_read_together_and_each_is_checked(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, wrong: int | None
) -> None:
    """Three ranges of 3,000 bytes; with a wrong checksum the range it belongs to is named, however
    many are joined."""
    monkeypatch.setattr(range_reader, "_CHECKED_BYTES", most)
    data = np.random.default_rng(0).integers(0, 256, 9100, np.uint8)
    path = tmp_path / "file"
    path.write_bytes(data.tobytes())
    calls: list[int] = []
    plain = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    sums = np.array(
        [[crc32c.crc32c(data[100 + low : 3100 + low].tobytes()) for low in (0, 3000, 6000)]],
        np.uint32,
    )
    if wrong is not None:
        sums[0, wrong] ^= 1
    ranges = tuple(
        byte_ranges.ByteRange(low, low, 3000, column) for column, low in enumerate((0, 3000, 6000))
    )
    target = np.zeros((1, 9000), np.uint8)
    batch = of_one_file(path, target, [0], [100], ranges, sums)
    if wrong is None:
        range_reader.RangeReader(1).read([batch])
        np.testing.assert_array_equal(target[0], data[100:])
        if way == "one by one":
            assert calls == {0: [100, 3100, 6100], 6000: [100, 6100], 1 << 20: [100]}[most]
    else:
        with pytest.raises(byte_ranges.RowChecksumError) as bad:
            range_reader.RangeReader(1).read([batch])
        assert (bad.value.row, bad.value.column) == (0, wrong)


@pytest.mark.slow_after(1)
def test_a_share_of_the_rows_is_checked_and_others_the_next_time(copy: Path) -> None:
    """So that a bad row is met in the end, however small the share; none at all with 0."""
    flip(copy / CHUNK, 240 + 3)
    errors = {}
    for share in (0.0, 0.1, 0.5, 1.0):
        with featcache.open(copy, verify_rows=share) as cache:
            errors[share] = 0
            for _ in range(200):
                try:
                    cache.read([5, 6, 7], 1)
                except UserError:
                    errors[share] += 1
            chosen = np.mean(
                [cache._choose_rows(np.arange(1000), np.arange(1000) % 3).mean() for _ in range(20)]
            )
            assert abs(chosen - share) < 0.02
    assert errors[0.0] == 0
    assert errors[1.0] == 200
    assert 10 < errors[0.1] < 30
    assert 80 < errors[0.5] < 120


def test_bytes_that_went_wrong_on_their_way_are_not_blamed_on_a_file(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.preadv

    def noisy(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = original(fd, buffers, offset)
        if os.readlink(f"/proc/self/fd/{fd}").endswith(CHUNK):  # noqa: PTH115
            buffers[0][0] ^= 1
        return got

    with featcache.open(copy) as cache:
        monkeypatch.setattr(os, "preadv", noisy)
        leave_to_preadv(monkeypatch)
        with pytest.raises(UserError, match=r"sound on disk: memory or transport"):
            cache.read([5], 1)


def test_short_reads_are_continued(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may give less than was asked for."""
    original = os.preadv
    monkeypatch.setattr(
        os,
        "preadv",
        lambda fd, buffers, offset: original(
            fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset
        ),
    )
    with featcache.open(copy) as cache:
        check_all(cache)


def test_a_failing_disk_is_one_line_with_the_file(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with featcache.open(copy) as cache:
        monkeypatch.setattr(os, "preadv", broken)
        leave_to_preadv(monkeypatch)
        with pytest.raises(UserError, match=r"cache file .*000001\.zarr.*Input/output error"):
            cache.read([7], 1)


@pytest.mark.parametrize(
    ("io", "call"), [("streaming", "posix_fadvise"), ("direct", "mmap"), ("buffered", "stat")]
)
def test_every_call_that_fails_is_one_line_with_the_file(
    copy: Path, monkeypatch: pytest.MonkeyPatch, io: str, call: str
) -> None:
    if io == "direct" and not knows_direct(copy):
        pytest.skip("this file system does not know O_DIRECT")

    def broken(*args: object, **more: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with featcache.open(copy, io=io) as cache:
        monkeypatch.setattr(posix_io, "_local", threading.local())  # its memory is not there yet
        monkeypatch.setattr(mmap if call == "mmap" else os, call, broken)
        with pytest.raises(UserError, match=r"cache file .*000001\.zarr.*Stale file handle"):
            cache.read([7], 1)
        monkeypatch.undo()
        assert {file.users for file in cache._reader._files._files.values()} == {0}
        np.testing.assert_array_equal(cache.read([7], 1)["features"], NUMBERS["features"][[7], 1])


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOSPC])
def test_machine_code_that_cannot_be_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """For want of a file descriptor: read without it. For want of room: one line, or every read
    would compile it again."""

    def broken() -> None:
        raise OSError(error, os.strerror(error), "/folder/ranges.nbi")

    monkeypatch.setattr(range_reader, "_INLINE_BYTES", 0)
    monkeypatch.setattr(native_read, "compile_loops", broken)
    with featcache.open(copy) as cache:
        if error == errno.EMFILE:
            check_all(cache)
            assert not cache._reader._loops_compiled
        else:
            with pytest.raises(
                UserError, match=r"No space left on device: '/folder/ranges.nbi'; .*NUMBA_CACHE_DIR"
            ):
                cache.read([0])


def test_a_file_that_does_not_close_keeps_nobody_from_reading(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.close

    def broken(fd: int) -> None:
        original(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(file_pool, "_MAX_OPEN_FILES", 2)
    with featcache.open(copy) as cache:
        monkeypatch.setattr(os, "close", broken)
        check_all(cache)
        assert {file.users for file in cache._reader._files._files.values()} == {0}
        monkeypatch.undo()


def test_an_error_in_one_thread_reaches_the_caller_and_the_cache_lives_on(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_reader, "_INLINE_BYTES", 0)
    flip(copy / CHUNK, 240 + 80 + 33)
    with featcache.open(copy, threads=4) as cache:
        for _ in range(20):
            with pytest.raises(UserError, match="row 6"):
                cache.read([0, 5, 6, 7] * 5, 1)
            np.testing.assert_array_equal(
                cache.read([0, 5, 7], 1)["features"], NUMBERS["features"][[0, 5, 7], 1]
            )


# ---------------------------------------------------------------- past the page cache


def test_direct_reads_cross_blocks_and_ends(tmp_path: Path) -> None:
    """Offsets and sizes that are no multiples of a block, up to the last byte of a file."""
    path = tmp_path / "file"
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096 + 77, np.uint8)
    path.write_bytes(data.tobytes())
    reader = range_reader.RangeReader(1, "direct")
    for low, count in [
        (0, 1),
        (4095, 2),
        (4096, 4096),
        (1, 3 * 4096 + 76),
        (3 * 4096 + 76, 1),
        (100, 9000),
    ]:
        target = np.zeros((1, count), np.uint8)
        batch = of_one_file(path, target, [0], [low], (byte_ranges.ByteRange(0, 0, count),))
        try:
            reader.read([batch])
        except UserError as error:
            if "O_DIRECT" in str(error):
                pytest.skip("this file system does not know O_DIRECT")
            raise
        np.testing.assert_array_equal(target[0], data[low : low + count])
    for low, count in [(3 * 4096 + 77, 1), (3 * 4096, 78), (5 * 4096, 1)]:
        batch = of_one_file(
            path, np.zeros((1, count), np.uint8), [0], [low], (byte_ranges.ByteRange(0, 0, count),)
        )
        with pytest.raises(UserError, match="ends before byte"):
            reader.read([batch])
    reader.close()


def test_a_file_system_without_direct_reads_says_so(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with (
        featcache.open(copy, io="direct") as cache,
        pytest.raises(UserError, match=r"O_DIRECT.*leave --direct out"),
    ):
        cache.read([0])


# ---------------------------------------------------------------- processes and threads


def in_a_child(work: Callable[[], None]) -> int:
    """Exit status of a fork that does `work`; one that hangs is ended by SIGALRM."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def threaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """A cache whose threads have been started and whose files are open."""
    monkeypatch.setattr(range_reader, "_INLINE_BYTES", 0)
    with featcache.open(copy, threads=3) as cache:
        check_all(cache)
        assert cache._reader._executor is not None
        yield cache


def test_after_a_fork_both_sides_read(threaded: Cache) -> None:
    def both() -> None:
        check_all(threaded)
        with ThreadPoolExecutor(4) as pool:
            for job in [pool.submit(check_all, threaded) for _ in range(8)]:
                job.result()
        assert in_a_child(lambda: check_all(threaded)) == 0  # a child's child
        threaded.close()
        check_all(threaded)

    assert in_a_child(both) == 0
    check_all(threaded)
    process = multiprocessing.get_context("fork").Process(target=check_all, args=(threaded,))
    process.start()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("io", ["buffered", "streaming", "direct"])
def test_forked_readers_do_not_share_memory(copy: Path, io: str) -> None:
    """Each child reads one row of its own again and again, unchecked, while the other reads
    another."""

    def same(cache: Cache, row: int) -> None:
        for _ in range(300):
            got = cache.read([row], 1, check=False)["features"]
            np.testing.assert_array_equal(got, NUMBERS["features"][[row], 1])

    with featcache.open(copy, threads=1, io=io) as cache:
        same(cache, 0)
        children = [
            multiprocessing.get_context("fork").Process(target=same, args=(cache, row))
            for row in (1, 6)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == 0


@pytest.mark.parametrize("work", ["close", "read"])
def test_a_fork_while_a_thread_holds_the_lock(threaded: Cache, work: str) -> None:
    """The holder is not there in the child; nobody would ever give the locks back."""
    with threaded._reader._lock, threaded._reader._files._lock:
        assert in_a_child(threaded.close if work == "close" else lambda: check_all(threaded)) == 0


@pytest.mark.slow_after(1)
def test_a_cache_goes_to_spawned_processes(threaded: Cache) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(operator.methodcaller("read", [0, 7], 1), (threaded,))
    np.testing.assert_array_equal(got["features"], NUMBERS["features"][[0, 7], 1])


def test_pickling_keeps_the_options(copy: Path) -> None:
    options = {"threads": 2, "verify_rows": 0.25, "io": "streaming"}
    with featcache.open(copy, **options) as cache, pickle.loads(pickle.dumps(cache)) as again:
        assert again.path == cache.path
        assert (again._reader.threads, again._reader.io) == (2, "streaming")
        assert again.verify_rows == 0.25
        check_all(again)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("threads", [1, 4])
def test_many_threads_at_once(copy: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(range_reader, "_INLINE_BYTES", 0)
    with featcache.open(copy, threads=threads) as cache, ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(check_all, cache) for _ in range(40)]:
            job.result()


# ---------------------------------------------------------------- few file descriptors


def open_files(folder: Path) -> int:
    """Files below a folder that this process holds open."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            found += os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder))  # noqa: PTH115
        except OSError:
            continue
    return found


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", STORES)
def test_file_descriptors_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Eight shards of a row: 100 files and more, four file descriptors, and one more for each
    thread that is at it."""
    folder = write_cache(tmp_path / "c", name, sizes={f"{i:06d}": 1 for i in range(8)})
    monkeypatch.setattr(file_pool, "_MAX_OPEN_FILES", 4)
    monkeypatch.setattr(range_reader, "_INLINE_BYTES", 0)
    with featcache.open(folder, threads=1) as cache:
        for _ in range(2):
            check_all(cache)
            assert 0 < open_files(folder) <= 4
    assert open_files(folder) == 0
    with featcache.open(folder, threads=3) as cache, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(check_all, cache) for _ in range(12)]
        most = 0
        while not all(job.done() for job in jobs):
            most = max(most, open_files(folder))
        for job in jobs:
            job.result()
        assert most <= 4 + 4 + 2  # four callers and the two threads of the pool
        cache.read([0])
        assert open_files(folder) <= 4


@pytest.mark.slow
def test_a_file_check_makes_room_for_itself(copy: Path) -> None:
    """One file descriptor is free: the file is opened, and its check opens it once more."""
    code = """
import os, resource, sys, featcache
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
cache = featcache.open(sys.argv[1])
cache.read([0], 0, check=False)  # one file of another array stays open
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    os.close(held.pop())
cache.read([0], 0)
"""
    ran = python(code, copy)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_several_caches_share_the_file_descriptors_there_are(
    folders: dict[tuple[str, str], Path], copy: Path
) -> None:
    """Three open caches under a limit of 64, and other things that hold files open."""
    code = """
import os, resource, sys, featcache
from featcache.errors import UserError
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
caches = [featcache.open(path) for path in sys.argv[1:]]
assert sum(cache._reader._files.limit for cache in caches) > 64  # each alone might take half
for view in (0, 1, 2, 0):
    for cache in caches:
        cache.read(range(8), view, cache.fields)
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
for cache in caches:  # those of the other caches are closed to make room
    cache.read(range(8), 1, ("features", "flip"))
for cache in caches:
    cache.close()
while True:
    try:
        held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        break
try:
    caches[0].read([0])
except UserError as error:
    assert "too many files open" in str(error) and "ulimit -n" in str(error), error
    assert "verify" not in str(error), error
else:
    raise SystemExit("no error")
"""
    more = [folders["webdataset", "raster"], folders["zarr", "ranked"]]
    ran = python(code, copy, *more)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.02, 0.2])
def test_a_fork_while_another_thread_loads_machine_code_reads(copy: Path, delay: float) -> None:
    code = """
import os, signal, sys, threading, time, featcache
from featcache.reading import range_reader
range_reader._INLINE_BYTES, delay = 0, float(sys.argv[2])
with featcache.open(sys.argv[1], threads=1) as cache:
    first = threading.Thread(target=lambda: cache.read(range(8), 0))
    first.start()
    time.sleep(delay)
    child = os.fork()
    if not child:
        signal.alarm(30)
        cache.read(range(8), 1)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    first.join()
sys.exit(f"the child ended with {ended}" if ended else 0)
"""
    ran = python(code, copy, delay)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("callers", [1, 3])
def test_few_free_file_descriptors_are_shared(tmp_path: Path, callers: int) -> None:
    """Rows of eight files, checked or not, first large reads, where up to nine file descriptors
    are left by others."""
    folder = write_cache(
        tmp_path / "cache", "zarr", "raster", sizes={f"{i:06d}": 1 for i in range(8)}
    )
    code = """
import os, resource, sys, threading, numpy as np, featcache
from featcache.reading import range_reader
range_reader._INLINE_BYTES, callers = 0, int(sys.argv[2])
with featcache.open(sys.argv[1]) as cache:
    whole = cache.read(range(8), 1)["features"]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
failures = []
def read(cache, check):
    try:
        for _ in range(20):
            np.testing.assert_array_equal(cache.read(range(8), 1, check=check)["features"], whole)
    except BaseException as error:
        failures.append((free, check, error))
for free in range(callers, 10):
    for check in (True, False):
        held, cache = [], featcache.open(sys.argv[1], threads=2)
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for _ in range(free):
            os.close(held.pop())
        threads = [threading.Thread(target=read, args=(cache, check)) for _ in range(callers)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        for fd in held:
            os.close(fd)
        cache.close()
sys.exit(str(failures) if failures else 0)
"""
    ran = python(code, folder, callers)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_cache_asks_for_all_file_descriptors_it_may_have(copy: Path) -> None:
    code = """
import resource, sys, featcache
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
cache = featcache.open(sys.argv[1])
soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
assert soft == hard, (soft, hard)
assert cache._reader._files.limit <= soft // 2
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
with featcache.open(sys.argv[1]) as tight:
    assert tight._reader._files.limit == 16
    for view in range(3):
        tight.read(range(8), view, tight.fields)
"""
    ran = python(code, copy)
    assert ran.returncode == 0, ran.stderr
