"""`featcache info` says which recipes a cache serves: literals are compared with code, and its
answer with that of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featcache.catalog import recipe_files, recipe_needs, serves
from featcache.reading.cache import Cache
from student import recipes
from tests import student_fixtures as fx
from tests.conftest import python

SIX = "synthetic:levels=6,tokens=16,width=24,size=32"


@pytest.mark.parametrize("name", recipes.names())
def test_the_literal_is_what_the_default_configuration_needs(name: str) -> None:
    module = recipes.load(name)
    needs = module.needs(module.Config())
    stated = recipe_files.read_needs(Path(str(module.__file__)))
    assert stated == module.SERVED_BY
    assert stated.get("mask_ratio", module.Config().mask_ratio) == module.Config().mask_ratio
    optional = {"mask_ratio", "all_tokens", "derive", "teacher", "scale", "jitter", "size"}
    assert set(stated) - optional == {"fields", "levels"}
    assert stated.get("all_tokens", False) == (
        "features" in needs.fields and not needs.visible_only
    )
    assert stated.get("derive", "") == needs.derive
    assert stated["fields"] == needs.fields
    # what `extract --for` makes a cache with: the teacher, the crops and the size of the student
    assert stated.get("teacher", "") == needs.teacher
    assert stated.get("scale", (0.2, 1.0)) == needs.scale
    assert stated.get("jitter", 0.0) == needs.jitter
    assert stated.get("size", 224) == module.Config().img_size
    others = {field.rpartition("/")[0] for field in stated["fields"] if field.endswith("/features")}
    assert others == ({needs.second} if needs.second else set())
    assert tuple(serves._levels(stated["levels"], module.Config().teacher_depth)) == needs.levels


def test_every_recipe_is_known() -> None:
    assert sorted(recipe_needs.installed()) == recipes.names()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "SERVED_BY = {'fields': ('features',), 'levels': 'last:2'}",
            {"fields": ("features",), "levels": "last:2"},
        ),
        ("OTHER = {'fields': ()}", None),
        ("SERVED_BY = ['fields']", None),
        ("", None),
        ("raise SystemExit('it was run')\nSERVED_BY = {'levels': ''}", {"levels": ""}),
    ],
)
def test_a_file_is_parsed_and_never_run(text: str, expected: object, tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(text)
    assert recipe_files.read_needs(tmp_path / "recipe.py") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "serving"),
    [
        (("--levels", "last:5"), ["fd", "mae", "maskalign", "mralign", "mrmae"]),
        (("--levels", "all"), ["fd", "mae", "maskalign", "mralign", "mrmae"]),
        (("--levels", "last:3"), ["fd", "mae", "mrmae"]),
        (("--levels", "2,3,4,6"), ["fd", "mae", "mrmae"]),
        (("--levels", "2,3,4,5"), ["mae"]),
        (
            ("--levels", "last:5", "--tokens", "ranked", "--keep", "4"),
            ["mae", "maskalign", "mralign", "mrmae"],
        ),
        (("--levels", "last:5", "--tokens", "ranked", "--keep", "3"), ["mae"]),
        (
            ("--levels", "last:5", "--tokens", "ranked", "--pixels", "raw"),
            ["fd", "mae", "maskalign", "mralign", "mrmae"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_it_says_is_what_training_says(
    options: tuple[str, ...], serving: list[str], tmp_path: Path
) -> None:
    """A default configuration but for the size of the student, whose --dry-run passes where the
    recipe is served."""
    path = fx.extract(fx.pictures(), tmp_path / "c", *options, teacher=SIX)
    with Cache(path) as cache:
        said = serves.recipe_support(cache)
    assert [name for name, why in said.items() if not why] == serving
    for name, why in said.items():
        words = (
            "--recipe",
            name,
            "--cache",
            path,
            "--device",
            "cpu",
            "--out",
            tmp_path / "run",
            "--dry-run",
        )
        ran = fx.stud("train", *words, "--set", fx.RECIPES[name][0])  # a small encoder
        assert (ran.status == 0) == (not why), (name, why, ran.err)
        if why.startswith("level"):
            assert why.split(" not stored")[0] + " missing" in ran.line


def test_an_incomplete_cache(tmp_path: Path) -> None:
    path = fx.extract(
        fx.pictures(), tmp_path / "c", "--levels", "all", "--rows-per-shard", "12", teacher=SIX
    )
    (path / "shards" / "000001.json").unlink()
    with Cache(path) as cache:
        said = serves.recipe_support(cache)
    assert said["mae"] == ""
    assert said["maskalign"] == said["mralign"] == "the cache is incomplete"


def test_levels_that_were_added_count(tmp_path: Path) -> None:
    path = fx.extract(fx.pictures(), tmp_path / "c", "--levels", "last:3", teacher=SIX)
    fx.extract(fx.pictures(), path, "--add", "--levels", "2,3", teacher=SIX)
    with Cache(path) as cache:
        said = serves.recipe_support(cache)
    assert {said[name] for name in ("mae", "maskalign", "mralign")} == {""}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ""),
        ({"derive": "z"}, "its teacher has no projection (student train --set target=f)"),
        ({"derive": "f"}, ""),
        ({"keep": 14}, ""),
        ({"keep": 14, "all_tokens": True}, "14 patches are kept, all are read"),
        ({"keep": 2, "mask_ratio": 0.5}, "2 patches are kept, 8 are visible"),
    ],
)
def test_what_a_literal_may_ask(changed: dict[str, object], expected: str) -> None:
    """Of the small cache, which is said to keep only some of its patches."""
    with fx.open_cache() as cache:
        cache.identity = {
            **cache.identity,
            **{key: value for key, value in changed.items() if key == "keep"},
        }
        needs = {"fields": ("features",), "levels": "last:1", "mask_ratio": 0.75, **changed}
        assert serves.unsupported_reason(cache, needs) == expected


def test_a_projection_serves() -> None:
    with fx.open_cache() as cache:
        cache.tail = lambda teacher=None: {"proj": None}  # type: ignore[method-assign,assignment]
        assert (
            serves.unsupported_reason(
                cache,
                {"fields": ("features",), "levels": "last:1", "mask_ratio": 0.0, "derive": "z"},
            )
            == ""
        )


def test_no_recipe_and_no_torch_is_imported() -> None:
    code = (
        "import json, sys, featcache.catalog.serves as serves, featcache\n"
        "answer = serves.recipe_support(featcache.open(sys.argv[1]))\n"
        "names = ('torch', 'timm', 'student', 'student.recipes')\n"
        "heavy = [name for name in names if name in sys.modules]\n"
        "print(json.dumps([answer, heavy]))"
    )
    ran = python(code, fx.cache_path())
    assert ran.returncode == 0, ran.stderr
    answer, heavy = json.loads(ran.stdout)
    assert heavy == []
    assert sorted(answer) == recipes.names()
