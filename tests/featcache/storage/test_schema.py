"""The JSON of a cache is checked field by field: old caches stay readable, and what is of another
kind is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import UserError
from featcache.storage import manifest, schema, statistics
from featcache.storage.cross_check import cross_problem
from featcache.views.policy import AREA
from featcache.views.render import FILTERS
from tests import hostile_json as hostile
from tests.conftest import make_plan


@pytest.fixture(scope="module")
def about(photos: Path) -> dict[str, Any]:
    return make_plan(photos, tokens="ranked", keep=3).manifest()


def change(about: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    steps = tuple(int(step) if step.isdecimal() else step for step in where.split("."))
    return hostile.changed(about, steps, value)


def test_what_extraction_writes_has_no_problem(about: dict[str, Any]) -> None:
    assert schema.schema_problem(schema.Manifest, about) == ""
    assert cross_problem(about) == ""


@pytest.mark.parametrize("field", ["provenance.versions", "identity.teacher.weight_hash"])
def test_fields_that_old_caches_lack(about: dict[str, Any], field: str) -> None:
    there = hostile.removed(about, tuple(field.split(".")))
    assert schema.schema_problem(schema.Manifest, there) == ""


def test_provenance_may_say_more(about: dict[str, Any]) -> None:
    there = change(about, "provenance.machine", {"name": "a", "cores": 2})
    assert schema.schema_problem(schema.Manifest, there) == ""


def test_filters_are_those_of_a_policy() -> None:
    assert set(schema.Policy.model_fields["filter"].annotation.__args__) == {*FILTERS, AREA}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("identity.views", True),
        ("identity.views", 0),
        ("identity.views", 10**9),
        ("identity.views", 1.0),
        ("identity.views", "3"),
        ("identity.levels", []),
        ("identity.levels", [True]),
        ("identity.levels", list(range(1, 9999))),
        ("identity.first_view", -1),
        ("identity.first_view", None),
        ("identity.keep", None),
        ("identity.pictures", {}),
        ("identity.pictures.count", 10**18),
        ("identity.pictures.keys_digest", 5),
        ("identity.teacher.width", 10**9),
        ("identity.teacher.name", "\x1b[31m"),
        ("identity.teacher.name", ""),
        ("identity.policy.scale", [0.5]),
        ("identity.policy.size", 10**9),
        ("identity.policy.seed", 2**64),
        ("identity.policy.more", 1),
        ("identity.more", 1),
        ("identity.pixel_path", []),
        ("identity.store", "../zarr"),
        ("provenance", {}),
        ("provenance.batch_size", 0),
        ("provenance.source", ["a"]),
        ("provenance.machine", {"a": {"b": {}}}),
        ("arrays", {}),
        ("arrays.area", {}),
        ("arrays.area.dtype", "|O8"),
        ("arrays.area.item", [-1]),
        ("arrays.area.item", [2**40]),
        ("arrays.area.split", 0),
        ("shards", []),
        ("shards.0", "x"),
        ("shards.0.name", "../000000"),
        ("shards.0.name", "manifest.copy"),
        ("shards.0.count", 0),
        ("shards.0.first", -1),
        ("files", -1),
        ("files", {"../x.safetensors": {"bytes": 1, "crc32c": "00000000"}}),
        ("files", {"manifest.json": {"bytes": 1, "crc32c": "00000000"}}),
        ("files", {"a.safetensors": {"bytes": -1, "crc32c": "00000000"}}),
        ("id", 5),
    ],
)
def test_a_field_of_another_kind_is_named(about: dict[str, Any], field: str, value: Any) -> None:
    assert field.rpartition(".")[2] in schema.schema_problem(
        schema.Manifest, change(about, field, value)
    )


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("identity.levels", [3, 1], "ascending blocks"),
        ("identity.levels", [1, 1], "ascending blocks"),
        ("identity.levels", [1, 4], "ascending blocks"),
        ("identity.keep", 5, "keep is 5 of 4 patches"),
        ("identity.tokens", "raster", "keep is 3 of 4 patches"),
        ("identity.policy.scale", [0.9, 0.1], "scale"),
        ("identity.pixel_path", {}, "decoder"),
        ("identity.rows_per_shard", 4, "has 5 pictures of at most 4"),
        ("identity.pictures.count", 99, "its shards have fewer"),
        ("shards.1.first", 4, "does not begin where"),
        ("shards.1.name", "000000", "does not begin where"),
        ("arrays.crop.item", [5], "5 of top_left_height_width"),
        ("arrays.features.item", [2, 4, 9], "9 of channel"),
        ("arrays.features.item", [9, 4, 8], "9 of level"),
        ("arrays.crop.dtype", "<f4", "not as this version knows it"),
        ("arrays.flip.per_view", False, "flip"),
        ("arrays.row_crc.item", [3], "row_crc"),
    ],
)
def test_fields_that_do_not_fit_together(
    about: dict[str, Any], field: str, value: Any, told: str
) -> None:
    there = change(about, field, value)
    assert schema.schema_problem(schema.Manifest, there) == ""
    assert told in cross_problem(there)


RECORD = {
    "shard": "000000",
    "rows": 4,
    "keys_digest": "ab" * 16,
    "quarantined": [{"key": "a", "reason": "b"}],
    "files": {"zarr.json": {"bytes": 1, "crc32c": "00000000"}},
    "statistics": {"features": {"min": -1.5, "max": 2, "non_finite": 0, "norm": 3.25}},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", -1),
        ("rows", 10**18),
        ("rows", False),
        ("quarantined", [["a", "b"]]),
        ("quarantined.0", {"key": "a"}),
        ("quarantined.0.key", "\ud800"),
        ("files", []),
        ("files", {"../zarr.json": {"bytes": 1, "crc32c": "00000000"}}),
        ("statistics.features", {"min": 0}),
        ("statistics.features.min", None),
        ("statistics.features.max", 10**400),
        ("statistics.features.norm", "3"),
        ("statistics.features.more", []),
        ("content", 5),
        ("more", 1),
    ],
)
def test_a_record_with_another_field(field: str, value: Any) -> None:
    assert schema.schema_problem(schema.Record, RECORD) == ""
    assert schema.schema_problem(schema.Record, change(RECORD, field, value))


def test_a_shard_without_rows_has_no_mean() -> None:
    record = {**RECORD, "rows": 0}
    assert statistics.merge_totals([statistics.totals([record, record])])["features"]["norm"] == 0


def test_the_line_names_file_field_and_value(about: dict[str, Any], tmp_path: Path) -> None:
    there = change(copy.deepcopy(about), "arrays.area.item", [-1])
    (tmp_path / "shards").mkdir()
    hostile.make_valid(tmp_path, there)
    with pytest.raises(UserError, match=r"manifest\.json.*arrays\.area\.item\.0 is -1") as caught:
        manifest.read(tmp_path)
    assert "\n" not in str(caught.value)
