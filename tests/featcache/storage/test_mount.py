"""A cache in a real S3 server reads as the same cache on disk does, and is copied both ways."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import ObjectStore

import featcache
from featcache.extraction import extract
from featcache.storage import files, object_names, stage
from featcache.storage.mounted import Mount
from tests import faulty_proxy
from tests.conftest import SYNTHETIC, Ran, files_below, make_plan
from tests.s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_admin")]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of rows that were fetched, by each request."""
    found: list[int] = []
    plain = Mount._fetched

    def count(*args: Any) -> list[Any]:
        data = plain(*args)
        found.append(sum(map(len, data)))
        return data

    monkeypatch.setattr(Mount, "_fetched", count)
    return found


def put(bucket: S3Store, folder: Path, prefix: str) -> None:
    for name, data in files_below(folder).items():
        obstore.put(bucket, f"{prefix}/{name}", data)


def objects(bucket: S3Store, prefix: str) -> dict[str, bytes]:
    names = [each["path"] for page in obstore.list(bucket, prefix) for each in page]
    return {
        name.removeprefix(f"{prefix}/"): bytes(obstore.get(bucket, name).bytes()) for name in names
    }


@pytest.mark.parametrize("name", ["zarr", "webdataset"])
def test_every_row_is_that_of_the_cache_on_disk(
    photos: Path, tmp_path: Path, bucket: S3Store, name: str
) -> None:
    extract.run(make_plan(photos, store=name), tmp_path / "here", batch_size=4)
    put(bucket, tmp_path / "here", f"read/{name}")
    here = featcache.open(tmp_path / "here")
    there = featcache.open(f"s3://{BUCKET}/read/{name}")
    assert list(there.keys) == list(here.keys)
    rows = np.random.default_rng(0).permutation(len(here))
    for view in range(here.views):
        for field in here.fields:
            found, wanted = (each.read(rows, view, (field,))[field] for each in (there, here))
            np.testing.assert_array_equal(found, wanted)
    one, other = (each.read(rows[:3], 1, levels=[3], tokens=2) for each in (there, here))
    np.testing.assert_array_equal(one["features"], other["features"])
    again = pickle.loads(pickle.dumps(there))
    np.testing.assert_array_equal(again.read([4], 2)["features"], here.read([4], 2)["features"])
    assert not list((tmp_path / "own").rglob("*features/c*"))  # rows stay where they are


def test_a_flipped_bit_in_the_bucket_is_told(photos: Path, tmp_path: Path, bucket: S3Store) -> None:
    extract.run(make_plan(photos), tmp_path / "here", batch_size=4)
    put(bucket, tmp_path / "here", "flip")
    name = "shards/000001.zarr/features/c.0.1.0.0.0"
    data = bytearray((tmp_path / "here" / name).read_bytes())
    data[100] ^= 1
    obstore.put(bucket, f"flip/{name}", bytes(data))
    cache = featcache.open(f"s3://{BUCKET}/flip")
    cache.read(np.arange(5), 1)
    with pytest.raises(featcache.UserError, match=rf"s3://{BUCKET}/flip/{name}"):
        cache.read(np.arange(5, 10), 1)


def test_the_commands(
    photos: Path, tmp_path: Path, bucket: S3Store, featcache_command: Callable[..., Ran]
) -> None:
    extract.run(make_plan(photos), tmp_path / "here", batch_size=4)
    url = f"s3://{BUCKET}/copied"
    ran = featcache_command("copy", tmp_path / "here", url)
    assert (ran.status, ran.err.count("Traceback")) == (0, 0), ran.err
    assert f"{url}: 11 pictures x 3 views" in ran.out
    assert objects(bucket, "copied") == files_below(tmp_path / "here")
    ran = featcache_command("copy", tmp_path / "here", url)
    assert "was complete already" in ran.out
    ran = featcache_command("info", url)
    assert ran.status == 0, ran.err
    assert str(tmp_path / "own") not in ran.out
    ran = featcache_command("verify", url)
    assert (ran.status, "0 problems" in ran.out) == (0, True), ran.err
    ran = featcache_command("copy", url, tmp_path / "back")
    assert ran.status == 0, ran.err
    assert files_below(tmp_path / "back") == files_below(tmp_path / "here")
    ran = featcache_command("copy", url, tmp_path / "part", "--views", 1, "--levels", "last:1")
    assert ran.status == 0, ran.err
    wanted = featcache.open(tmp_path / "here").read(range(11), 0, levels=[3])["features"]
    found = featcache.open(tmp_path / "part").read(range(11), 0)["features"]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("manifest.json", "describes"),
        ("parts/dino-1/shards/000003.json", "describes"),
        ("clip.safetensors", "describes"),
        ("shards/000003.zarr/features/c.0.0", "shard"),
        ("parts/dino/shards/000003.webdataset/v0.tar", "shard"),
        *((name, "") for name in (
            "../manifest.json", "parts/../manifest.json", "parts/a/b/manifest.json",
            "shards/../../x.json", "shards/a.zarr/../../x", "/etc/passwd", "shards/x.lease",
            "shards/.x.json.tmp", "notes.txt", "shards/a\nb.json", "C:/manifest.json", "",
        )),
    ],
)  # fmt: skip
def test_names_of_a_listing(name: str, kind: str) -> None:
    assert object_names.describes(name) == (kind == "describes")
    assert object_names.is_of_shard(name) == (kind == "shard")


EXTRACT = ("extract", "--teacher", SYNTHETIC, "--size", 28, "--views", 3, "--levels", "1,3")
EXTRACT += ("--rows-per-shard", 5, "--batch-size", 4)


def test_an_extraction_to_a_bucket_is_one_to_a_disk(
    photos: Path, tmp_path: Path, bucket: S3Store, featcache_command: Callable[..., Ran]
) -> None:
    url = f"s3://{BUCKET}/extracted"
    words = (*EXTRACT, "--images", photos, "--out")
    ran = featcache_command(*words, tmp_path / "here")
    assert ran.status == 0, ran.err
    ran = featcache_command(*words, url)
    assert ran.status == 0, ran.err
    assert url in ran.out
    assert str(tmp_path / "own") not in ran.out + ran.err
    assert objects(bucket, "extracted") == files_below(tmp_path / "here")
    assert featcache_command(*words, url).status == 0
    assert objects(bucket, "extracted") == files_below(tmp_path / "here")


def test_what_was_fetched_ahead_is_not_fetched_again(
    photos: Path, tmp_path: Path, bucket: S3Store, fetched: list[int]
) -> None:
    extract.run(make_plan(photos), tmp_path / "here", batch_size=4)
    put(bucket, tmp_path / "here", "staged")
    here, there = featcache.open(tmp_path / "here"), featcache.open(f"s3://{BUCKET}/staged")
    place: Any = files.files_of(there.path)
    row_bytes = here.arrays["features"].item_bytes
    place.stage = stage.Stage(tmp_path / "stage", 1 << 20)
    assert there.read_ahead([0, 7, 2], [0, 1, 2])
    assert sum(fetched) == 3 * row_bytes
    place.stage.limit = place.stage.bytes + 2 * row_bytes
    assert not there.read_ahead([3, 4, 5], 0)  # there is room for two of these
    assert sum(fetched) == 3 * row_bytes
    found = there.read([7, 0, 2], [1, 0, 2])["features"]
    np.testing.assert_array_equal(found, here.read([7, 0, 2], [1, 0, 2])["features"])
    assert sum(fetched) == 3 * row_bytes
    assert there.read_ahead([3, 4, 5], 0)
    assert sum(fetched) == 6 * row_bytes
    rows, views = [5, 3, 4, 9], [0, 0, 0, 1]  # the last was never asked for
    found = there.read(rows, views)["features"]
    np.testing.assert_array_equal(found, here.read(rows, views)["features"])
    assert sum(fetched) == 7 * row_bytes
    held = sum(path.stat().st_size for path in (tmp_path / "stage").iterdir())
    assert held == place.stage.bytes <= place.stage.limit


def test_what_is_broken_on_a_stage_is_fetched_again(
    photos: Path, tmp_path: Path, bucket: S3Store, fetched: list[int]
) -> None:
    """A machine that lost power may keep a file's length and not its bytes."""
    extract.run(make_plan(photos), tmp_path / "here", batch_size=4)
    put(bucket, tmp_path / "here", "power")
    here, there = featcache.open(tmp_path / "here"), featcache.open(f"s3://{BUCKET}/power")
    place: Any = files.files_of(there.path)
    place.set_stage(tmp_path / "stage", 1 << 20, 1)
    assert there.read_ahead([0, 7, 2], [0, 1, 2])
    for path in (tmp_path / "stage").glob("*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    fetched.clear()
    found = there.read([7, 0, 2], [1, 0, 2])["features"]
    np.testing.assert_array_equal(found, here.read([7, 0, 2], [1, 0, 2])["features"])
    assert sum(fetched) == 3 * here.arrays["features"].item_bytes
    assert not list((tmp_path / "stage").glob("*.data"))


def test_pushed_and_pulled(
    photos: Path, tmp_path: Path, bucket: S3Store, featcache_command: Callable[..., Ran]
) -> None:
    wide = "synthetic:levels=5,tokens=16,width=8,size=28"
    plan = make_plan(photos, wide, levels=(2, 3, 5), rows_per_shard=4)
    extract.run(plan, tmp_path / "here", batch_size=4)
    url = f"s3://{BUCKET}/pushed/my wide"
    assert featcache_command("push", tmp_path / "here", url).status == 0
    there = objects(bucket, "pushed/my wide")
    card = there.pop("README.md").decode()
    assert there == files_below(tmp_path / "here")
    assert f"    featcache pull '{url}'\n" in card
    train = f"    student train --recipe fd --cache '{url}' --images train/\n"
    assert train in card  # mralign reads five levels, and three are stored
    assert f"from_url('{url}')" in card
    assert "licence of the weights: apache-2.0" in card
    group = zarr.open_group(ObjectStore(bucket), path="pushed/my wide/shards/000001.zarr", mode="r")
    found = featcache.open(tmp_path / "here").read(range(4, 8), 1)["features"]
    np.testing.assert_array_equal(group["features"][:, 1], found)
    ran = featcache_command("pull", url)
    assert ran.status == 0, ran.err
    assert files_below(tmp_path / "home/my wide") == files_below(tmp_path / "here")
    for i, part in enumerate((("--levels", "last:1"), ("--views", 2), ("--keep", 5))):
        assert featcache_command("pull", url, tmp_path / f"pulled-{i}", *part).status == 0
        local = featcache_command(
            "derive",
            tmp_path / "here",
            tmp_path / f"derived-{i}",
            *part,
            *(("--tokens", "ranked") if "--keep" in part else ()),
        )
        assert local.status == 0, local.err
        assert (
            files_below(tmp_path / f"pulled-{i}").keys()
            == files_below(tmp_path / f"derived-{i}").keys()
        )
        one, other = (featcache.open(tmp_path / f"{how}-{i}") for how in ("pulled", "derived"))
        np.testing.assert_array_equal(
            one.read(range(11), 1)["features"], other.read(range(11), 1)["features"]
        )


@pytest.mark.parametrize("command", ["push", "pull"])
def test_what_is_no_url_is_one_line(
    tmp_path: Path, command: str, featcache_command: Callable[..., Ran]
) -> None:
    given = {"push": (tmp_path, tmp_path / "b"), "pull": (tmp_path / "b",)}[command]
    ran = featcache_command(command, *given)
    assert ran.status == 2
    assert "names no place in an object store" in ran.error


@pytest.mark.parametrize("name", ["zarr", "webdataset"])
def test_what_is_damaged_in_a_bucket_is_named_and_repaired(
    photos: Path, tmp_path: Path, bucket: S3Store, name: str,
    featcache_command: Callable[..., Ran],
) -> None:  # fmt: skip
    here, prefix = tmp_path / "here", f"damaged/{name}"
    url = f"s3://{BUCKET}/{prefix}"
    assert (
        featcache_command(*EXTRACT, "--images", photos, "--store", name, "--out", here).status == 0
    )
    put(bucket, here, prefix)
    whole = files_below(here)
    big = max(whole, key=lambda each: len(whole[each]) if "shards/000001." in each else 0)
    obstore.put(bucket, f"{prefix}/{big}", whole[big][:-1] + bytes([whole[big][-1] ^ 1]))
    obstore.delete(bucket, f"{prefix}/manifest.json")
    obstore.delete(bucket, f"{prefix}/shards/000002.json")
    ran = featcache_command("verify", url)
    assert (ran.status, "manifest.json" in ran.err) == (1, True)
    assert f"featcache repair {url}`" in ran.err
    ran = featcache_command("repair", url, "--images", photos)
    assert ran.status == 0, ran.err
    assert f"made again {url}/shards/000001.json" in ran.out
    assert objects(bucket, prefix) == whole
    ran = featcache_command("repair", url, "--images", photos)
    assert "nothing to fix" in ran.out
    assert not list((tmp_path / "own").rglob("*features/c.*"))  # brought, and dropped


def test_a_list_that_is_behind_makes_no_wrong_number(
    photos: Path, tmp_path: Path, bucket: S3Store, s3: S3Server,
    monkeypatch: pytest.MonkeyPatch, featcache_command: Callable[..., Ran],
) -> None:  # fmt: skip
    """First it lists nothing, as before the extraction; then all, as before a part was lost."""
    here, url = tmp_path / "here", f"s3://{BUCKET}/behind"
    words = (*EXTRACT, "--images", photos, "--out")
    assert featcache_command(*words, here).status == 0
    with faulty_proxy.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert "no cache at" in featcache_command("info", url).error
        put(bucket, here, "behind")
        proxy.faults = lambda method, path, number: "stale" if "list-type" in path else ""
        ran = featcache_command(*words, url)
        assert ran.status == 0, ran.err
        assert proxy.made["stale"]
        assert objects(bucket, "behind") == files_below(here)
        proxy.faults = lambda method, path, number: ""
        proxy.lists.clear()
        assert featcache_command("info", url).status == 0
        for name in objects(bucket, "behind"):
            if "000001" in name:
                obstore.delete(bucket, f"behind/{name}")
        proxy.faults = lambda method, path, number: "stale" if "list-type" in path else ""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        cache = featcache.open(url)
        assert not cache.complete
        found = cache.read(range(len(cache)), 1)["features"]
        kept = [0, 1, 2, 3, 4, 10]
        np.testing.assert_array_equal(found, featcache.open(here).read(kept, 1)["features"])


def test_a_place_of_others_is_not_written_to(
    photos: Path, bucket: S3Store, featcache_command: Callable[..., Ran]
) -> None:
    obstore.put(bucket, "pictures/a.jpg", b"somebody's")
    ran = featcache_command(*EXTRACT, "--images", photos, "--out", f"s3://{BUCKET}/pictures")
    assert f"'s3://{BUCKET}/pictures' exists and is no cache" in ran.error
    assert list(objects(bucket, "pictures")) == ["a.jpg"]


def test_a_disk_without_room_for_a_shard_is_told_before(
    photos: Path, bucket: S3Store, featcache_command: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("featcache.extraction.target_folder.free_bytes", lambda out: 60 << 20)
    ran = featcache_command(*EXTRACT, "--images", photos, "--out", f"s3://{BUCKET}/no-room")
    assert (ran.status, "a shard is made on this machine" in ran.error) == (1, True)
    assert "XDG_CACHE_HOME" in ran.error
    assert objects(bucket, "no-room") == {}
