"""Other people's libraries open a cache as it is: Zarr's groups from the cache down, with xarray's
labels, and Hugging Face's datasets, which loads whole tars. What is damaged is named and mended.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import crc32c
import datasets
import numpy as np
import pytest
import xarray
import zarr

import featcache
from featcache import teachers
from featcache.errors import UserError
from featcache.extraction import extend, extract
from featcache.maintenance import repair, transfer, verify
from featcache.pictures.open_source import open_source
from featcache.storage import json_file
from tests.conftest import SYNTHETIC, copy_tree, files_below, flip, make_photos, make_plan
from tests.shard_index import change_index

FEATURES = "features/c.0.1.0.0.0"
ENTRIES = 6 * 2  # of the index: rows and levels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("foreign") / "pictures")


@pytest.fixture(scope="module")
def cache(pictures: Path) -> Path:
    """Levels 1 and 3 of two views; views 2 and 3 added."""
    out = pictures.parent / "cache"
    extract.run(make_plan(pictures, views=2, rows_per_shard=6), out, batch_size=4)
    part = extend.plan_part(make_plan(pictures, views=4), out)
    assert part is not None
    extract.run(*part, batch_size=4)
    return out


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    return copy_tree(cache, tmp_path / "cache")


# ---------------------------------------------------------------- what is there


def test_the_cache_is_a_group_that_says_what_it_holds(cache: Path) -> None:
    about = json.loads((cache / "manifest.json").read_text())
    wanted = {
        "teacher": SYNTHETIC,
        "levels": [1, 3],
        "codec": "fp16",
        "tokens": "raster",
        "policy": about["identity"]["policy"],
        "format": 4,
    }
    root = zarr.open_group(cache, mode="r")
    assert dict(root.attrs) == {**wanted, "created_by": f"featcache {featcache.__version__}"}
    assert dict(root["shards"].attrs) == dict(root.attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)  # of records beside them
        assert sorted(root["shards"].group_keys()) == ["000000.zarr", "000001.zarr"]
    shard = root["shards/000001.zarr"]
    assert dict(shard.attrs) == {**wanted, "coordinates": "key"}
    assert shard.metadata.consolidated_metadata is not None
    part = next((cache / "parts").iterdir())
    assert zarr.open_group(part, mode="r")["shards/000000.zarr/view"][:].tolist() == [2, 3]


def test_xarray_labels_what_it_opens(cache: Path) -> None:
    with (
        featcache.open(cache) as ours,
        warnings.catch_warnings(),
        xarray.open_zarr(cache / "shards/000001.zarr", chunks=None) as shard,
    ):
        warnings.simplefilter("error")
        assert shard["key"].values.tolist() == list(ours.keys[6:11])
        labelled = shard.set_xindex("key").sel(key=ours.keys[8], level=3, view=1)
        wanted = ours.read([8], 1, levels=[3])["features"][0, 0]
        np.testing.assert_array_equal(labelled["features"].values, wanted)


def test_datasets_loads_whole_tars(cache: Path, tmp_path: Path) -> None:
    """Not streaming: every member becomes a column, the hash of pixels too."""
    transfer.convert(cache, tmp_path / "tars", store="webdataset")
    tars = sorted(map(str, (tmp_path / "tars").glob("shards/*.webdataset/v1.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own
        loaded = datasets.load_dataset(
            "webdataset", data_files={"train": tars}, split="train", cache_dir=str(tmp_path / "hf")
        )
    with featcache.open(cache) as ours:
        assert loaded["__key__"] == list(ours.keys)
        fields = [name for name in ours.fields if f"{name}.npy" in loaded.column_names]
        assert {"features", "feature_stats", "attention", "pixel_hash", "thumbnail"} < set(fields)
        for name, values in ours.read(range(11), 1, fields).items():
            stored = values.view(np.int64) if name == "pixel_hash" else values
            seen = np.array(loaded[f"{name}.npy"], stored.dtype)
            np.testing.assert_array_equal(seen, stored, err_msg=name)


# ---------------------------------------------------------------- what is damaged


def forge_record(path: Path) -> None:
    """Let the record state the changed file's checksum."""
    record = path.parents[1].with_suffix(".json")
    about = json_file.read_json(record)
    about["files"][FEATURES]["crc32c"] = f"{crc32c.crc32c(path.read_bytes()):08x}"
    json_file.write_json(record, about)


def reroute(path: Path) -> None:
    one, other = (5 * 8 * 2 * at for at in (0, 3))
    change_index(path, ENTRIES, {0: other, 6: one})


DAMAGE = {
    "flipped bit": lambda path: flip(path, 33),
    "cut file": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "missing file": lambda path: path.unlink(),
    "rerouted index": reroute,
    "rerouted index, record too": lambda path: (reroute(path), forge_record(path)),
    "missing chunk": lambda path: change_index(path, ENTRIES, {4: (1 << 64) - 1, 5: (1 << 64) - 1}),
    "missing chunk, record too": lambda path: (
        change_index(path, ENTRIES, {4: (1 << 64) - 1, 5: (1 << 64) - 1}),
        forge_record(path),
    ),
}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_mended_and_never_read_as_zeros(
    pictures: Path, cache: Path, copied: Path, damage: object
) -> None:
    path = copied / "shards/000000.zarr" / FEATURES
    damage(path)  # type: ignore[operator]
    assert any(str(path) in problem for problem in verify.verify_cache(copied)[0])
    with featcache.open(cache) as sound:
        wanted = sound.read(range(11), 1)["features"]
    try:
        with featcache.open(copied) as ours:
            np.testing.assert_array_equal(ours.read(range(11), 1)["features"], wanted)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017 (rows are where they were, unless they are not)
    repair.run(copied, lambda _: (open_source(pictures), teachers.load(SYNTHETIC, None)))
    assert files_below(copied) == files_below(cache)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", ["zarr.json", "shards/zarr.json"])
@pytest.mark.parametrize("how", ["missing", "other", "longer", "folder"])
def test_the_groups_above_the_shards_are_checked_and_restored(
    cache: Path, copied: Path, name: str, how: str
) -> None:
    path = next((copied / "parts").iterdir()) / name if how == "other" else copied / name
    data = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(data.replace(b"synthetic", b"clip-b16 ") if how == "other" else data * 2)
    problems = verify.verify_cache(copied)[0]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}: ")

    def never(about: dict) -> tuple:
        raise AssertionError("no shard is bad")

    if how == "folder":
        with pytest.raises(UserError, match=r"is a folder where a file is to be"):
            repair.run(copied, never)
        path.rmdir()
    assert repair.run(copied, never)["restored"] == [str(path)]
    assert files_below(copied) == files_below(cache)
