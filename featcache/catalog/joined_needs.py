"""Several recipes ask for one cache: their needs are joined, or it is said why no one cache serves
them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from featcache.catalog.recipe_files import NEEDS_LITERAL
from featcache.catalog.recipe_needs import RecipeNeeds
from featcache.errors import UsageError, counted
from featcache.reading import crop_range
from featcache.reading.crop_range import Scale

MOST_VIEWS = 64  # no more are proposed


@dataclass(frozen=True)
class GivenOptions:
    """Hold what the user says of the cache beside the recipes; None where nothing is said."""

    teacher: str | None = None
    scale: Scale | None = None
    jitter: float | None = None
    size: int | None = None
    views: int | None = 1  # None: of a cache that is there already


@dataclass(frozen=True)
class CacheNeeds:
    """Hold what one cache that serves several recipes is made with."""

    teacher: str
    levels: int  # its last so many, at least one
    others: tuple[str, ...]  # other teachers and tokenizers
    feature_others: tuple[str, ...]  # those of them that have levels
    scale: Scale
    jitter: float
    size: int


def join_needs(needs: Sequence[RecipeNeeds], given: GivenOptions) -> CacheNeeds:
    """Join the needs of recipes that read a cache, at least one. UsageError where no one cache
    serves them, or not with what is given."""
    for each in needs:
        _check_given(each, given)
    _check_same(needs, given)
    scale = given.scale or (min(n.scale[0] for n in needs), max(n.scale[1] for n in needs))
    _check_views(needs, scale, given)
    first, arrays = needs[0], [field.rpartition("/") for n in needs for field in n.fields]
    return CacheNeeds(
        teacher=given.teacher or first.teacher,
        levels=max(1, *(n.levels for n in needs)),
        others=_once(name for name, _, _ in arrays if name),
        feature_others=_once(name for name, _, array in arrays if name and array != "token_ids"),
        scale=scale,
        jitter=first.jitter,
        size=given.size or first.size,
    )


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _check_given(needs: RecipeNeeds, given: GivenOptions) -> None:
    if given.teacher is None and not needs.teacher:
        raise UsageError(
            f"--for {needs.name}: its {NEEDS_LITERAL} names no teacher, and none is given; "
            "give --teacher NAME"
        )
    if given.jitter is not None and given.jitter != needs.jitter:
        raise UsageError(
            f"--for {needs.name} needs views whose colours are changed by --jitter "
            f"{needs.jitter:g}, {given.jitter:g} is given; leave that out, or leave {needs.name} "
            "out of --for"
        )
    if given.scale is not None and not crop_range.is_within(needs.scale, given.scale):
        raise UsageError(
            f"--for {needs.name} needs views of --scale {_pair(needs.scale)}, "
            f"{_pair(given.scale)} is given; give a range that holds it, or leave that out"
        )


def _check_same(needs: Sequence[RecipeNeeds], given: GivenOptions) -> None:
    """Refuse recipes that differ in what one cache has once. A recipe is trained on a cache's first
    teacher, so that another one beside it serves none."""
    fields = [name for name in ("teacher", "jitter", "size") if getattr(given, name) is None]
    differing = [name for name in fields if len(_groups(needs, name)) > 1]
    if differing:
        facts = "; ".join(f"{name} is {_values(needs, name)}" for name in differing)
        raise UsageError(
            f"--for {_names(needs)}: no one cache serves them: {facts}; make "
            f"{_commands(needs, *differing)}"
        )


def _check_views(needs: Sequence[RecipeNeeds], scale: Scale, given: GivenOptions) -> None:
    """Refuse a wide range of crops where too many pictures would have no view in the range of a
    recipe, which shows no other views."""
    if given.views is None:
        return
    for each in needs:
        without = _rejected(each, scale) ** given.views
        if without > crop_range.LEFT_OUT:
            way_out = "leave --scale out" if given.scale else f"make {_commands(needs, 'scale')}"
            raise UsageError(
                f"--for {_names(needs)}: crops are drawn at scale {_pair(scale)}, of which "
                f"{each.name} shows those of {_pair(each.scale)}: with --views {given.views} about "
                f"{without:.2%} of the pictures have none, {crop_range.LEFT_OUT:.2%} may be left "
                f"out; {_more_views(needs, scale)}{way_out}"
            )


def _rejected(needs: RecipeNeeds, scale: Scale) -> float:
    return 0.0 if needs.scale == scale else crop_range.rejected_share(needs.scale, scale)


def _more_views(needs: Sequence[RecipeNeeds], scale: Scale) -> str:
    """Propose as many views as serve all; nothing where those are too many."""
    share = max(_rejected(each, scale) for each in needs)
    if share >= 1 or (views := math.ceil(math.log(crop_range.LEFT_OUT, share))) > MOST_VIEWS:
        return ""
    return f"give --views {views}, or "


def _groups(needs: Sequence[RecipeNeeds], *fields: str) -> dict[tuple[Any, ...], list[RecipeNeeds]]:
    """Group the recipes that have the same values of these fields."""
    groups: dict[tuple[Any, ...], list[RecipeNeeds]] = {}
    for each in needs:
        groups.setdefault(tuple(getattr(each, name) for name in fields), []).append(each)
    return groups


def _values(needs: Sequence[RecipeNeeds], field: str) -> str:
    return ", ".join(
        f"{value if isinstance(value, str) else f'{value:g}'} for {_names(group)}"
        for (value,), group in _groups(needs, field).items()
    )


def _commands(needs: Sequence[RecipeNeeds], *fields: str) -> str:
    groups = _groups(needs, *fields).values()
    lines = " and ".join(f"--for {_names(group)}" for group in groups)
    return f"{counted(len(groups), 'cache')}, with {len(groups)} commands: {lines}"


def _names(needs: Iterable[RecipeNeeds]) -> str:
    return ",".join(each.name for each in needs)


def _pair(scale: Scale) -> str:
    return f"{scale[0]:g},{scale[1]:g}"
