"""The needs of several recipes are joined to those of one cache, or refused with a way out."""

from __future__ import annotations

from typing import Any

import pytest

from featcache.catalog.joined_needs import GivenOptions, join_needs
from featcache.catalog.recipe_needs import RecipeNeeds
from featcache.errors import UsageError


def recipe(name: str, *fields: str, **changes: Any) -> RecipeNeeds:
    values = {"levels": 1, "teacher": "clip-b16", **changes}
    return RecipeNeeds(name=name, literal={}, fields=fields or ("features",), **values)


def test_levels_and_other_teachers_are_the_union() -> None:
    found = join_needs(
        [
            recipe("a", "features", "dvae/token_ids", levels=3),
            recipe("b", "dvae/token_ids", "attention", "dino-b16/features", levels=0),
            recipe("c", levels=5),
        ],
        GivenOptions(),
    )
    assert (found.teacher, found.levels) == ("clip-b16", 5)
    assert found.others == ("dvae", "dino-b16")
    assert found.feature_others == ("dino-b16",)
    assert (found.scale, found.jitter, found.size) == ((0.2, 1.0), 0.0, 224)


def test_a_cache_has_a_level_though_none_is_read() -> None:
    assert join_needs([recipe("a", "dvae/token_ids", levels=0)], GivenOptions()).levels == 1


def test_the_crops_hold_those_of_all_where_the_views_suffice() -> None:
    """About 18 % of the views of (0.08, 1) are below 0.2, so of four views 0.1 % are."""
    needs = [recipe("a"), recipe("b", scale=(0.08, 0.9))]
    assert join_needs(needs, GivenOptions(views=8)).scale == (0.08, 1.0)
    assert join_needs([recipe("a"), recipe("b")], GivenOptions(views=1)).scale == (0.2, 1.0)
    wide = [recipe("a"), recipe("b", scale=(0.08, 1.0))]
    assert join_needs(wide, GivenOptions(views=4)).scale == (0.08, 1.0)
    assert join_needs(wide, GivenOptions(views=None)).scale == (0.08, 1.0)
    with pytest.raises(UsageError) as caught:
        join_needs(wide, GivenOptions(views=3))
    message = str(caught.value)
    assert message.startswith("--for a,b: crops are drawn at scale 0.08,1, of which a shows ")
    assert "with --views 3 about 0.55% of the pictures have none, 0.10% may be left out" in message
    assert message.endswith(
        "give --views 4, or make 2 caches, with 2 commands: --for a and --for b"
    )


def test_a_hopeless_range_is_not_cured_by_views() -> None:
    needs = [recipe("a", scale=(0.01, 1.0)), recipe("b", scale=(0.99, 1.0))]
    with pytest.raises(UsageError, match=r"left out; make 2 caches, with 2 commands"):
        join_needs(needs, GivenOptions(views=40))


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        ({"jitter": 0.4}, "jitter is 0 for a,c, 0.4 for b"),
        ({"size": 112}, "size is 224 for a,c, 112 for b"),
        ({"teacher": "dino-b16"}, "teacher is clip-b16 for a,c, dino-b16 for b"),
        (
            {"jitter": 0.4, "size": 112},
            "jitter is 0 for a,c, 0.4 for b; size is 224 for a,c, 112 for b",
        ),
    ],
)
def test_what_one_cache_has_once(changed: dict[str, Any], fact: str) -> None:
    with pytest.raises(UsageError) as caught:
        join_needs([recipe("a"), recipe("b", **changed), recipe("c")], GivenOptions())
    assert str(caught.value) == (
        f"--for a,b,c: no one cache serves them: {fact}; make 2 caches, with 2 commands: "
        "--for a,c and --for b"
    )


def test_a_teacher_and_a_size_that_are_given_are_for_all() -> None:
    needs = [recipe("a", teacher="dino-b16", size=112), recipe("b"), recipe("c", teacher="")]
    found = join_needs(needs, GivenOptions(teacher="clip-b32", size=64))
    assert (found.teacher, found.size) == ("clip-b32", 64)


@pytest.mark.parametrize(
    ("needs", "given", "message"),
    [
        (
            recipe("a", jitter=0.4),
            GivenOptions(jitter=0.0),
            "--for a needs views whose colours are changed by --jitter 0.4, 0 is given; leave that "
            "out, or leave a out of --for",
        ),
        (
            recipe("a"),
            GivenOptions(scale=(0.3, 1.0)),
            "--for a needs views of --scale 0.2,1, 0.3,1 is given; give a range that holds it, or "
            "leave that out",
        ),
        (
            recipe("a", teacher=""),
            GivenOptions(),
            "--for a: its SERVED_BY names no teacher, and none is given; give --teacher NAME",
        ),
    ],
)
def test_what_is_given_and_does_not_serve(
    needs: RecipeNeeds, given: GivenOptions, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        join_needs([recipe("other", jitter=needs.jitter), needs], given)
    assert str(caught.value).replace("other", "a") == message


def test_a_wider_range_may_be_given() -> None:
    assert join_needs([recipe("a")], GivenOptions(scale=(0.08, 1.0), views=4)).scale == (0.08, 1.0)
    with pytest.raises(UsageError, match=r"give --views 4, or leave --scale out$"):
        join_needs([recipe("a")], GivenOptions(scale=(0.08, 1.0), views=1))
