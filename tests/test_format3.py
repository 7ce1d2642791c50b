"""Caches that an earlier version wrote, in format 3, do all that those of format 4 do; they lie in
golden/format3.tar.xz, whose script says how they were made.

What is read of them is compared with their files by numpy alone: a file of theirs is plain rows and
four bytes.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr

import featcache
from featcache.extraction import extract
from featcache.maintenance import transfer, verify
from featcache.storage import json_file, manifest
from tests.student_fixtures import TEACHER, Ran, feat, good, losses, train

KINDS = ("zarr", "ranked", "webdataset")
GIVEN = ("--teacher", TEACHER, "--size", "32", "--views", "2", "--rows-per-shard", "6")
SPLIT = ("features", "feature_stats", "pixels", "prefix_crc")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of caches and pictures, to be read only."""
    folder = tmp_path_factory.mktemp("old")
    # the first versions of 3.11 know no filter, later ones ask for one
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(Path(__file__).parent / "golden/format3.tar.xz") as archive:
        archive.extractall(folder, **options)
    return folder / "format3"


@pytest.fixture
def copied(old: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(old, tmp_path / "format3"))


def images(old: Path) -> tuple[str, str]:
    return "--images", str(old / "pictures")


def command(old: Path, name: str, *args: object) -> Ran:
    return feat(name, *map(str, args), home=old / "home")


def shards_of(cache: Path) -> list[Path]:
    """The folders of shards of a cache and of what was added to it."""
    return sorted([*cache.glob("shards/*.zarr"), *cache.glob("parts/*/shards/*.zarr")])


def rows_of(shard: Path) -> dict[str, bytes]:
    """The rows of each file: the first n x item bytes, by what zarr.json says of the array."""
    out = {}
    for chunk in sorted(shard.glob("*/c.*")):
        meta = json.loads((chunk.parent / "zarr.json").read_text())
        if meta["data_type"] != "string":
            shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
            size = np.dtype(meta["data_type"]).itemsize * int(np.prod(shape))
            out[chunk.relative_to(shard).as_posix()] = chunk.read_bytes()[:size]
    return out


def files_below(cache: Path) -> dict[str, bytes]:
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


def assert_same_rows(here: Path, there: Path) -> None:
    """Every array of every shard but labels for other libraries, which format 3 lacks."""
    assert len(shards_of(here)) == len(shards_of(there)) > 0
    for one, other in zip(shards_of(here), shards_of(there), strict=True):
        assert one.relative_to(here) == other.relative_to(there)
        old, new = rows_of(one), rows_of(other)
        old["key_bytes/c.0"] = old.pop("key/c.0")
        assert new.keys() - old.keys() == {"level/c.0", "view/c.0"}
        for name, data in old.items():
            assert new[name] == data, (one, name)


# Sums of squares are rounded as a processor adds them up: a std that is made again elsewhere may
# have another last bit, and with it the checksums of its row.
LAST_BIT = 2e-7  # of a float32, relative
FOLLOWING = ("row_crc", "side_crc")


def assert_made_again(made: dict[str, bytes], old: dict[str, bytes]) -> None:
    """Rows that the teacher made again are the old ones, but for last bits of their statistics."""
    other = {name.split("/")[0] for name, data in old.items() if made[name] != data}
    assert other <= {"feature_stats", *FOLLOWING}
    for name in (name for name in old if name.startswith("feature_stats/")):
        np.testing.assert_allclose(
            np.frombuffer(made[name], "<f4"), np.frombuffer(old[name], "<f4"), rtol=LAST_BIT
        )
    assert "feature_stats" in other or not other


def without_digests(rows: dict[str, bytes], items: int) -> dict[str, bytes]:
    """The rows as they were before digests of files were kept: their column of `side_crc` follows
    those of area, attention, crop and the levels of feature_stats, by name."""
    sums = np.frombuffer(rows["side_crc/c.0.0.0"], "<u4").reshape(items, -1)
    names = {name.split("/")[0] for name in rows} - {
        "features",
        "row_crc",
        "prefix_crc",
        "side_crc",
    }
    names -= {"key", "key_bytes", "key_offsets", "level", "view"}
    levels = sums.shape[1] - len(names) + 1  # columns of feature_stats, one of each other array
    left = np.delete(sums, 3 + levels, axis=1).tobytes()
    kept = {name: data for name, data in rows.items() if not name.startswith("file_digest/")}
    return {**kept, "side_crc/c.0.0.0": left}


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {each.name: archive.extractfile(each) for each in archive.getmembers()}
        return {name: file.read() for name, file in files.items() if file is not None}


def assert_tar_made_again(made: bytes, old: bytes) -> None:
    """The same of a tar: names, sizes and order are those of the old one."""
    here, there = members(made), members(old)
    assert (len(made), list(here)) == (len(old), list(there))
    for name, data in there.items():
        if here[name] != data:
            assert name.endswith(".feature_stats.npy"), name
            one, other = (np.load(io.BytesIO(each)) for each in (here[name], data))
            np.testing.assert_allclose(one, other, rtol=LAST_BIT)


def assert_clean(cache: Path) -> None:
    assert verify.verify_cache(cache)[0] == []


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_and_verifies(old: Path, kind: str) -> None:
    assert manifest.read(old / kind)["format"] == 3
    with featcache.open(old / kind) as cache:
        assert (len(cache), cache.views, cache.complete) == (10, 2 if kind == "ranked" else 3, True)
        assert cache.levels == (2, 3, 4)
        assert [row["key"] for row in cache.quarantined] == ["bad"]
    assert_clean(old / kind)


def test_what_is_read_is_what_the_files_hold(old: Path) -> None:
    shards = sorted((old / "zarr/shards").glob("*.zarr"))
    raw = [(shard / "features/c.0.1.0.0.0").read_bytes() for shard in shards]
    rows = [len(data) // (2 * 17 * 24 * 2) for data in raw]
    expected = np.concatenate(
        [np.frombuffer(data[:-4], "<f2").reshape(-1, 2, 17, 24) for data in raw]
    )
    hashes = [(shard / "pixel_hash/c.0.0").read_bytes()[:-4] for shard in shards]
    with featcache.open(old / "zarr") as cache:
        assert [record["rows"] for record in cache.records] == rows
        got = cache.read(range(10), 1, ["features"], levels=[2, 4])["features"]
        np.testing.assert_array_equal(got, expected)
        seen = cache.read(range(10), 1, ["pixel_hash"])["pixel_hash"]
    views = np.concatenate([np.frombuffer(data, "<u8").reshape(-1, 2) for data in hashes])
    np.testing.assert_array_equal(seen, views[:, 1])
    assert seen.dtype == np.uint64


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_it_is_that_of_format_4(old: Path, tmp_path: Path, kind: str) -> None:
    transfer.convert(old / kind, tmp_path / "new", format=4)
    found = []
    for name, cache in (("old", old / kind), ("new", tmp_path / "new")):
        given = (*images(old), "--cache", str(cache), "--steps", "2", "--batch-size", "4")
        good(train("maskalign", tmp_path / f"run-{name}", *given))
        found.append(losses(tmp_path / f"run-{name}"))
    assert len(found[0]) == 2
    assert found[0] == found[1]


# ---------------------------------------------------------------- writing


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["zarr", "ranked"])
def test_format_4_has_the_same_rows(old: Path, tmp_path: Path, kind: str) -> None:
    """Whether it is converted, or extracted anew."""
    transfer.convert(old / kind, tmp_path / "new", format=4)
    assert_same_rows(old / kind, tmp_path / "new")
    assert_clean(tmp_path / "new")
    extra = {
        "zarr": ("--levels", "2,4"),
        "ranked": ("--levels", "2,3,4", "--pixels", "raw", "--tokens", "ranked", "--keep", "9"),
    }
    again = command(old, "extract", *GIVEN, *extra[kind], *images(old), "--out", tmp_path / "again")
    good(again)
    assert manifest.read(tmp_path / "again")["format"] == 4
    for shard in sorted((old / kind / "shards").glob("*.zarr")):
        rows = rows_of(tmp_path / "again/shards" / shard.name)
        here = rows_of(shard)
        here["key_bytes/c.0"] = here.pop("key/c.0")
        assert_made_again(without_digests(rows, len(here["flip/c.0.0"])), here)


def test_a_file_of_format_4_begins_with_one_of_format_3(old: Path, tmp_path: Path) -> None:
    """Of split arrays, but for the four bytes; all files of other arrays are the same."""
    transfer.convert(old / "ranked", tmp_path / "new", format=4)
    seen = set()
    for shard in shards_of(old / "ranked"):
        for chunk in shard.glob("*/c.*"):
            name = chunk.relative_to(old / "ranked")
            if name.parts[-2] == "key":
                continue
            here, there = chunk.read_bytes(), (tmp_path / "new" / name).read_bytes()
            assert there[: len(here) - 4] == here[:-4]
            assert (there == here) == (name.parts[-2] not in SPLIT)
            seen.add(name.parts[-2])
    assert set(SPLIT) < seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_converting_back_gives_the_same_bytes(old: Path, tmp_path: Path, kind: str) -> None:
    """But for zarr.json, which is of the version of Zarr, and the version of ours in manifests."""
    transfer.convert(old / kind, tmp_path / "new", format=4)
    transfer.convert(tmp_path / "new", tmp_path / "back", format=3)
    here, there = files_below(old / kind), files_below(tmp_path / "back")
    assert here.keys() == there.keys()
    own = [name for name in here if not name.endswith(".json")]
    assert all(here[name] == there[name] for name in own)
    assert len(own) > 20
    assert_clean(tmp_path / "back")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_copied(old: Path, tmp_path: Path, kind: str) -> None:
    good(command(old, "copy", old / kind, tmp_path / "copy"))
    assert files_below(tmp_path / "copy") == files_below(old / kind)
    good(command(old, "copy", old / kind, tmp_path / "some", "--views", "1", "--levels", "4"))
    assert manifest.read(tmp_path / "some")["format"] == 3
    assert_clean(tmp_path / "some")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zarr", "ranked"])
def test_its_archive_gives_the_same_bytes_back(old: Path, tmp_path: Path, kind: str) -> None:
    good(command(old, "copy", old / kind, tmp_path / "archive", "--compress"))
    assert_clean(tmp_path / "archive")
    group = zarr.open_group(tmp_path / "archive/shards/000000.zarr", mode="r")
    first = zarr.open_group(old / kind / "shards/000000.zarr", mode="r")
    np.testing.assert_array_equal(group["features"][:], first["features"][:])
    good(command(old, "copy", tmp_path / "archive", tmp_path / "back"))
    here, there = files_below(old / kind), files_below(tmp_path / "back")
    documents = [name for name in here if name.endswith("zarr.json")]
    records = [name for name in here if "shards/0" in name and name.endswith(".json")]
    assert here.keys() == there.keys()
    for name in here.keys() - {*documents, *records}:
        assert here[name] == there[name], name


def test_what_is_added_is_in_its_format(copied: Path) -> None:
    out = copied / "zarr"
    given = (*GIVEN, "--levels", "all", "--views", "3", *images(copied), "--out", out, "--add")
    before = files_below(out)
    good(command(copied, "extract", *given))
    after = files_below(out)
    assert {name: data for name, data in after.items() if name in before} == before
    formats = [manifest.read(path.parent)["format"] for path in out.glob("parts/*/manifest.json")]
    assert formats == [3] * 3
    with featcache.open(out) as cache:
        assert cache.levels == (1, 2, 3, 4)
        assert np.isfinite(cache.read(range(10), 2)["features"].astype("f4")).all()
    assert_clean(out)


def test_it_is_continued_in_its_format(copied: Path) -> None:
    out = copied / "unfinished"
    good(command(copied, "extract", *GIVEN, "--levels", "2,4", *images(copied), "--out", out))
    assert manifest.read(out)["format"] == 3
    for name in ("000000", "000001"):
        shard = f"shards/{name}.zarr"
        made, there = rows_of(out / shard), rows_of(copied / "zarr" / shard)
        assert made.keys() == there.keys()
        assert_made_again(made, there)
    assert not (out / "zarr.json").exists()
    assert_clean(out)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damage_is_named_and_mended(copied: Path, kind: str, damage: str) -> None:
    cache = copied / kind
    path = {
        "zarr": cache / "shards/000001.zarr/features/c.0.1.0.0.0",
        "ranked": cache / "shards/000001.zarr/prefix_crc/c.0.0.0.0",
        "webdataset": cache / "shards/000001.webdataset/v1.tar",
    }[kind]
    data = path.read_bytes()
    at = 700 if kind == "webdataset" else 100
    if damage == "missing":
        path.unlink()
    else:
        changed = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        path.write_bytes(changed if damage == "flipped" else data[:-9])
    ran = command(copied, "verify", cache)
    assert (ran.status, str(path) in ran.out) == (1, True)
    good(command(copied, "repair", cache, *images(copied)))
    if kind == "webdataset":
        assert_tar_made_again(path.read_bytes(), data)
    else:
        assert path.read_bytes() == data
    assert_clean(cache)


def test_an_extraction_from_python_continues_it_too(copied: Path) -> None:
    from featcache.maintenance.repair import plan_from_manifest
    from featcache.pictures.open_source import open_source
    from featcache.teachers import load

    about = manifest.read(copied / "unfinished")
    plan = plan_from_manifest(
        {**about, "format": 4}, open_source(str(copied / "pictures")), load(TEACHER, None, "cpu")
    )
    made = extract.run(plan, copied / "unfinished")
    assert made["format"] == 3
    assert json_file.read_json(copied / "unfinished/shards/000001.json")["rows"] == 5
    assert_clean(copied / "unfinished")
