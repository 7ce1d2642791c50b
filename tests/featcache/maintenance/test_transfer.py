"""Copies and conversions: the same bytes there and back, by files and by rows; fewer views, levels
and shards against an extraction of just those and against what zarr-python reads; interrupted and
run again; what is refused.
"""

from __future__ import annotations

import errno
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache
from featcache import teachers
from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import extend, extract, shard_queue
from featcache.maintenance import repair, transfer, verify
from featcache.pictures.open_source import open_source
from featcache.storage import commit, json_file, lease, manifest
from featcache.storage.store import get_store, record_path
from tests.conftest import SYNTHETIC, Ran, files_below, flip, make_photos, make_plan, python

OTHER = "synthetic:levels=2,tokens=4,width=6,size=28"  # L 2, D 6
RANKED: dict[str, Any] = {"tokens": "ranked", "keep": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven photos in three shards, and one picture that cannot be used in the first."""
    root = make_photos(tmp_path_factory.mktemp("transfer") / "pictures")
    (root / "bad.png").write_text("not a picture")
    return root


def made(folder: Path, name: str, **changes: Any) -> Path:
    """A cache of these pictures, made once for the module."""
    out = folder.parent / name
    if not out.exists():
        extract.run(make_plan(folder, **changes), out, batch_size=4)
    return out


@pytest.fixture(scope="module")
def plain(pictures: Path) -> Path:
    """Levels 1 and 3 of three views."""
    return made(pictures, "plain")


@pytest.fixture(scope="module")
def grown(pictures: Path) -> Path:
    """Levels 1 and 3 of three views; level 2 added, then view 3, then another teacher."""
    out = made(pictures, "grown")
    for wanted in (
        make_plan(pictures, levels=(1, 2, 3)),
        make_plan(pictures, levels=(1, 2, 3), views=4),
        make_plan(pictures, OTHER, levels=(2,), views=4),
    ):
        lacking = extend.plan_part(wanted, out)
        if lacking is not None:
            extract.run(lacking[0], lacking[1], batch_size=4)
    assert len(list((out / "parts").iterdir())) == 3
    return out


def records_apart(files: dict[str, bytes]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files but for records and manifests, records)."""
    jsons = {
        name: json.loads(data)
        for name, data in files.items()
        if name.endswith(".json") and "zarr" not in name
    }
    rest = {name: data for name, data in files.items() if name not in jsons}
    return rest, {
        name: value
        for name, value in jsons.items()
        if "manifest" not in name and name != "quarantine.json"
    }


def by_zarr(cache: Path, name: str) -> np.ndarray:
    """(n, V, ...) of one array of a cache's own shards, read by zarr-python."""
    shards = sorted((cache / "shards").glob("*.zarr"))
    values = np.concatenate(
        [np.asarray(zarr.open_group(shard, mode="r")[name][...]) for shard in shards]
    )
    return values.view(np.uint64) if name == "pixel_hash" else values


def check_clean(cache: Path) -> None:
    assert verify.verify_cache(cache)[0] == []
    assert not [path for path in cache.rglob("*") if path.name.endswith((".tmp", ".lease"))]


# ---------------------------------------------------------------- whole


def test_a_copy_has_the_same_bytes_additions_too(grown: Path, tmp_path: Path) -> None:
    assert transfer.copy(grown, tmp_path / "c") == []
    assert files_below(tmp_path / "c") == files_below(grown)
    check_clean(tmp_path / "c")


def test_running_again_does_nothing(plain: Path, tmp_path: Path) -> None:
    transfer.copy(plain, tmp_path / "c")
    times = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*") if path.is_file()
    }
    progress = transfer.TransferProgress()
    transfer.copy(plain, tmp_path / "c", progress=progress)
    assert (progress.total, progress.done, progress.shards) == (0, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_progress_ends_at_its_total(plain: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    transfer.copy(
        plain,
        tmp_path / "c",
        progress=transfer.TransferProgress(lambda now: seen.append((now.done, now.total))),
    )
    with featcache.Cache(plain) as cache:
        assert seen[-1] == (cache.bytes, cache.bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "changes", [{}, RANKED, {"pixels": True}], ids=["raster", "ranked", "pixels"]
)
def test_to_tars_and_back_gives_the_same_bytes(
    pictures: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    origin = made(pictures, "plain-" + "-".join(changes), **changes)
    transfer.convert(origin, tmp_path / "tars", store="webdataset")
    transfer.convert(tmp_path / "tars", tmp_path / "back", store="zarr")
    assert files_below(tmp_path / "back") == files_below(origin)
    check_clean(tmp_path / "tars")


@pytest.mark.slow
def test_additions_are_converted_too(grown: Path, tmp_path: Path) -> None:
    transfer.convert(grown, tmp_path / "tars", store="webdataset")
    with featcache.Cache(grown) as here, featcache.Cache(tmp_path / "tars") as there:
        assert (there.views, there.levels, there.teachers) == (4, (1, 2, 3), here.teachers)
        for view in range(4):
            a, b = (cache.read(range(len(cache)), view, here.fields) for cache in (here, there))
            for name in here.fields:
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    transfer.convert(tmp_path / "tars", tmp_path / "back", store="zarr")
    assert files_below(tmp_path / "back") == files_below(grown)
    check_clean(tmp_path / "tars")


def test_converted_is_what_is_extracted_into_that_store(
    pictures: Path, plain: Path, tmp_path: Path
) -> None:
    direct = made(pictures, "direct", store="webdataset")
    transfer.convert(plain, tmp_path / "tars", store="webdataset")
    assert files_below(tmp_path / "tars") == files_below(direct)
    assert manifest.read(tmp_path / "tars") == manifest.read(direct)
    for record in sorted((direct / "shards").glob("0*.json")):
        here, there = (
            json_file.read_json(path) for path in (tmp_path / "tars/shards" / record.name, record)
        )
        assert here["statistics"] == there["statistics"]


def test_blocks_of_one_item_change_no_byte(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer.copy(plain, tmp_path / "whole", views=2)
    transfer.convert(plain, tmp_path / "whole-tars", store="webdataset")
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 1)
    transfer.copy(plain, tmp_path / "items", views=2)
    transfer.convert(plain, tmp_path / "items-tars", store="webdataset")
    assert files_below(tmp_path / "items") == files_below(tmp_path / "whole")
    assert files_below(tmp_path / "items-tars") == files_below(tmp_path / "whole-tars")


# ---------------------------------------------------------------- less


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("origin", "chosen"),
    [
        ("plain", {"views": 2, "levels": (3,)}),
        ("plain-tokens-keep", {"views": 1, "levels": (1, 3), **RANKED}),
        ("grown", {"views": 2, "levels": (2, 3)}),
        ("grown", {"views": 4, "levels": (1, 2, 3)}),
    ],
    ids=["less", "ranked", "an added level", "all, flat"],
)
def test_less_is_what_an_extraction_of_just_that_gives(
    pictures: Path, grown: Path, tmp_path: Path, origin: str, chosen: dict[str, Any]
) -> None:
    source = (
        grown
        if origin == "grown"
        else made(pictures, origin, **(RANKED if "keep" in chosen else {}))
    )
    transfer.copy(source, tmp_path / "c", views=chosen["views"], levels=chosen["levels"])
    extract.run(make_plan(pictures, **chosen), tmp_path / "direct", batch_size=4)
    here, there = (records_apart(files_below(tmp_path / name)) for name in ("c", "direct"))
    assert here[0] == there[0]
    for name, record in there[1].items():
        about, expected = here[1][name].pop("statistics"), record.pop("statistics")
        # of what is stored; of all, before encoding
        features, before = about.pop("features"), expected.pop("features")
        if "keep" not in chosen:
            assert features == pytest.approx(before, rel=1e-3)
        assert about == expected
        assert {**here[1][name], "checksum": 0} == {**record, "checksum": 0}
    made_here, made_there = (manifest.read(tmp_path / name) for name in ("c", "direct"))
    assert made_here["provenance"].pop("copied_from") == manifest.read(source)["id"]
    assert made_here["provenance"].pop("statistics") == "of stored numbers"
    assert made_here == made_there
    check_clean(tmp_path / "c")


def test_statistics_are_of_what_is_kept(pictures: Path, tmp_path: Path) -> None:
    transfer.copy(
        made(pictures, "plain-tokens-keep", **RANKED), tmp_path / "c", views=2, levels=(3,)
    )
    for record in sorted((tmp_path / "c/shards").glob("0*.json")):
        group = zarr.open_group(record.with_suffix(".zarr"), mode="r")
        features, attention = (
            np.asarray(group[name][...]).astype(np.float64) for name in ("features", "attention")
        )
        p = attention / attention.sum(-1, keepdims=True)
        found = json_file.read_json(record)["statistics"]
        norm = np.sqrt((features**2).sum(-1)).mean()
        expected = {"min": features.min(), "max": features.max(), "non_finite": 0, "norm": norm}
        assert found["features"] == pytest.approx(expected, rel=1e-6)
        assert found["attention"]["entropy"] == pytest.approx(
            -(p * np.log(p)).sum(-1).mean(), rel=1e-6
        )


def test_a_choice_of_all_there_is_is_a_copy_of_the_files(plain: Path, tmp_path: Path) -> None:
    transfer.copy(plain, tmp_path / "c", views=3, levels=(3, 1))
    assert files_below(tmp_path / "c") == files_below(plain)


def test_other_teachers_are_left_out_of_a_choice_and_named(grown: Path, tmp_path: Path) -> None:
    left = transfer.copy(grown, tmp_path / "c", views=1)
    assert left == [f"{OTHER}  levels 2  views 0 to 3"]
    with featcache.open(tmp_path / "c") as cache:
        assert (cache.teachers, cache.levels, cache.views) == ([SYNTHETIC], (1, 2, 3), 1)


@pytest.mark.slow
def test_stored_pixels_of_added_views_are_kept(pictures: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(made(pictures, "plain-pixels", pixels=True), tmp_path / "origin"))
    part = extend.plan_part(make_plan(pictures, views=4), origin)
    assert part is not None
    extract.run(*part, batch_size=4)
    transfer.copy(origin, tmp_path / "c", views=4, levels=(1,))
    expected = np.concatenate([by_zarr(origin, "pixels"), by_zarr(part[1], "pixels")], 1)
    np.testing.assert_array_equal(by_zarr(tmp_path / "c", "pixels"), expected)
    check_clean(tmp_path / "c")


def test_some_shards_are_a_complete_cache_of_fewer_pictures(plain: Path, tmp_path: Path) -> None:
    transfer.copy(plain, tmp_path / "c", shards=(1, 3))
    with featcache.open(plain) as all_of_it, featcache.open(tmp_path / "c") as some:
        keys = list(all_of_it.keys)[4:]  # the first shard has four rows and a quarantined picture
        assert list(some.keys) == keys
        assert some.complete
        assert some.quarantined == []
        assert some.identity["pictures"] == {"count": 7, "keys_digest": manifest.keys_digest(keys)}
        assert some.manifest["id"] != all_of_it.manifest["id"]
        assert [shard["first"] for shard in some.manifest["shards"]] == [5, 10]
        for name in some.fields:
            np.testing.assert_array_equal(
                some.read(range(7), 1, [name])[name],
                by_zarr(plain, name)[4:, 1]
                if some.arrays[name].per_view
                else by_zarr(plain, name)[4:],
            )
    assert not (tmp_path / "c/quarantine.json").exists()
    check_clean(tmp_path / "c")


def test_some_shards_of_a_grown_cache_keep_what_was_added(grown: Path, tmp_path: Path) -> None:
    transfer.copy(grown, tmp_path / "c", shards=(0, 2))
    with featcache.open(grown) as all_of_it, featcache.open(tmp_path / "c") as some:
        assert (some.levels, some.views, some.teachers) == (all_of_it.levels, 4, all_of_it.teachers)
        name = f"{OTHER}/features"
        for field in ("features", name):
            here, there = (cache.read(range(9), 3, [field])[field] for cache in (some, all_of_it))
            np.testing.assert_array_equal(here, there)
        assert some.quarantined == all_of_it.quarantined
        assert all(
            path.name.endswith(json_file.digest(manifest.read(path)["identity"])[:8])
            for path in parts(some)
        )
    check_clean(tmp_path / "c")


def parts(cache: featcache.Cache) -> list[Path]:
    return sorted((cache.path / "parts").iterdir())


@pytest.mark.slow
@settings(max_examples=12)
@given(
    view_count=st.integers(1, 3),
    levels=st.lists(st.sampled_from([1, 3]), min_size=1, unique=True),
    low=st.integers(0, 2),
    count=st.integers(1, 3),
    block=st.sampled_from([1, 2000, 10**6]),
)
def test_any_choice_holds_the_numbers_of_the_source(
    plain: Path,
    tmp_path_factory: pytest.TempPathFactory,
    view_count: int,
    levels: list[int],
    low: int,
    count: int,
    block: int,
) -> None:
    high = min(low + count, 3)
    out = tmp_path_factory.mktemp("any") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BLOCK_BYTES", block)
        transfer.copy(plain, out, views=view_count, levels=levels, shards=(low, high))
    edges = [0, 4, 9, 12 - 1]
    rows, slots = slice(edges[low], edges[high]), [[1, 3].index(level) for level in sorted(levels)]
    with featcache.open(out) as cache:
        for name, spec in cache.arrays.items():
            expected = by_zarr(plain, name)[rows]
            expected = expected[:, :view_count] if spec.per_view else expected
            expected = expected[:, :, slots] if name in ("features", "feature_stats") else expected
            np.testing.assert_array_equal(by_zarr(out, name), expected, err_msg=name)
        for view in range(view_count):
            cache.read(range(len(cache)), view, cache.fields)  # every checksum
    check_clean(out)


# ---------------------------------------------------------------- archives


@pytest.mark.slow
def test_an_archive_and_back_is_the_same_to_the_byte(grown: Path, tmp_path: Path) -> None:
    """With all that was added; killed and continued as any copy."""
    assert transfer.copy(grown, tmp_path / "archive", compress=True) == []
    check_clean(tmp_path / "archive")
    parts = sorted((tmp_path / "archive/parts").iterdir())
    for path in (tmp_path / "archive", *parts):
        assert manifest.read(path)["compression"] == "blosc"
    assert manifest.read(tmp_path / "archive")["id"] == manifest.read(grown)["id"]
    transfer.copy(tmp_path / "archive", tmp_path / "back")
    assert files_below(tmp_path / "back") == files_below(grown)


def test_an_archive_is_copied_as_it_is(plain: Path, tmp_path: Path) -> None:
    transfer.copy(plain, tmp_path / "archive", compress=True)
    transfer.copy(tmp_path / "archive", tmp_path / "again", compress=True)
    assert files_below(tmp_path / "again") == files_below(tmp_path / "archive")
    transfer.copy(tmp_path / "archive", tmp_path / "some", compress=True, views=1, shards=(1, 3))
    check_clean(tmp_path / "some")
    np.testing.assert_array_equal(
        by_zarr(tmp_path / "some", "features"), by_zarr(plain, "features")[4:, :1]
    )


@pytest.mark.slow
def test_an_archive_of_pixels_and_ranked_tokens(pictures: Path, tmp_path: Path) -> None:
    origin = made(pictures, "ranked-pixels", pixels=True, **RANKED)
    transfer.copy(origin, tmp_path / "archive", compress=True)
    check_clean(tmp_path / "archive")
    for name in ("features", "feature_stats", "pixels", "prefix_crc"):
        np.testing.assert_array_equal(by_zarr(tmp_path / "archive", name), by_zarr(origin, name))
    sizes = [
        sum(path.stat().st_size for path in cache.glob("shards/*/pixels/c.*"))
        for cache in (origin, tmp_path / "archive")
    ]
    assert sizes[1] < sizes[0]
    with featcache.open(tmp_path / "archive") as here, featcache.open(origin) as there:
        one, other = (each.read(range(11), 1, tokens=2)["features"] for each in (here, there))
        np.testing.assert_array_equal(one, other)
    transfer.copy(tmp_path / "archive", tmp_path / "back")
    assert files_below(tmp_path / "back") == files_below(origin)


@pytest.mark.parametrize("here", ["one", "other"])
def test_groups_say_what_the_manifest_that_was_first_says(
    plain: Path, tmp_path: Path, here: str
) -> None:
    """Another version had begun the copy."""
    transfer.copy(plain, tmp_path / "c")
    for path in (tmp_path / "c/manifest.json", tmp_path / "c/shards/manifest.copy.json"):
        about = json_file.read_json(path)
        about["provenance"]["versions"]["featcache"] = "9.8.7"
        json_file.write_json(path, about)
    for path in (tmp_path / "c/zarr.json", tmp_path / "c/shards/zarr.json"):
        path.unlink() if here == "one" else path.write_text("{}")
    record_path(tmp_path / "c", "000001").unlink()
    transfer.copy(plain, tmp_path / "c")
    check_clean(tmp_path / "c")
    assert zarr.open_group(tmp_path / "c", mode="r").attrs["created_by"] == "featcache 9.8.7"


def test_an_archive_becomes_tars(plain: Path, tmp_path: Path) -> None:
    transfer.copy(plain, tmp_path / "archive", compress=True)
    transfer.convert(tmp_path / "archive", tmp_path / "tars", store="webdataset")
    transfer.convert(plain, tmp_path / "expected", store="webdataset")
    assert files_below(tmp_path / "tars") == files_below(tmp_path / "expected")
    with pytest.raises(UsageError, match=r"webdataset store.*convert --store zarr"):
        transfer.copy(tmp_path / "tars", tmp_path / "c", compress=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("compress", [False, True])
def test_an_archive_and_a_plain_copy_are_not_mixed(
    plain: Path, tmp_path: Path, compress: bool
) -> None:
    transfer.copy(plain, tmp_path / "c", compress=compress)
    before = files_below(tmp_path / "c")
    with pytest.raises(UserError, match=r"holds the same cache as .*give another folder"):
        transfer.copy(plain, tmp_path / "c", compress=not compress)
    with pytest.raises(UserError, match=r"as .*format 4, not as format 3"):
        transfer.convert(plain, tmp_path / "c", format=3)
    assert files_below(tmp_path / "c") == before


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("damage", ["flipped", "missing", "record"])
def test_a_damaged_archive_is_repaired_as_an_archive(
    pictures: Path, plain: Path, tmp_path: Path, damage: str
) -> None:
    transfer.copy(plain, tmp_path / "c", compress=True)
    whole = files_below(tmp_path / "c")
    path = tmp_path / "c/shards/000001.zarr/features/c.0.1.0.0.0"
    if damage == "flipped":
        flip(path, 30)
    elif damage == "missing":
        path.unlink()
    else:
        record_path(tmp_path / "c", "000001").unlink()
    repair.run(tmp_path / "c", lambda _: (open_source(pictures), teachers.load(SYNTHETIC, None)))
    assert files_below(tmp_path / "c") == whole


def test_an_archive_takes_additions_as_archives(
    pictures: Path, plain: Path, tmp_path: Path
) -> None:
    transfer.copy(plain, tmp_path / "c", compress=True)
    part = extend.plan_part(make_plan(pictures, levels=(1, 2, 3)), tmp_path / "c")
    assert part is not None
    extract.run(*part, batch_size=4)
    assert manifest.read(part[1])["compression"] == "blosc"
    check_clean(tmp_path / "c")
    with featcache.open(tmp_path / "c") as cache:
        assert cache.levels == (1, 2, 3)
        cache.read(range(11), 2)


# ---------------------------------------------------------------- interrupted

WORK: dict[str, Callable[[Path, Path], object]] = {
    "files": lambda cache, out: transfer.copy(cache, out),
    "rows": lambda cache, out: transfer.copy(cache, out, views=2),
    "convert": lambda cache, out: transfer.convert(cache, out, store="webdataset"),
    "format": lambda cache, out: transfer.convert(cache, out, format=3),
    "compress": lambda cache, out: transfer.copy(cache, out, compress=True),
}


def raising(monkeypatch: pytest.MonkeyPatch, target: str, call: int, error: BaseException) -> None:
    """Let a function raise when it is entered for the n-th time."""
    place, _, name = target.rpartition(".")
    module, _, holder = place.partition(":")
    owner: Any = importlib.import_module(f"featcache.{module}")
    owner = getattr(owner, holder) if holder else owner
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


STOPS = [
    ("files", "maintenance.transfer._copy_file", 9),
    ("files", "storage.commit.publish", 2),
    ("files", "storage.commit._publish_record", 2),
    ("files", "storage.json_file.write_json", 2),
    ("rows", "storage.row_file:RowFile.append", 40),
    ("rows", "storage.zarr_store:ZarrShardWriter.append", 2),
    ("rows", "storage.commit._publish_record", 1),
    ("convert", "storage.row_file:RowFile.append", 9),
    ("convert", "storage.commit.publish", 3),
    ("convert", "extraction.target_folder.write_quarantine", 1),
    ("format", "storage.zarr_metadata.shard_metadata", 2),
    ("format", "storage.commit._publish_record", 2),
    ("compress", "storage.chunk_index:ChunkFile.finish", 8),
    ("compress", "storage.zarr_metadata.shard_metadata", 3),
    ("compress", "storage.commit.publish", 2),
]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr
)
@pytest.mark.parametrize(("work", "target", "call"), STOPS)
def test_interrupted_and_run_again_gives_the_same_bytes(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: str,
    target: str,
    call: int,
    error: BaseException,
) -> None:
    WORK[work](plain, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        raising(patch, target, call, error)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
        with pytest.raises(expected) as raised:
            WORK[work](plain, tmp_path / "c")
    if expected is UserError:
        assert "No space left on device" in str(raised.value)
        assert "of 3 shards are complete and kept; make room and run the same command again" in str(
            raised.value
        )
    left = files_below(tmp_path / "c")
    assert left != files_below(tmp_path / "undisturbed")
    assert not [name for name in left if ".tmp" in name or name.endswith(".lease")]
    WORK[work](plain, tmp_path / "c")
    assert files_below(tmp_path / "c") == files_below(tmp_path / "undisturbed")
    check_clean(tmp_path / "c")


KILLED = """
import importlib, json, os, signal, sys
from pathlib import Path
from featcache.maintenance import transfer
import featcache.storage.zarr_store, featcache.storage.webdataset_store, zarr
source, root, stops = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
WORK = {
    "files": lambda out: transfer.copy(source, out),
    "convert": lambda out: transfer.convert(source, out, store="webdataset"),
    "format": lambda out: transfer.convert(source, out, format=3),
    "compress": lambda out: transfer.copy(source, out, compress=True),
}
for i, (work, target, call) in enumerate(stops):
    child = os.fork()
    if child == 0:
        place, _, name = target.rpartition(".")
        module, _, holder = place.partition(":")
        owner = importlib.import_module("featcache." + module)
        owner = getattr(owner, holder) if holder else owner
        original, calls = getattr(owner, name), []
        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, dies)
        WORK[work](root / str(i))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived", flush=True)
"""


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    stops = [stop for stop in STOPS if stop[0] != "rows"]
    ran = python(KILLED, plain, tmp_path, json.dumps(stops))
    assert ran.stdout.split() == ["9"] * len(stops), ran.stdout + ran.stderr
    for work in ("files", "convert", "format", "compress"):
        WORK[work](plain, tmp_path / work)
    for i, (work, _, _) in enumerate(stops):
        assert files_below(tmp_path / str(i)) != files_below(tmp_path / work)
        WORK[work](plain, tmp_path / str(i))
        assert files_below(tmp_path / str(i)) == files_below(tmp_path / work), stops[i]


def test_a_shard_that_another_process_holds_is_waited_for(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_queue, "WAIT_S", 0.0)
    (tmp_path / "c/shards").mkdir(parents=True)
    shutil.copy(plain / "manifest.json", tmp_path / "c")
    held = lease.acquire(tmp_path / "c", "000001")
    assert held is not None
    told: list[int] = []

    def waiting(shards: int) -> None:
        told.append(shards)
        assert not record_path(tmp_path / "c", "000001").is_file()
        held.release()

    transfer.copy(plain, tmp_path / "c", progress=transfer.TransferProgress(waiting=waiting))
    assert told == [1]
    assert files_below(tmp_path / "c") == files_below(plain)


# ---------------------------------------------------------------- damaged


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("work", WORK)
def test_a_damaged_source_is_named_and_its_shard_not_published(
    plain: Path, tmp_path: Path, work: str
) -> None:
    origin = Path(shutil.copytree(plain, tmp_path / "origin"))
    bad = origin / "shards/000001.zarr/features/c.0.1.0.0.0"
    flip(bad, 40)
    with pytest.raises(UserError, match=f"{bad}.*repair {origin}"):
        WORK[work](origin, tmp_path / "c")
    assert record_path(tmp_path / "c", "000000").is_file()
    assert not list((tmp_path / "c/shards").glob("000001*"))
    flip(bad, 40)
    WORK[work](origin, tmp_path / "c")
    WORK[work](plain, tmp_path / "undisturbed")
    assert files_below(tmp_path / "c") == files_below(tmp_path / "undisturbed")


def test_a_file_with_bytes_after_its_end_is_damaged(plain: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(plain, tmp_path / "origin"))
    with featcache.open(origin), pytest.MonkeyPatch.context() as patch:
        # it grew after the cache was opened
        patch.setattr(commit, "check_shard", lambda *args, **kwargs: [])
        bad = next((origin / "shards/000000.zarr/features").glob("c.*"))
        bad.write_bytes(bad.read_bytes() + b"x")
        with pytest.raises(UserError, match=str(bad)):
            transfer.copy(origin, tmp_path / "c")


def test_a_copy_that_differs_from_a_sound_source_is_told_apart(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_store("zarr")
    is_intact = backend.is_intact
    monkeypatch.setattr(
        backend, "is_intact", lambda path, facts: plain in path.parents and is_intact(path, facts)
    )
    with pytest.raises(UserError, match=r"differs from .*, which is sound: disk or memory"):
        transfer.copy(plain, tmp_path / "c")
    assert not list((tmp_path / "c/shards").glob("000000*"))


def test_a_damaged_file_beside_the_manifest_is_named(plain: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(plain, tmp_path / "origin"))
    tail = next(origin.glob("*.safetensors"))
    flip(tail, -1)
    with pytest.raises(UserError, match=f"{tail}: checksum differs"):
        transfer.copy(origin, tmp_path / "c")


# ---------------------------------------------------------------- refused


def test_another_choice_into_the_same_folder_names_the_field(plain: Path, tmp_path: Path) -> None:
    transfer.copy(plain, tmp_path / "c", views=2)
    before = files_below(tmp_path / "c")
    for field, choice in {
        "identity.views": {"views": 1},
        "identity.levels": {"views": 2, "levels": (1,)},
        "identity.pictures.count": {"views": 2, "shards": (0, 2)},
    }.items():
        with pytest.raises(
            IdentityError, match=f"holds another cache: {field} .*give another folder"
        ):
            transfer.copy(plain, tmp_path / "c", **choice)  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match=r"identity\.views"):
        transfer.copy(plain, tmp_path / "c")
    assert files_below(tmp_path / "c") == before


def test_a_foreign_folder_and_the_cache_itself_are_refused(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is no cache; give an empty or new folder"):
        transfer.copy(plain, tmp_path / "c")
    for inside in (plain, plain / "parts/x"):
        with pytest.raises(UsageError, match="lies in the cache"):
            transfer.copy(plain, inside)


def test_what_is_not_stored_is_refused(plain: Path, grown: Path, tmp_path: Path) -> None:
    for choice, message in (
        ({"views": 4}, "--views 4: 1 to 3 views are stored"),
        ({"levels": (2, 3)}, "--levels: 2 is not stored; 1,3 are"),
        (
            {"shards": (1, 4)},
            "--shards 1:4: A:B with A < B <= 3 is allowed, the cache has 3 shards",
        ),
        ({"shards": (2, 2)}, "--shards 2:2"),
    ):
        with pytest.raises(UsageError, match=message):
            transfer.copy(plain, tmp_path / "c", **choice)  # type: ignore[arg-type]
    added = next(
        path
        for path in (grown / "parts").iterdir()
        if manifest.read(path)["identity"].get("first_view")
    )
    with pytest.raises(UsageError, match="was added to a cache"):
        transfer.copy(added, tmp_path / "c", views=1)
    with pytest.raises(UsageError, match="is in the zarr store and format 4 already"):
        transfer.convert(plain, tmp_path / "c", store="zarr")
    with pytest.raises(UsageError, match="give --store, --format or both"):
        transfer.convert(plain, tmp_path / "c")
    with pytest.raises(UsageError, match=r"--format 5: 3, 4 is allowed"):
        transfer.convert(plain, tmp_path / "c", format=5)
    assert not (tmp_path / "c").exists()


def test_an_addition_alone_can_be_copied(grown: Path, tmp_path: Path) -> None:
    part = sorted((grown / "parts").iterdir())[0]
    transfer.copy(part, tmp_path / "c")
    assert files_below(tmp_path / "c") == files_below(part)


def test_an_incomplete_source_gives_only_shards_that_are_there(plain: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(plain, tmp_path / "origin"))
    record_path(origin, "000001").unlink()
    with pytest.raises(
        UserError, match=r"incomplete: 1 of 3 shards are missing, the first 000001; .*--shards"
    ):
        transfer.copy(origin, tmp_path / "c")
    transfer.copy(origin, tmp_path / "c", shards=(2, 3), views=1)
    np.testing.assert_array_equal(
        by_zarr(tmp_path / "c", "features"), by_zarr(plain, "features")[9:, :1]
    )


@pytest.mark.slow
def test_an_unfinished_addition_is_left_out_and_named(grown: Path, tmp_path: Path) -> None:
    origin = Path(shutil.copytree(grown, tmp_path / "origin"))
    part = next(
        path
        for path in (origin / "parts").iterdir()
        if manifest.read(path)["identity"].get("first_view")
    )
    record_path(part, "000002").unlink()
    assert transfer.copy(origin, tmp_path / "c") == [
        f"{SYNTHETIC}  levels 1,2,3  view 3 (unfinished)"
    ]
    with featcache.open(tmp_path / "c") as cache:
        assert cache.views == 3


def test_too_small_a_disk_is_told_before_anything_is_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    for work in WORK.values():
        with pytest.raises(UserError, match=r"needs 0\.1 GB more, 0\.0 GB are free"):
            work(plain, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- the commands

Command = Callable[..., Ran]


def test_copy_tells_what_is_there(featcache_command: Command, grown: Path, tmp_path: Path) -> None:
    ran = featcache_command(
        "copy", grown, tmp_path / "c", "--views", 2, "--levels", "2,3", "--shards", ":2"
    )
    assert ran.status == 0, ran.err
    about = manifest.read(tmp_path / "c")
    head, speed, left = ran.out.splitlines()
    assert head.startswith(f"{tmp_path / 'c'}: 9 pictures x 2 views, levels 2,3, zarr store, ")
    assert head.endswith(f"id {about['id']}")
    assert speed.startswith("2 shards written, ")
    assert left == f"left out: {OTHER}  levels 2  views 0 to 3"
    again = featcache_command(
        "copy", grown, tmp_path / "c", "--views", 2, "--levels", "2,3", "--shards", "0:2"
    )
    assert again.out.splitlines()[1] == "was complete already; nothing to do"
    assert featcache_command("verify", tmp_path / "c").status == 0


def test_convert_prints_json(featcache_command: Command, grown: Path, tmp_path: Path) -> None:
    ran = featcache_command("convert", grown, tmp_path / "c", "--store", "webdataset", "--json")
    facts = json.loads(ran.out)
    assert (facts["store"], facts["rows"], facts["views"], facts["levels"]) == (
        "webdataset",
        11,
        4,
        [1, 2, 3],
    )
    assert (facts["new_shards"], facts["complete"], facts["left_out"], len(facts["parts"])) == (
        12,
        True,
        [],
        4,
    )
    assert (
        facts["id"]
        == json_file.digest({**manifest.read(grown)["identity"], "store": "webdataset"})[:16]
    )


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--levels", "last:9"], 2, "--levels 'last:9'"),
        (["--levels", "2"], 2, "--levels: 2 is not stored"),
        (["--shards", "two"], 2, "--shards 'two': A:B is needed"),
        (["--shards", "1:9"], 2, "--shards 1:9: A:B with A < B <= 3"),
        (["--views", "0"], 2, "--views"),
    ],
)
def test_a_wrong_copy_is_one_line(
    featcache_command: Command,
    plain: Path,
    tmp_path: Path,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    ran = featcache_command("copy", plain, tmp_path / "c", *arguments)
    assert (ran.status, ran.out) == (status, "")
    assert message in ran.error
    assert not (tmp_path / "c").exists()


def test_no_cache_and_no_store_are_one_line(
    featcache_command: Command, plain: Path, tmp_path: Path
) -> None:
    assert "no cache at" in featcache_command("copy", tmp_path / "none", tmp_path / "c").error
    assert featcache_command("convert", plain, tmp_path / "c").status == 2
    assert featcache_command("convert", plain, tmp_path / "c", "--store", "lmdb").status == 2


@pytest.mark.slow
def test_a_whole_copy_needs_no_torch(plain: Path, tmp_path: Path) -> None:
    code = "import sys; from featcache.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
    code += "print('torch' in sys.modules)"
    ran = python(code, "copy", plain, tmp_path / "c")
    assert ran.stdout.splitlines()[-1] == "False", ran.stderr
