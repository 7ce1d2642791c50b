"""An index is used where it is fresh, gives what the records give, and is never believed against
them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

import featcache
from featcache.commands import info
from featcache.errors import UserError
from featcache.extraction import extract
from featcache.storage import index, index_build, index_file, json_file, manifest
from featcache.storage.index_build import BuiltIndex
from featcache.storage.index_file import NAME, Facts, Layout, Table
from tests.conftest import copy_tree, flip, make_plan

FIELDS = ("features", "crop", "attention")


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eleven rows in seven shards, two pictures in quarantine, and an addition; without
    an index."""
    out = tmp_path_factory.mktemp("plain") / "cache"
    plan = make_plan(pictures, rows_per_shard=2, views=2)
    extract.run(plan, out, batch_size=4)
    added = replace(plan, views=1, first_view=2, pixels=False)
    extract.run(added, out / "parts" / "views-1", batch_size=4)
    return out


@pytest.fixture(scope="module")
def indexed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an index of each part."""
    out = copy_tree(plain, tmp_path_factory.mktemp("indexed") / "cache")
    for part in (out, out / "parts" / "views-1"):
        index_build.write(part)
    return out


@pytest.fixture
def shared(indexed: Path) -> Iterator[Path]:
    """It, for who changes the index of its own part alone."""
    yield indexed
    if (indexed / NAME).is_dir():
        (indexed / NAME).rmdir()
    index_build.write(indexed)


@pytest.fixture
def cache(indexed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return copy_tree(indexed, tmp_path / "cache")


@pytest.fixture(autouse=True)
def _notes_again() -> None:
    index._note_once.cache_clear()


def is_indexed(cache: featcache.Cache) -> bool:
    return all(part.index is not None for part in cache._parts)


def test_the_file_is_a_safetensors_file(shared: Path) -> None:
    """Read by another library, and compared with what hashlib says of each key."""
    with featcache.open(shared) as opened, safe_open(shared / NAME, "numpy") as content:
        digests, rows = content.get_tensor("key_digest"), content.get_tensor("key_row")
        pairs = [tuple(map(int, pair)) for pair in digests]
        assert pairs == sorted(pairs)
        wanted = {
            tuple(map(int, d)): i for i, d in enumerate(featcache.rng.key_digests(opened.keys))
        }
        assert {pair: int(row) for pair, row in zip(pairs, rows, strict=True)} == wanted
        records = [
            json_file.read_json(path) for path in sorted((shared / "shards").glob("0*.json"))
        ]
        assert content.get_tensor("shard_rows").tolist() == [r["rows"] for r in records]
        assert content.get_tensor("shard_quarantined").sum() == 2
        sizes = [sum(f["bytes"] for f in r["files"].values()) for r in records]
        assert content.get_tensor("shard_bytes").tolist() == sizes
        assert content.metadata()["cache"] == manifest.read(shared)["id"]


def test_the_same_cache_gives_the_same_bytes(shared: Path, plain: Path, tmp_path: Path) -> None:
    other = copy_tree(plain, tmp_path / "other")
    index_build.write(other)
    assert (other / NAME).read_bytes() == (shared / NAME).read_bytes()


def test_all_that_is_read_is_the_same_with_an_index(
    shared: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.catalog.extract_command.for_cache", lambda *_: "")
    with featcache.open(plain) as without, featcache.open(shared) as opened:
        assert is_indexed(opened)
        assert not is_indexed(without)
        rows = np.arange(len(without))[::-1]
        for view in range(3):
            for name in FIELDS:
                one, other = (each.read(rows, view, (name,))[name] for each in (without, opened))
                np.testing.assert_array_equal(one, other)
        assert list(opened.keys) == list(without.keys)
        assert opened.keys[-1] == without.keys[-1]
        assert opened.keys[2:9:3] == without.keys[2:9:3]
        assert list(opened.records) == list(without.records)
        np.testing.assert_array_equal(opened.keys.digests, without.keys.digests)
        order = np.array([5, 0, 10, 5])
        np.testing.assert_array_equal(opened.keys.digests_of(order), without.keys.digests_of(order))
        assert opened.quarantined == without.quarantined
        assert len(opened.quarantined) == 2
        assert info.describe(opened) == info.describe(without)


def test_opening_and_what_is_asked_of_the_whole_open_no_record(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_files: list[str] = []
    real = json_file.read_json_crc

    def read(path: Path, *rest: Any) -> Any:
        opened_files.append(path.name)
        return real(path, *rest)

    def records() -> list[str]:
        return [name for name in opened_files if name[0] == "0"]

    monkeypatch.setattr(json_file, "read_json_crc", read)
    with featcache.open(shared) as opened:
        info.describe(opened)
        assert opened.keys.find(["no such key"]).tolist() == [-1]
        assert records() == []
        opened.read([0, 10])
        assert records() == ["000000.json", "000006.json"]
        opened.read([10, 0, 1])
        assert len(records()) == 2
        opened.read([0, 10], 2)  # of the addition
        assert records()[2:] == ["000000.json", "000006.json"]


@pytest.mark.parametrize("damage", ["quarantine.json", "changed"])
def test_without_its_list_the_quarantine_is_that_of_the_records(cache: Path, damage: str) -> None:
    with featcache.open(cache) as opened:
        wanted = opened.quarantined
    path = cache / "quarantine.json"
    if damage == "changed":
        json_file.write_json(path, {"pictures": [{"key": "x", "reason": "y"}]})
    else:
        path.unlink()
    with featcache.open(cache) as opened:
        assert is_indexed(opened)
        assert opened.quarantined == wanted


# ------------------------------------------------------------ finding


Word = st.sampled_from([0, 1, 2, 2**64 - 1]) | st.integers(0, 2**64 - 1)


def made(path: Path, digests: np.ndarray) -> index.ShardIndex:
    """The index of one shard with these digests."""
    order = index_build.ascending_order(path, digests)
    first, crcs = index_build.block_facts(digests, order)
    one, none = np.array([len(digests)]), np.zeros(1, np.int64)
    table = Table(
        one, none, none, none, first, np.zeros(1, np.uint32), crcs, np.zeros((1, 16), "u1")
    )
    facts = Facts("0", "0", len(digests), 1, "0", {})
    built = BuiltIndex(facts, table, digests, order, 0)
    path.write_bytes(b"".join(built.pieces()))
    header = len(index_file.pack_header(facts, table)) - 8
    return index.ShardIndex(path, facts, table, Layout(facts, header))


@given(
    pairs=st.lists(st.tuples(Word, Word), max_size=40, unique=True),
    others=st.lists(st.tuples(Word, Word), max_size=10),
    block=st.sampled_from([1, 2, 3, 7, 1024]),
)
def test_found_as_a_dictionary_finds(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[int, int]],
    others: list[tuple[int, int]],
    block: int,
) -> None:
    """Also where digests share their first word, and where blocks are short."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (index, index_build, index_file):
            patch.setattr(module, "BLOCK", block)
        path = tmp_path_factory.getbasetemp() / "found.safetensors"
        known = {pair: row for row, pair in enumerate(pairs)}
        found = made(path, np.array(pairs, np.uint64).reshape(-1, 2))
        sought = [*pairs[::-1], *others, *pairs[:3]]
        got = found.find(np.array(sought, np.uint64).reshape(-1, 2))
        assert got.tolist() == [known.get(pair, -1) for pair in sought]
        assert load_file(path)["key_row"].tolist() == [known[pair] for pair in sorted(pairs)]


def test_two_rows_of_one_key_have_no_index(tmp_path: Path) -> None:
    digests = np.array([[3, 1], [3, 2], [3, 1]], np.uint64)
    with pytest.raises(UserError, match="rows 0 and 2 have the same key"):
        index_build.ascending_order(tmp_path, digests)


# ------------------------------------------------------------ freshness


def tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let notes be given of few shards too."""
    monkeypatch.setattr(index, "INDEXED_FROM", 1)
    monkeypatch.setattr("featcache.storage.part.INDEXED_FROM", 1)


def later(path: Path) -> None:
    """The clock of a folder may not have ticked since."""
    now = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(now, now))


def add_lease(cache: Path) -> None:
    (cache / "shards/000000.lease").write_text("x")
    later(cache / "shards")


def replace_record(cache: Path) -> None:
    path = cache / "shards/000001.json"
    json_file.write_json(path, json_file.read_json(path))
    later(cache / "shards")


def change_manifest(cache: Path) -> None:
    about = manifest.read(cache)
    about["provenance"]["source"] = "elsewhere"
    json_file.write_json(cache / manifest.NAME, about)


def cut(cache: Path) -> None:
    path = cache / NAME
    stamp = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(stamp, stamp))


def flip_table(cache: Path) -> None:
    path = cache / NAME
    stamp = path.stat().st_mtime_ns
    flip(path, path.stat().st_size - 1)
    os.utime(path, ns=(stamp, stamp))


def as_folder(cache: Path) -> None:
    (cache / NAME).unlink()
    (cache / NAME).mkdir()
    os.utime(cache / NAME, ns=(0, (cache / "shards").stat().st_mtime_ns))


def as_pipe(cache: Path) -> None:
    (cache / NAME).unlink()
    os.mkfifo(cache / NAME)
    os.utime(cache / NAME, ns=(0, (cache / "shards").stat().st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (add_lease, "it is stale: shards changed since"),
        (replace_record, "it is stale: shards changed since"),
        (change_manifest, "it is stale: manifest.json is another"),
        (cut, "it is damaged: it has"),
        (flip_table, "it is damaged: its checksum differs"),
        (as_folder, "it cannot be read: it is no regular file"),
        (as_pipe, "it cannot be read: it is no regular file"),
    ],
)
def test_what_is_stale_or_damaged_is_passed_over_with_a_note(
    cache: Path,
    plain: Path,
    change: Callable[[Path], None],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tell(monkeypatch)
    change(cache)
    with caplog.at_level(logging.WARNING), featcache.open(cache) as opened:
        assert opened._base.index is None
        with featcache.open(plain) as without:
            assert list(opened.keys) == list(without.keys)
    (note,) = [text for text in caplog.messages if str(cache / NAME) in text]
    assert why in note
    assert f"run `featcache index {cache}`" in note


def test_a_cache_of_few_shards_is_told_nothing(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_lease(cache)
    with caplog.at_level(logging.WARNING), featcache.open(cache):
        pass
    assert not caplog.messages


def test_a_copy_that_keeps_times_keeps_a_fresh_index(cache: Path, tmp_path: Path) -> None:
    with featcache.open(copy_tree(cache, tmp_path / "copy")) as opened:
        assert is_indexed(opened)


def test_shards_that_change_meanwhile_give_no_index(plain: Path, tmp_path: Path) -> None:
    out = copy_tree(plain, tmp_path / "c")

    def progress(done: int, total: int) -> None:
        if done == 3:
            add_lease(out)

    with pytest.raises(index_build.ShardsChangedError, match="changed while they were read"):
        index_build.write(out, progress)
    assert not (out / NAME).exists()


# ------------------------------------------------------------ an index that lies


def forge(cache: Path, **changes: Any) -> None:
    """Write an index with right checksums, the right time, and wrong numbers."""
    built = index_build.build(cache)
    facts = {key: changes.pop(key) for key in list(changes) if hasattr(built.facts, key)}
    whole = {key: changes.pop(key) for key in ("digests", "order") if key in changes}
    built = replace(built, facts=replace(built.facts, **facts), **whole)
    if whole:
        first, crcs = index_build.block_facts(built.digests, built.order)
        changes |= {"block_first": first, "block_crc32c": crcs}
    built = replace(built, table=replace(built.table, **changes))
    (cache / NAME).write_bytes(b"".join(built.pieces()))
    os.utime(cache / NAME, ns=(0, (cache / "shards").stat().st_mtime_ns))


def true(cache: Path, name: str) -> np.ndarray:
    return np.array(getattr(index_build.build(cache).table, name))


def swapped(values: np.ndarray) -> np.ndarray:
    """The first two that differ, exchanged."""
    at = int(np.flatnonzero(values != values[0])[0])
    values = values.copy()
    values[[0, at]] = values[[at, 0]]
    return values


def other(values: np.ndarray) -> np.ndarray:
    return values + np.ones_like(values)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shard_bytes", other),
        ("shard_record_crc32c", other),
        ("shard_keys_digest", other),
    ],
)
def test_a_record_that_the_index_does_not_agree_with_is_one_line(
    shared: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    forge(shared, **{name: change(true(shared, name))})
    lies = rf"index {shared / NAME} does not agree.*run `featcache index {shared}`"
    if name == "shard_keys_digest":  # which those of the addition are compared with
        with pytest.raises(UserError, match=lies):
            featcache.open(shared)
        return
    with featcache.open(shared) as opened:
        assert is_indexed(opened)
        for ask in (lambda: opened.read([0]), lambda: opened.keys[0], lambda: opened.records[1]):
            with pytest.raises(UserError, match=lies):
                ask()


def refused(cache: Path, why: str) -> None:
    """The index is damaged, and every row is read without it."""
    found = index.look(cache, manifest.read(cache))
    assert isinstance(found, index.Unused)
    assert found.is_damaged
    assert why in found.why
    with featcache.open(cache) as opened:
        assert opened._base.index is None
        assert len(opened.read(range(len(opened)))["features"]) == len(opened)


BIG = np.iinfo(np.int64).max
HUGE = np.full(7, 2**62)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shard_rows": HUGE}, "other rows than the manifest"),
        ({"shard_rows": -HUGE}, "other rows than the manifest"),
        ({"shard_rows": np.zeros(7, np.int64)}, "other rows than the manifest"),
        ({"shard_quarantined": np.full(7, -1)}, "other rows than the manifest"),
        ({"shard_bytes": np.full(7, BIG)}, "sizes that no files have"),
        ({"shard_bytes": np.full(7, -1)}, "sizes that no files have"),
        ({"shard_compressed_bytes": np.full(7, 2**60)}, "sizes that no files have"),
        ({"statistics": {"features": {"min": "x"}}}, "statistics"),
        ({"statistics": []}, "statistics"),
    ],
)
def test_forged_numbers_are_not_used(shared: Path, changes: dict[str, Any], why: str) -> None:
    forge(shared, **changes)
    refused(shared, why)


def test_rows_that_are_not_those_of_the_digests_are_not_used(shared: Path) -> None:
    built = index_build.build(shared)
    rows = built.table.shard_rows.copy()
    rows[0], out = 0, built.table.shard_quarantined.copy()
    out[0] = 2  # as many as the manifest has
    forge(shared, shard_rows=rows, shard_quarantined=out)
    refused(shared, "its rows are not those of its shards")


def header_with(cache: Path, change: Callable[[bytes], bytes]) -> None:
    data = (cache / NAME).read_bytes()
    stamp = (cache / NAME).stat().st_mtime_ns
    size = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + size])
    (cache / NAME).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    os.utime(cache / NAME, ns=(stamp, stamp))


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b'"featcache_index":"1"', b'"featcache_index":"2"', "version '2'"),
        (b'"rows":"11"', b'"rows":"10"', "header"),
        (b'"rows":"11"', b'"rows":"-1"', "header"),
        (b'"rows":"11"', b'"rows":"9999999999999999"', "header"),
        (b'"shape":[11,2]', b'"shape":[12,2]', "header"),
        (b'"data_offsets":[0,', b'"data_offsets":[8,', "header"),
        (b'"U64"', b'"F64"', "header"),
        (b"{", b"[", "header"),
        (b"}", b"} ", "header"),
    ],
)
def test_another_header_is_not_used(shared: Path, old: bytes, new: bytes, why: str) -> None:
    header_with(shared, lambda header: header.replace(old, new, 1))
    refused(shared, why)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff" * 4096, b"\x02" + b"\0" * 7 + b"{}"])
def test_other_files_are_not_used(shared: Path, data: bytes) -> None:
    (shared / NAME).write_bytes(data)
    os.utime(shared / NAME, ns=(0, (shared / "shards").stat().st_mtime_ns))
    refused(shared, "")


def flip_digest(cache: Path) -> None:
    size = int.from_bytes((cache / NAME).read_bytes()[:8], "little")
    stamp = (cache / NAME).stat().st_mtime_ns
    flip(cache / NAME, 8 + size + 3)
    os.utime(cache / NAME, ns=(stamp, stamp))


def unsorted(cache: Path) -> None:
    forge(cache, order=np.arange(11)[::-1].copy())


def too_large_rows(cache: Path) -> None:
    built = index_build.build(cache)
    digests = np.concatenate([built.digests, built.digests])
    order = built.order + 11
    first, crcs = index_build.block_facts(digests, order)
    # rows are counted from 11: as long as those of the cache, and none of them
    built = replace(built, digests=digests, order=order)
    built = replace(built, table=replace(built.table, block_first=first, block_crc32c=crcs))
    (cache / NAME).write_bytes(b"".join(built.pieces()))
    os.utime(cache / NAME, ns=(0, (cache / "shards").stat().st_mtime_ns))


@pytest.mark.parametrize("change", [flip_digest, unsorted, too_large_rows])
def test_keys_are_found_without_a_block_that_is_damaged(
    shared: Path, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    change(shared)
    with featcache.open(shared) as opened, caplog.at_level(logging.WARNING):
        assert is_indexed(opened)
        keys = list(opened.keys)
        assert opened.keys.find([*keys[::-1], "x"]).tolist() == [*range(11)[::-1], -1]
        assert opened.keys.find(keys[2:3]).tolist() == [2]
    (note,) = caplog.messages
    assert "all keys are read" in note


def test_rows_of_other_keys_are_refused(shared: Path) -> None:
    digests = np.roll(index_build.build(shared).digests, 1, 0)
    forge(shared, digests=digests, order=index_build.ascending_order(shared, digests))
    with featcache.open(shared) as opened:
        keys = list(opened.keys)
        with pytest.raises(UserError, match=r"rows of other keys.*run `featcache index"):
            opened.keys.find(keys)


def test_a_missing_or_short_file_is_told_when_its_shard_is_read(cache: Path) -> None:
    (cache / "shards/000006.json").unlink()
    later(cache / "shards")
    os.utime(cache / NAME, ns=(0, (cache / "shards").stat().st_mtime_ns))
    path = next((cache / "shards/000000.zarr/features").glob("c.*"))
    path.write_bytes(path.read_bytes()[:-1])
    with featcache.open(cache) as opened:
        with pytest.raises(UserError, match=r"000006.json' is missing"):
            opened.read([10])
        with pytest.raises(UserError, match=rf"{path}: .* bytes, .* recorded"):
            opened.read([0])
        assert opened.read([3])["features"].shape[0] == 1


def test_partial_looks_at_every_shard(cache: Path) -> None:
    shutil.rmtree(cache / "shards/000002.zarr")
    os.utime(cache / NAME, ns=(0, (cache / "shards").stat().st_mtime_ns))
    with featcache.Cache(cache, partial=True) as opened:
        assert list(opened.absent) == ["000002"]


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_gives_other_rows(shared: Path, plain: Path, data: st.DataObject) -> None:
    index_build.write(shared)
    size = (shared / NAME).stat().st_size
    flip(shared / NAME, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
    os.utime(shared / NAME, ns=(0, (shared / "shards").stat().st_mtime_ns))
    with featcache.open(shared) as opened, featcache.open(plain) as without:
        keys = list(without.keys)
        assert opened.keys.find(keys).tolist() == list(range(len(without)))
        assert opened.keys.find(["x"]).tolist() == [-1]
        assert list(opened.keys) == keys
        assert opened.bytes == without.bytes


# ------------------------------------------------------------ processes and threads


def read_all(cache: featcache.Cache) -> tuple[list[int], float]:
    keys = list(cache.keys)
    total = cache.read(range(len(cache)))["features"].astype(np.float64).sum()
    return cache.keys.find(keys).tolist(), float(total)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_other_processes(shared: Path, method: str) -> None:
    with featcache.open(shared) as opened:
        wanted = read_all(opened)
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(read_all, (opened,)) == wanted
        again = pickle.loads(pickle.dumps(opened))
        assert is_indexed(again)
        assert read_all(again) == wanted
        again.close()


def test_in_several_threads(shared: Path) -> None:
    with featcache.open(shared) as opened, featcache.open(shared) as other_cache:
        wanted, found = read_all(other_cache), []
        threads = [
            threading.Thread(target=lambda: found.append(read_all(opened))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [wanted] * 6


def test_an_index_that_is_made_anew_meanwhile_serves_on(shared: Path) -> None:
    with featcache.open(shared) as opened:
        keys = list(opened.keys)
        index_build.write(shared)
        assert opened.keys.find(keys).tolist() == list(range(11))
        (shared / NAME).unlink()
        assert opened.keys.find(keys).tolist() == list(range(11))


# ------------------------------------------------------------ writing


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches of seven shards are large."""
    monkeypatch.setattr(index_build, "INDEXED_FROM", 7)
    return None


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_an_extraction_of_many_shards_ends_with_an_index(pictures: Path, tmp_path: Path) -> None:
    plan = make_plan(pictures, rows_per_shard=2)
    out = tmp_path / "c"
    extract.run(plan, out, batch_size=4, share=(0, 2))
    assert not (out / NAME).exists()  # half of it is still to come
    extract.run(plan, out, batch_size=4)
    with featcache.open(out) as opened:
        assert is_indexed(opened)
    before = (out / NAME).stat().st_ino
    extract.run(plan, out, batch_size=4)
    assert (out / NAME).stat().st_ino == before


def test_an_extraction_of_few_shards_renews_an_index_that_is_there(
    cache: Path, pictures: Path
) -> None:
    add_lease(cache)
    (cache / "shards/000000.lease").unlink()
    extract.run(make_plan(pictures, rows_per_shard=2, views=2), cache, batch_size=4)
    with featcache.open(cache) as opened:
        assert is_indexed(opened)


@pytest.mark.usefixtures("small")
def test_a_disk_that_takes_no_index_takes_nothing_else_away(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = copy_tree(plain, tmp_path / "c")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "utime", full)
    assert not index_build.update(out)
    assert "no index was written: " in caplog.text
    assert [path.name for path in out.iterdir() if "index" in path.name] == []
