"""`featcache index` makes indices, and the commands that look after caches know them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import featcache
from featcache.extraction import extract
from featcache.storage import index, index_build
from featcache.storage.index_file import NAME
from tests import student_fixtures as fx
from tests.conftest import copy_tree, files_below, flip, make_plan


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eleven rows in seven shards, two pictures in quarantine."""
    out = tmp_path_factory.mktemp("plain") / "cache"
    extract.run(make_plan(pictures, rows_per_shard=2, views=1), out, batch_size=4)
    return out


@pytest.fixture
def cache(plain: Path, tmp_path: Path) -> Path:
    out = copy_tree(plain, tmp_path / "home" / "cache")
    fx.good(fx.feat("index", str(out)))
    return out


def is_fresh(cache: Path) -> bool:
    with featcache.open(cache) as opened:
        return opened._base.index is not None


def stamp_as_shards(cache: Path) -> None:
    os.utime(cache / NAME, ns=(0, (cache / "shards").stat().st_mtime_ns))


def lie(cache: Path) -> None:
    """An index of the right form and time: one shard is said to be a byte larger."""
    built = index_build.build(cache)
    sizes = built.table.shard_bytes + np.eye(1, 7, dtype=np.int64)[0]
    built = replace(built, table=replace(built.table, shard_bytes=sizes))
    (cache / NAME).write_bytes(b"".join(built.pieces()))
    stamp_as_shards(cache)


def test_it_says_what_it_made(cache: Path) -> None:
    ran = fx.good(fx.feat("index", str(cache), "--json"))
    (made,) = json.loads(ran.out)["indices"]
    assert (made["rows"], made["shards"]) == (11, 7)
    assert made["bytes"] == (cache / NAME).stat().st_size
    ran = fx.good(fx.feat("index", str(cache)))
    assert f"{cache / NAME}: 11 rows, 7 shards, " in ran.out
    assert is_fresh(cache)


def test_ls_and_info_say_the_same_with_it(cache: Path) -> None:
    home = cache.parent
    commands = (("ls", "--json"), ("ls",), ("info", str(cache), "--json"), ("info", str(cache)))
    indexed = [fx.good(fx.feat(*words, home=home)).out for words in commands]
    (cache / NAME).unlink()
    assert [fx.good(fx.feat(*words, home=home)).out for words in commands] == indexed


def test_an_incomplete_cache_has_none(plain: Path, tmp_path: Path) -> None:
    out = copy_tree(plain, tmp_path / "c")
    (out / "shards/000003.json").unlink()
    ran = fx.feat("index", str(out))
    assert ran.status == 1
    assert "has no index until it is complete; unfinished: 6 of 7 shards" in ran.err
    assert ran.err.count("\n") == 1
    assert not (out / NAME).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_one_line(cache: Path) -> None:
    cache.chmod(0o555)
    ran = fx.feat("index", str(cache))
    cache.chmod(0o755)
    assert ran.status == 1
    assert "cannot be written: Permission denied; allow writing to" in ran.err


def test_a_disk_that_cannot_be_written_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    ran = fx.feat("index", str(cache))
    assert (ran.status, ran.err.count("\n")) == (1, 1)
    assert f"{str(cache / NAME)!r} cannot be written: Read-only file system; allow" in ran.err
    assert is_fresh(cache)  # that which was there


def test_a_folder_behind_a_link_is_left(cache: Path, tmp_path: Path) -> None:
    (cache / NAME).unlink()
    (cache / "shards").rename(tmp_path / "elsewhere")
    (cache / "shards").symlink_to(tmp_path / "elsewhere")
    ran = fx.feat("index", str(cache))
    assert (ran.status, ran.err.count("\n")) == (1, 1)
    assert "is a link to" in ran.err
    assert not (cache / NAME).exists()


def test_where_the_index_is_a_link_the_link_is_replaced(cache: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (cache / NAME).unlink()
    (cache / NAME).symlink_to(theirs)
    fx.good(fx.feat("index", str(cache)))
    assert theirs.read_text() == "theirs"
    assert not (cache / NAME).is_symlink()
    assert is_fresh(cache)


def test_verify_names_an_index_that_lies_and_repair_makes_it_anew(cache: Path) -> None:
    assert fx.good(fx.feat("verify", str(cache))).out.endswith("7 shards checked, 0 problems\n")
    wanted = (cache / NAME).read_bytes()
    for damage in (lie, lambda cache: flip(cache / NAME, len(wanted) - 1)):
        damage(cache)
        stamp_as_shards(cache)
        ran = fx.feat("verify", str(cache))
        assert ran.status == 1
        assert f"{cache / NAME}: " in ran.out
        assert f"`featcache repair {cache}` fixes it" in ran.err
        assert str(cache / NAME) in fx.good(fx.feat("repair", str(cache))).out
        assert (cache / NAME).read_bytes() == wanted
        assert is_fresh(cache)
        assert "nothing to fix" in fx.good(fx.feat("repair", str(cache))).out


def test_verify_only_notes_a_stale_index(cache: Path) -> None:
    os.utime(cache / NAME, ns=(0, 0))
    ran = fx.good(fx.feat("verify", str(cache)))
    assert f"note: {cache / NAME} is not used, it is stale" in ran.err
    assert f"run `featcache index {cache}`" in ran.err


def test_a_repair_of_a_shard_leaves_a_fresh_index(cache: Path, pictures: Path) -> None:
    wanted = (cache / NAME).read_bytes()
    (cache / "shards/000002.json").write_text("{}")
    ran = fx.good(fx.feat("repair", str(cache), "--images", str(pictures)))
    assert "000002.json" in ran.out
    assert (cache / NAME).read_bytes() == wanted
    assert is_fresh(cache)


@pytest.mark.slow
def test_copies_of_many_shards_have_an_index(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fx.good(fx.feat("copy", str(cache), str(tmp_path / "few")))
    assert not (tmp_path / "few" / NAME).exists()
    monkeypatch.setattr(index_build, "INDEXED_FROM", 7)
    fx.good(fx.feat("copy", str(cache), str(tmp_path / "many")))
    assert (tmp_path / "many" / NAME).read_bytes() == (cache / NAME).read_bytes()
    fx.good(fx.feat("copy", str(cache), str(tmp_path / "archive"), "--compress"))
    fx.good(fx.feat("convert", str(cache), str(tmp_path / "tars"), "--store", "webdataset"))
    fx.good(fx.feat("derive", str(cache), str(tmp_path / "small"), "--levels", "3"))
    with featcache.open(cache) as opened:
        keys, crops = list(opened.keys), opened.read(range(11), fields=("crop",))["crop"]
    for name in ("archive", "tars", "small"):
        assert is_fresh(tmp_path / name)
        with featcache.open(tmp_path / name) as opened:
            assert opened.keys.find(keys).tolist() == list(range(11))
            read = opened.read(range(11), fields=("crop", "features"))
            np.testing.assert_array_equal(read["crop"], crops)
            size, bytes_ = opened.compressed_bytes, opened.bytes
        (tmp_path / name / NAME).unlink()
        with featcache.open(tmp_path / name) as opened:
            assert (opened.compressed_bytes, opened.bytes) == (size, bytes_)


def test_it_belongs_to_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_HOME", str(cache.parent))
    left = cache / f".{NAME}.host-1-aa.tmp"
    fx.good(fx.feat("gc", "--yes", home=cache.parent))
    assert NAME in files_below(cache)
    assert not left.exists()
    fx.good(fx.feat("rm", str(cache), "--yes"))
    assert not cache.exists()


def test_a_training_joins_by_it(cache: Path, pictures: Path) -> None:
    from featcache.pictures.open_source import open_source
    from featcache.reading.join import join_by_key

    source = open_source(pictures)
    with featcache.open(cache) as opened:
        got = join_by_key(opened, source)
    (cache / NAME).unlink()
    with featcache.open(cache) as opened:
        wanted = join_by_key(opened, source)
    assert got[2] == wanted[2] == 2
    for one, other in zip(got[:2], wanted[:2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_large_cache_without_one_is_told_of_it(
    plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("featcache.storage.part.INDEXED_FROM", 7)
    index._note_once.cache_clear()
    featcache.open(plain).close()
    featcache.open(plain).close()
    (note,) = caplog.messages
    assert note.endswith(
        f"has 7 shards and no index: every record is read; run `featcache index {plain}`"
    )
