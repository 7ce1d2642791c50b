"""Commands that list, tidy, remove, add to and derive caches work in a real S3 server as on
disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import S3Store

import featcache
from featcache.maintenance import far_remove
from featcache.objects.url import parse
from featcache.storage import files
from featcache.storage.mount import mount, mount_at
from tests.conftest import Ran, files_below
from tests.s3_server import BUCKET, READER, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_admin")]

SYNTHETIC = "synthetic:levels=3,tokens=4,width=64"  # as codecs want it
Command = Callable[..., Ran]
EXTRACT = ("extract", "--teacher", SYNTHETIC, "--size", 28, "--rows-per-shard", 5)
OTHER = "elsewhere+0a1b2c3d4e5f-12-5x00ff00ff"  # a process of another machine


def url_of(prefix: str) -> str:
    return f"s3://{BUCKET}/{prefix}"


def names(bucket: S3Store, prefix: str) -> set[str]:
    found = [each["path"] for page in obstore.list(bucket, f"{prefix}/") for each in page]
    return {name.removeprefix(f"{prefix}/") for name in found}


def objects(bucket: S3Store, prefix: str) -> dict[str, bytes]:
    return {
        name: bytes(obstore.get(bucket, f"{prefix}/{name}").bytes())
        for name in names(bucket, prefix)
    }


@pytest.fixture
def here(photos: Path, tmp_path: Path, featcache_command: Command) -> Path:
    """A cache of eleven pictures in three shards."""
    ran = featcache_command(
        *EXTRACT, "--levels", "1,3", "--images", photos, "--out", tmp_path / "here"
    )
    assert ran.status == 0, ran.err
    return tmp_path / "here"


def upload(bucket: S3Store, folder: Path, prefix: str) -> None:
    for name, data in files_below(folder).items():
        obstore.put(bucket, f"{prefix}/{name}", data)


def good(ran: Ran) -> Ran:
    assert (ran.status, ran.err.count("Traceback")) == (0, 0), ran.err
    return ran


# ---------------------------------------------------------------- ls


def test_caches_are_listed(here: Path, bucket: S3Store, featcache_command: Command) -> None:
    for name in ("b", "a"):
        upload(bucket, here, f"list/{name}")
    obstore.put(bucket, "list/no-cache/x", b"")
    obstore.put(bucket, "list/file", b"")
    found = json.loads(good(featcache_command("ls", url_of("list"), "--json")).out)
    assert [each["path"] for each in found] == [url_of("list/a"), url_of("list/b")]
    assert [(each["pictures"], each["shards_complete"]) for each in found] == [(11, 3)] * 2
    (one,) = json.loads(good(featcache_command("ls", f"{url_of('list/a')}/", "--json")).out)
    assert one["path"] == url_of("list/a")
    shown = good(featcache_command("ls", url_of("list"))).out
    assert url_of("list/b") in shown
    assert "100 %" in shown
    nothing = good(featcache_command("ls", url_of("list/no-cache")))
    assert nothing.out.strip() == f"no caches at {url_of('list/no-cache')}, nor one level below"
    ran = featcache_command("ls", url_of("list"), "--costs")
    assert (ran.status, "leave out the URL" in ran.error) == (2, True)
    ran = featcache_command("ls", "caches")
    assert (ran.status, "names no place in an object store" in ran.error) == (2, True)


# ---------------------------------------------------------------- gc


def test_what_dead_writers_left_is_removed(
    here: Path, bucket: S3Store, featcache_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bucket, here, "tidy/cache")
    whole = names(bucket, "tidy/cache")
    orphans = {name for name in whole if name.startswith("shards/000001.zarr/")}
    obstore.delete(bucket, "tidy/cache/shards/000001.json")
    obstore.put(bucket, "tidy/cache/shards/000002.lease", f"{OTHER} 3".encode())
    young = good(featcache_command("gc", url_of("tidy"), "--dry-run"))
    assert young.out.strip() == f"nothing to remove at {url_of('tidy')}"  # less than half an hour
    monkeypatch.setattr(far_remove, "DEAD_S", -1.0)
    wanted = {f"{url_of('tidy/cache')}/{name}" for name in (*orphans, "shards/000002.lease")}
    dry = json.loads(good(featcache_command("gc", url_of("tidy"), "--dry-run", "--json")).out)
    assert (set(dry["leftovers"]), dry["removed"]) == (wanted, False)
    ran = featcache_command("gc", url_of("tidy"))
    assert (ran.status, "no terminal to ask at" in ran.error) == (2, True)
    assert len(names(bucket, "tidy/cache")) == len(whole)
    done = good(featcache_command("gc", url_of("tidy"), "--yes")).out
    assert done.count("removed s3://lab/tidy/cache/shards/") == len(wanted)
    assert names(bucket, "tidy/cache") == whole - orphans - {"shards/000001.json"}
    again = good(featcache_command("gc", url_of("tidy"), "--yes"))
    assert again.out.strip() == f"nothing to remove at {url_of('tidy')}"
    ran = featcache_command("gc", url_of("tidy"), "--unused", 3)
    assert (ran.status, "whose ledger knows" in ran.error) == (2, True)


def test_a_shard_that_somebody_works_on_is_left(here: Path, bucket: S3Store) -> None:
    upload(bucket, here, "held")
    obstore.delete(bucket, "held/shards/000001.json")
    obstore.put(bucket, "held/shards/000001.lease", f"{OTHER} 3".encode())
    folder = mount(parse(url_of("held")))
    place = mount_at(folder)
    old = {name: facts._replace(modified=0.0) for name, facts in place.objects.items()}
    place.objects = old
    assert far_remove.leftovers(folder) == {}
    place.leases = {}
    assert len(far_remove.leftovers(folder)) > 5


# ---------------------------------------------------------------- rm


def test_a_cache_is_removed_and_nothing_else(
    here: Path, bucket: S3Store, featcache_command: Command, tmp_path: Path
) -> None:
    good(featcache_command("push", here, url_of("gone/cache")))
    obstore.put(bucket, "gone/cache-2/x", b"a neighbour's")
    obstore.put(bucket, "gone/y", b"a neighbour's")
    ran = featcache_command("rm", url_of("gone/cache"))
    assert (ran.status, "no terminal to ask at" in ran.error) == (2, True)
    said = good(featcache_command("rm", url_of("gone/cache"), "--yes")).out
    assert f"removed {url_of('gone/cache')}: " in said
    assert names(bucket, "gone") == {"cache-2/x", "y"}
    assert not list((tmp_path / "own").rglob("manifest.json"))
    ran = featcache_command("rm", url_of("gone/cache"), "--yes")
    assert (ran.status, "holds no manifest.json" in ran.error) == (1, True)


@pytest.mark.parametrize(
    "case", ["stranger", "readme", "weights", "in a shard", "held", "forged", "no cache"]
)
def test_what_must_not_be_removed_is_left_whole(
    here: Path, bucket: S3Store, featcache_command: Command, case: str
) -> None:
    prefix = f"kept-{case.replace(' ', '-')}"
    upload(bucket, here, prefix)
    more = {
        "stranger": ("notes/mine.txt", b"mine"),
        "readme": ("README.md", b"# What I think of these"),
        "weights": ("model.safetensors", b"mine"),
        "in a shard": ("shards/000000.zarr/notes.txt", b"mine"),
        "held": ("shards/000001.lease", f"{OTHER} 3".encode()),
        "forged": ("manifest.json", b"{}"),
        "no cache": ("x", b""),
    }
    name, data = more[case]
    obstore.put(bucket, f"{prefix}/{name}", data)
    if case == "forged":
        obstore.put(bucket, f"{prefix}/shards/manifest.copy.json", data)
    if case == "no cache":
        obstore.delete(bucket, f"{prefix}/manifest.json")
    before = objects(bucket, prefix)
    ran = featcache_command("rm", url_of(prefix), "--yes")
    told = {
        "stranger": "featcache did not write: 'notes/mine.txt'",
        "readme": "featcache did not write: 'README.md'",
        "weights": "featcache did not write: 'model.safetensors'",
        "in a shard": "featcache did not write: 'shards/000000.zarr/notes.txt'",
        "held": "is being written: 1 shard is held, the first is 'shards/000001.lease'",
        "forged": "manifest.json",
        "no cache": "holds no manifest.json",
    }
    assert (ran.status, told[case] in ran.error) == (1, True), ran.error
    assert objects(bucket, prefix) == before


def test_a_card_is_written_over_and_nobody_elses_readme(
    here: Path, bucket: S3Store, featcache_command: Command
) -> None:
    good(featcache_command("push", here, url_of("card")))
    good(featcache_command("push", here, url_of("card")))
    obstore.put(bucket, "card/README.md", b"# Mine")
    ran = featcache_command("push", here, url_of("card"))
    assert (ran.status, "README.md was not written by featcache" in ran.error) == (1, True)
    assert objects(bucket, "card")["README.md"] == b"# Mine"


def test_leftovers_that_are_none_any_more_stay(
    here: Path, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard was finished, or taken up, between the list and the removal."""
    monkeypatch.setattr(far_remove, "DEAD_S", -1.0)
    upload(bucket, here, "late")
    for shard in ("000000", "000001"):
        obstore.delete(bucket, f"late/shards/{shard}.json")
    folder = mount(parse(url_of("late")))
    found = far_remove.leftovers(folder)
    assert {name.split("/")[1] for name in found} == {"000000.zarr", "000001.zarr"}
    monkeypatch.setattr(mount_at(folder), "refresh", lambda: None)  # the list is behind
    record = (here / "shards/000000.json").read_bytes()
    obstore.put(bucket, "late/shards/000000.json", record)
    obstore.put(bucket, "late/shards/000001.lease", f"{OTHER} 7".encode())
    far_remove.remove_leftovers(folder, found)
    left = names(bucket, "late")
    assert set(found) <= left
    obstore.delete(bucket, "late/shards/000001.lease")
    far_remove.remove_leftovers(folder, found)
    left = names(bucket, "late")
    assert {name.split("/")[1] for name in set(found) & left} == {"000000.zarr"}
    assert not any(name.endswith(".lease") for name in left)


def test_a_removal_that_may_not_be_done_is_one_line(
    here: Path, bucket: S3Store, featcache_command: Command, s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    upload(bucket, here, "theirs")
    for name, value in s3.variables(READER).items():
        monkeypatch.setenv(name, value)
    ran = featcache_command("rm", url_of("theirs"), "--yes")
    assert (ran.status, "cannot remove s3://lab/theirs/" in ran.error) == (1, True), ran.error
    assert len(names(bucket, "theirs")) == len(files_below(here))


# ---------------------------------------------------------------- what is written


def test_an_addition_to_a_bucket_is_one_on_disk(
    here: Path, photos: Path, bucket: S3Store, featcache_command: Command
) -> None:
    upload(bucket, here, "added")
    for levels, views in (("1,2,3", 1), ("1,3", 2)):
        more = (*EXTRACT, "--levels", levels, "--views", views, "--images", photos, "--add")
        good(featcache_command(*more, "--out", here))
        good(featcache_command(*more, "--out", url_of("added")))
    assert objects(bucket, "added") == files_below(here)
    one, other = featcache.open(here), featcache.open(url_of("added"))
    rows, views = np.arange(11), np.arange(11) % 2
    np.testing.assert_array_equal(
        other.read(rows, views, levels=[1, 3])["features"],
        one.read(rows, views, levels=[1, 3])["features"],
    )


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_derived_and_converted_caches_are_those_on_disk(
    here: Path, bucket: S3Store, featcache_command: Command, tmp_path: Path, store: str
) -> None:
    upload(bucket, here, f"source-{store}")
    source = url_of(f"source-{store}")
    wish = ("--codec", "q8", "--levels", "last:1")
    good(featcache_command("derive", here, tmp_path / "small", *wish))
    good(featcache_command("derive", source, url_of(f"small-{store}"), *wish))
    wanted, found = files_below(tmp_path / "small"), objects(bucket, f"small-{store}")
    assert sorted(found) == sorted(wanted)
    rows = {name for name in wanted if "/c." in name}
    assert {name: found[name] for name in rows} == {name: wanted[name] for name in rows}
    about = json.loads(found["manifest.json"])
    assert about["provenance"]["derived_from"] == source
    info = good(featcache_command("info", url_of(f"small-{store}"))).out
    assert f"featcache derive {source} {url_of(f'small-{store}')}" in " ".join(info.split())
    convert = ("--store", "webdataset") if store == "zarr" else ("--store", "zarr")
    if store == "webdataset":
        good(featcache_command("convert", here, tmp_path / "tars", "--store", store))
        upload(bucket, tmp_path / "tars", "tars")
        source, here = url_of("tars"), tmp_path / "tars"
    good(featcache_command("convert", here, tmp_path / "other", *convert))
    good(featcache_command("convert", source, url_of(f"other-{store}"), *convert))
    assert objects(bucket, f"other-{store}") == files_below(tmp_path / "other")


def test_a_derived_cache_is_repaired_from_the_parent_that_is_given(
    here: Path, bucket: S3Store, featcache_command: Command
) -> None:
    upload(bucket, here, "parent")
    good(featcache_command("derive", url_of("parent"), url_of("child"), "--codec", "q8"))
    whole = objects(bucket, "child")
    obstore.put(bucket, "child/shards/000001.zarr/features/c.0.0.0.0.0", b"broken")
    ran = featcache_command("repair", url_of("child"))
    assert (ran.status, "give it with --parent CACHE" in ran.error) == (1, True), ran.error
    good(featcache_command("repair", url_of("child"), "--parent", url_of("parent")))
    assert objects(bucket, "child") == whole


def test_rows_and_galleries_are_shown(
    here: Path, photos: Path, bucket: S3Store, featcache_command: Command, tmp_path: Path
) -> None:
    upload(bucket, here, "shown")
    key = featcache.open(here).keys[3]
    one = good(featcache_command("show", here, key)).out
    other = good(featcache_command("show", url_of("shown"), key)).out
    assert other.replace(url_of("shown"), str(here)) == one
    good(featcache_command("gallery", url_of("shown"), "--images", photos, "--out", tmp_path / "g"))
    assert (tmp_path / "g" / "index.html").is_file()
    assert str(tmp_path / "own") not in (tmp_path / "g" / "index.html").read_text()


def test_python_calls_take_urls(here: Path, photos: Path, bucket: S3Store) -> None:
    url = url_of("python")
    made = featcache.extract(
        teacher=SYNTHETIC, images=str(photos), size=28, levels=[1, 3], rows_per_shard=5, out=url
    )
    assert made.facts["cache"] == url
    assert made.cache is not None
    assert objects(bucket, "python") == files_below(here)
    for place in (url, made.cache):
        with featcache.open(place) as opened:
            assert files.address(opened.path) == url
            assert len(opened) == 11


# ---------------------------------------------------------------- devices


def test_the_process_of_another_device_writes_to_the_store(
    photos: Path, tmp_path: Path, bucket: S3Store, featcache_command: Command
) -> None:
    made = (*EXTRACT, "--levels", "1,3", "--images", photos, "--devices", "cpu,cpu")
    for out in (tmp_path / "here", url_of("devices")):
        good(featcache_command(*made, "--out", out))
    assert objects(bucket, "devices") == files_below(tmp_path / "here")
    lines = (tmp_path / "home" / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["counted"] for line in lines] == [2, 2]


# ---------------------------------------------------------------- index


def test_an_index_is_of_a_cache_on_disk(
    here: Path, bucket: S3Store, featcache_command: Command
) -> None:
    """One that was uploaded is no stranger's, and is not looked at."""
    good(featcache_command("index", here))
    upload(bucket, here, "indexed")
    ran = featcache_command("index", url_of("indexed"))
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert f"{url_of('indexed')} is in an object store" in ran.err
    with featcache.open(url_of("indexed")) as cache, featcache.open(here) as wanted:
        assert cache._parts[0].index is None
        assert wanted._parts[0].index is not None
        assert list(cache.keys) == list(wanted.keys)
    good(featcache_command("rm", url_of("indexed"), "--yes"))
    assert names(bucket, "indexed") == set()
