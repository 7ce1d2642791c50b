"""The webdataset store: the contract of every store, and that plain `tarfile` and `webdataset` read
it; the bytes of a small tar written out by hand, and an index that is not believed once it is
damaged."""

from __future__ import annotations

import errno
import gc
import io
import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from featcache.errors import UserError
from featcache.pictures.tars import escape, unescape
from featcache.storage import commit, webdataset_store
from featcache.storage.row_file import RowFile
from featcache.storage.store import SHARDS, Array
from featcache.testing.items import ARRAYS, ODD_KEYS, SHARD, as_items, numbers
from featcache.testing.store import StoreContract

FOLDER = f"{SHARDS}/{SHARD}.webdataset"
INDEX = f"{FOLDER}/index.safetensors"


class TestWebdatasetStore(StoreContract):
    name = "webdataset"


CONTRACT = TestWebdatasetStore()


def tar(cache: Path, view: int) -> Path:
    return cache / FOLDER / f"v{view}.tar"


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    data = numbers(ARRAYS, len(ODD_KEYS), 2)
    CONTRACT.publish(tmp_path, data, keys=ODD_KEYS, cuts=[3, 4])
    return tmp_path, data


# ---------------------------------------------------------------- other people's libraries


def test_plain_tarfile_and_numpy_read_every_member(
    written: tuple[Path, dict[str, np.ndarray]],
) -> None:
    """In order: of each row every array, those that are not per view in each tar."""
    cache, data = written
    assert {path.name for path in (cache / FOLDER).iterdir()} == {
        "v0.tar",
        "v1.tar",
        "index.safetensors",
    }
    for view in range(2):
        with tarfile.open(tar(cache, view), "r:") as archive:
            members = archive.getmembers()
            stems = [escape(key) for key in ODD_KEYS]
            arrays = sorted(ARRAYS, key=lambda array: array.name)
            assert [member.name for member in members] == [
                f"{s}.{a.name}.npy" for s in stems for a in arrays
            ]
            for i, member in enumerate(members):
                row, array = i // len(arrays), arrays[i % len(arrays)]
                values = np.load(io.BytesIO(archive.extractfile(member).read()), allow_pickle=False)
                expected = data[array.name][row, view] if array.per_view else data[array.name][row]
                assert values.dtype == np.dtype(array.dtype)
                assert values.shape == array.item
                np.testing.assert_array_equal(values, expected)


def test_members_have_no_time_and_no_owner(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    cache, _ = written
    with tarfile.open(tar(cache, 1), "r:") as archive:
        for member in archive:
            facts = (
                member.mtime,
                member.uid,
                member.gid,
                member.uname,
                member.gname,
                member.mode,
                member.type,
            )
            assert facts == (0, 0, 0, "", "", 0o644, tarfile.REGTYPE), member.name


def test_webdataset_yields_decoded_samples_under_their_keys(tmp_path: Path) -> None:
    # webdataset passes over a member without a stem, which is what the empty key has
    named = [key for key in ODD_KEYS if key]
    data = numbers(ARRAYS, len(named), 2)
    CONTRACT.publish(tmp_path, data, keys=named)
    for view in range(2):
        dataset = webdataset.WebDataset(str(tar(tmp_path, view)), shardshuffle=False).decode()
        # webdataset leaves the closing of its files to the garbage collector
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            samples = list(dataset)
            gc.collect()
        assert [unescape(sample["__key__"]) for sample in samples] == named
        for row, sample in enumerate(samples):
            names = {name for name in sample if not name.startswith("__")}
            assert names == {f"{array.name}.npy" for array in ARRAYS}
            for array in ARRAYS:
                expected = data[array.name][row, view] if array.per_view else data[array.name][row]
                np.testing.assert_array_equal(sample[f"{array.name}.npy"], expected)


# A slash would make folders of the examples; how these are kept is in ODD_KEYS. NUL ends a name in
# every file system.
STEMS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=120
)


@settings(max_examples=30)
@given(keys=st.lists(STEMS, min_size=1, max_size=4, unique=True))
@example(keys=["x" * 300, "folder/" + "é" * 150, "p/" * 60 + "z" * 99, "." * 40, "%.%2E"])
def test_member_names_give_the_keys_back(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str]
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    CONTRACT.publish(
        cache, numbers(ARRAYS[2:3], len(keys), 1), arrays=ARRAYS[2:3], views=1, keys=keys
    )
    with tarfile.open(tar(cache, 0), "r:") as archive:
        stems = [name.removesuffix(".flip.npy") for name in archive.getnames()]
    assert [unescape(stem) for stem in stems] == keys


# ---------------------------------------------------------------- the bytes


def ustar(name: bytes, size: int) -> bytes:
    """A header of POSIX.1-1988, field by field."""
    fields = [
        name.ljust(100, b"\0"),
        b"0000644\0",  # mode
        b"0000000\0",  # user
        b"0000000\0",  # group
        b"%011o\0" % size,
        b"00000000000\0",  # time
        b"        ",  # the checksum counts as spaces
        b"0",  # a plain file
        bytes(100),  # link
        b"ustar\0" + b"00",
        bytes(32) + bytes(32),  # names of user and group
        bytes(8) + bytes(8),  # device
        bytes(155 + 12),  # prefix of the name, padding
    ]
    block = b"".join(fields)
    assert len(block) == 512
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def npy(text: bytes) -> bytes:
    """Magic, version 1.0, the length of what follows, and a dictionary padded to 128 bytes in
    all."""
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117, b" ") + b"\n"


def test_the_bytes_of_a_small_tar(tmp_path: Path) -> None:
    arrays = [
        Array("flip", "|u1", (), ("row", "view")),
        Array("crop", "<i4", (2,), ("row", "view", "edge")),
        Array("size", "<u2", (1,), ("row", "one"), per_view=False),
    ]
    writer = CONTRACT.writer(tmp_path, arrays)
    items = {
        "flip": np.array([1, 0], np.uint8),
        "crop": np.array([[1, -2], [3, 4]], np.int32),
        "size": np.array([[258], [9]], np.uint16),  # that of view 0 counts
    }
    writer.append(["n1/a.b", "n1/a.b"], items)
    writer.finish([], {})
    flip = npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (), }")
    crop = npy(b"{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }")
    size = npy(b"{'descr': '<u2', 'fortran_order': False, 'shape': (1,), }")
    for view, (flips, crops) in enumerate(
        [
            (b"\x01", b"\x01\x00\x00\x00\xfe\xff\xff\xff"),
            (b"\x00", b"\x03\x00\x00\x00\x04\x00\x00\x00"),
        ]
    ):
        members = [
            ustar(b"n1/a%2Eb.crop.npy", 136) + (crop + crops).ljust(512, b"\0"),
            ustar(b"n1/a%2Eb.flip.npy", 129) + (flip + flips).ljust(512, b"\0"),
            ustar(b"n1/a%2Eb.size.npy", 130) + (size + b"\x02\x01").ljust(512, b"\0"),
        ]
        assert tar(tmp_path, view).read_bytes() == b"".join(members) + bytes(1024)
    with safe_open(tmp_path / INDEX, "numpy") as index:
        assert sorted(index.keys()) == ["key", "key_offsets", "offsets"]
        assert index.get_tensor("offsets").tolist() == [[[640, 1664, 2688]]] * 2
        assert index.get_tensor("offsets").dtype == np.int64
        assert index.get_tensor("key").tobytes() == b"n1/a.b"
        assert index.get_tensor("key_offsets").tolist() == [0, 6]
        assert '"arrays": ["crop", "flip", "size"]' in index.metadata()["index"]


def test_pax_records_only_where_a_name_needs_one(tmp_path: Path) -> None:
    keys = ["plain", "p" * 80 + "/" + "q" * 80, "é", "r" * 120]
    CONTRACT.publish(tmp_path, numbers(ARRAYS[2:3], 4, 1), arrays=ARRAYS[2:3], views=1, keys=keys)
    with tarfile.open(tar(tmp_path, 0), "r:") as archive:
        assert [sorted(member.pax_headers) for member in archive] == [[], [], ["path"], ["path"]]
    assert tar(tmp_path, 0).read_bytes()[156:157] == b"0"


def test_a_tar_of_no_rows_is_its_end_mark(tmp_path: Path) -> None:
    CONTRACT.writer(tmp_path).finish([], {})
    assert [tar(tmp_path, view).read_bytes() for view in range(2)] == [bytes(1024)] * 2
    with tarfile.open(tar(tmp_path, 0), "r:") as archive:
        assert archive.getnames() == []


def test_a_row_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CONTRACT.writer(tmp_path)
    sizes: list[int] = []
    write = os.write

    def counted(fd: int, data: Any) -> int:
        sizes.append(len(data))
        return write(fd, data)

    monkeypatch.setattr(os, "write", counted)
    CONTRACT.fill(writer, ARRAYS, numbers(ARRAYS, 3, 2), 2)
    monkeypatch.undo()
    writer.discard()
    assert sizes == [4 * 1024] * 6


def test_a_writer_that_cannot_begin_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def refused(path: Path) -> RowFile:
        if begun:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        begun.append(path)
        return RowFile(path)

    monkeypatch.setattr(webdataset_store, "RowFile", refused)
    with pytest.raises(OSError, match="Too many open files"):
        CONTRACT.writer(tmp_path)
    assert list((tmp_path / SHARDS).iterdir()) == []


@pytest.mark.parametrize("change", ["one less", "one more"])
def test_items_of_other_arrays_are_refused(tmp_path: Path, change: str) -> None:
    writer = CONTRACT.writer(tmp_path)
    items = as_items(ARRAYS, numbers(ARRAYS, 1, 2), 2)
    if change == "one less":
        del items["flip"]
    else:
        items["extra"] = np.zeros(2)
    with pytest.raises(ValueError, match=r"declared"):
        writer.append(["k0", "k0"], items)
    writer.discard()


# ---------------------------------------------------------------- the index


def rewrite(path: Path, data: bytes, tick: int) -> None:
    """New content with a time of its own; two writes within one tick of the clock would have the
    same."""
    path.write_bytes(data)
    os.utime(path, ns=(tick, tick))


def located(cache: Path, rows: int = 3) -> list[tuple[Path, list[int]]]:
    out = []
    for array in ARRAYS:
        for view in range(2):
            path, offsets = webdataset_store.locate(cache, SHARD, array, 2, view, np.arange(rows))
            out.append((path, offsets.tolist()))
    return out


def test_a_damaged_index_is_never_believed(tmp_path: Path) -> None:
    """Every flipped bit of it: the same answers, or an error with its name."""
    CONTRACT.publish(tmp_path, numbers(ARRAYS, 3, 2))
    expected, path = located(tmp_path), tmp_path / INDEX
    data, believed = path.read_bytes(), []
    for at in range(len(data)):
        for bit in (1, 2, 32):
            rewrite(path, data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :], 4 * at + bit)
            try:
                assert located(tmp_path) == expected
            except UserError as error:
                said = str(error)
            else:
                believed.append(at)
                continue
            assert said.startswith(f"cache file {path} is damaged: ")
            assert said.endswith(f"; run `featcache verify {tmp_path}`")
    header = 8 + int.from_bytes(data[:8], "little")
    assert all(at < header for at in believed)  # blanks; nothing of the numbers
    assert len(believed) < 30


def test_a_cut_or_missing_index_is_named(tmp_path: Path) -> None:
    CONTRACT.publish(tmp_path, numbers(ARRAYS, 3, 2))
    path = tmp_path / INDEX
    data = path.read_bytes()
    for size in range(len(data)):
        rewrite(path, data[:size], size)
        with pytest.raises(UserError, match=r"index\.safetensors is damaged"):
            located(tmp_path)
    rewrite(path, data + b"\0", len(data))
    with pytest.raises(UserError, match=r"index\.safetensors is damaged"):
        located(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"index\.safetensors.*No such file"):
        located(tmp_path)


def test_an_index_of_other_arrays_or_views_is_named(tmp_path: Path) -> None:
    CONTRACT.publish(tmp_path, numbers(ARRAYS, 3, 2))
    with pytest.raises(
        UserError,
        match=r"index\.safetensors.*2 views of attention, features, .*token_ids of 2 views",
    ):
        webdataset_store.locate(
            tmp_path, SHARD, Array("token_ids", "<u2", (), ()), 2, 0, np.arange(1)
        )
    with pytest.raises(UserError, match=r"index\.safetensors.*features of 3 views"):
        webdataset_store.locate(tmp_path, SHARD, ARRAYS[0], 3, 2, np.arange(1))


def test_a_shard_extracted_again_is_read_with_its_new_index(tmp_path: Path) -> None:
    """The two indices are of one size; the member of the key that needs a pax record lies
    elsewhere."""
    for seed, keys in enumerate([["é", "ab", "cd"], ["ab", "cd", "é"]]):
        data = numbers(ARRAYS, 3, 2, seed=seed)
        CONTRACT.publish(tmp_path, data, keys=keys)
        got = CONTRACT.read(tmp_path, ARRAYS[0], 2, np.arange(3))
        np.testing.assert_array_equal(got, np.moveaxis(data["features"], 1, 0))
        commit.move_to_backup(tmp_path, SHARD, "webdataset")
        commit.remove_backup(tmp_path, SHARD, "webdataset")


def test_what_stays_in_memory_is_bounded(tmp_path: Path) -> None:
    """Of an index that was read, a column of offsets for each array and view asked for; and it is a
    copy, so that it does not hold the rest."""
    arrays = [Array("a", "|u1", (), ("row", "view")), Array("b", "|u1", (), ("row", "view"))]
    CONTRACT.publish(tmp_path, numbers(arrays, 8, 1), arrays=arrays, views=1)
    status = (tmp_path / INDEX).stat()
    stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
    column = webdataset_store._column(str(tmp_path / INDEX), stamp, 1, 0, "b")
    assert column.base is None
    assert column.nbytes == 8 * 8
    assert webdataset_store._load.cache_info().maxsize == 16
    assert webdataset_store._column.cache_info().maxsize == 16384


def test_bytes_behind_the_end_are_not_sound(tmp_path: Path) -> None:
    """`is_intact` looks at the whole file, also behind what is recorded."""
    record = CONTRACT.publish(tmp_path, numbers(ARRAYS, 2, 2))
    path = tar(tmp_path, 0)
    facts = record["files"][path.name]
    assert webdataset_store.is_intact(path, facts)
    with path.open("ab") as file:
        file.write(b"more")
    assert not webdataset_store.is_intact(path, facts)
