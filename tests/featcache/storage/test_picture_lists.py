"""Lists of pictures in an identity: shards, ids and digests, computed by hand and by hypothesis."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.storage import json_file, manifest, picture_lists


def digest_of(keys: list[str]) -> str:
    text = b"".join(key.encode() + b"\n" for key in keys)
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def list_of(keys: list[str]) -> dict[str, object]:
    return {"count": len(keys), "keys_digest": digest_of(keys)}


def test_a_list_is_its_count_and_the_digest_of_its_keys() -> None:
    assert picture_lists.list_of(["a", "b"]) == list_of(["a", "b"])


def test_shards_begin_anew_with_each_list() -> None:
    shards = picture_lists.shards([{"count": 5}, {"count": 2}, {"count": 4}], 4)
    assert shards == [
        {"name": "000000", "first": 0, "count": 4},
        {"name": "000001", "first": 4, "count": 1},
        {"name": "000002", "first": 5, "count": 2},
        {"name": "000003", "first": 7, "count": 4},
    ]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 17))
def test_shards_are_every_picture_once_and_within_a_list(counts: list[int], rows: int) -> None:
    shards = picture_lists.shards([{"count": n} for n in counts], rows)
    numbers = [shard["first"] + i for shard in shards for i in range(shard["count"])]
    assert numbers == list(range(sum(counts)))
    of_list = [number for number, n in enumerate(counts) for _ in range(n)]
    for shard in shards:
        first, last = shard["first"], shard["first"] + shard["count"] - 1
        assert 1 <= shard["count"] <= rows
        assert of_list[first] == of_list[last]
    # what was there before keeps its shards
    assert shards[: len(picture_lists.shards([{"count": counts[0]}], rows))] == (
        picture_lists.shards([{"count": counts[0]}], rows)
    )


def test_the_lists_that_keys_are_are_found() -> None:
    of = [list_of(["a", "b"]), list_of(["c"]), list_of(["d", "e"])]
    assert picture_lists.find_run(of, ["a", "b"]) == range(1)
    assert picture_lists.find_run(of, ["c"]) == range(1, 2)
    assert picture_lists.find_run(of, ["c", "d", "e"]) == range(1, 3)
    assert picture_lists.find_run(of, list("abcde")) == range(3)
    for keys in (["a"], ["b", "a"], ["d", "e", "a"], list("abcdex"), ["a", "b", "d", "e"]):
        assert picture_lists.find_run(of, keys) is None


def test_ids_are_those_that_the_cache_had() -> None:
    first, second, third = (list_of([key]) for key in "abc")
    begun = {"pictures": first, "views": 2}
    grown = {"pictures": first, "views": 2, "appended": [second]}
    again = {"pictures": first, "views": 2, "appended": [second, third]}
    ids = [json_file.digest(each)[:16] for each in (again, grown, begun)]
    assert picture_lists.ids(again) == ids
    assert picture_lists.ids(begun) == ids[2:]
    assert [picture_lists.lists_at(again, each) for each in (begun, grown, again)] == [1, 2, 3]
    assert picture_lists.lists_at(again, {**begun, "views": 3}) is None
    assert picture_lists.lists_at(begun, grown) is None


def large_manifest(made: Path, pictures: int) -> dict[str, object]:
    """The manifest of a cache, as if it had so many pictures in shards of one."""
    about = manifest.read(made)
    about["identity"] = {
        **about["identity"],
        "pictures": {"count": pictures, "keys_digest": "00"},
        "rows_per_shard": 1,
    }
    about["id"] = json_file.digest(about["identity"])[:16]
    about["shards"] = [{"name": f"{i:06d}", "first": i, "count": 1} for i in range(pictures)]
    return about


@pytest.mark.parametrize(("pictures", "listed"), [(1024, True), (1025, False)])
def test_a_long_list_of_shards_is_left_out_and_read_back(
    made: Path, tmp_path: Path, pictures: int, listed: bool
) -> None:
    about = large_manifest(made, pictures)
    manifest.write(tmp_path / "manifest.json", about)
    assert ("shards" in json.loads((tmp_path / "manifest.json").read_text())) is listed
    assert manifest.read(tmp_path) == about


def test_shards_that_do_not_follow_are_always_listed(made: Path, tmp_path: Path) -> None:
    about = large_manifest(made, 1100)
    about["shards"] = [{**each, "first": each["first"] + 7} for each in about["shards"]]  # type: ignore[attr-defined]
    manifest.write(tmp_path / "manifest.json", about)
    assert "shards" in json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.read(tmp_path) == about


@pytest.mark.parametrize("pictures", [0, 2**53])
def test_a_file_cannot_ask_for_more_shards_than_memory_holds(
    made: Path, tmp_path: Path, pictures: int
) -> None:
    about = large_manifest(made, 3)
    about["identity"]["pictures"]["count"] = pictures  # type: ignore[index]
    about["id"] = json_file.digest(about["identity"])[:16]  # type: ignore[arg-type]
    del about["shards"]
    json_file.write_json(tmp_path / "manifest.json", about)
    with pytest.raises(UserError, match="shards are missing"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    "appended", [[], [{"count": 3}], "x", [{"count": 3, "keys_digest": "00", "more": 1}]]
)
def test_forged_lists_are_refused(made: Path, tmp_path: Path, appended: object) -> None:
    about = manifest.read(made)
    about["identity"] = {**about["identity"], "appended": appended}
    about["id"] = json_file.digest(about["identity"])[:16]
    json_file.write_json(tmp_path / "manifest.json", about)
    with pytest.raises(UserError, match=r"identity\.appended"):
        manifest.read(tmp_path)


def test_shards_that_are_not_those_of_the_lists_are_refused(made: Path, tmp_path: Path) -> None:
    about = manifest.read(made)
    about["identity"] = {**about["identity"], "appended": [{"count": 0, "keys_digest": "00"}]}
    about["id"] = json_file.digest(about["identity"])[:16]
    about["shards"] = [{**each, "first": each["first"] + 1} for each in about["shards"]]
    json_file.write_json(tmp_path / "manifest.json", about)
    with pytest.raises(UserError, match=r"identity\.appended"):
        manifest.read(tmp_path)


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from featcache.extraction import extract
    from tests.conftest import make_plan

    out = tmp_path_factory.mktemp("lists") / "made"
    extract.run(make_plan(photos), out, batch_size=4)
    return out
