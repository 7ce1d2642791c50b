"""`featcache extract --for RECIPE[,RECIPE]` chooses the options of a cache that serves them.

An option that is given as well wins where the cache still serves every one of them. Nothing of this
is part of what the cache is: the options that were chosen, spelled out, make the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from featcache.catalog import joined_needs, recipe_needs, serves
from featcache.catalog.joined_needs import CacheNeeds, GivenOptions
from featcache.catalog.recipe_needs import RecipeNeeds
from featcache.console.extract_options import ExtractOptions
from featcache.console.text import say
from featcache.errors import UsageError, command_line, counted
from featcache.storage import manifest
from featcache.views.policy import Policy, load_policy

if TYPE_CHECKING:
    from featcache.extraction.plan import Plan


@dataclass(frozen=True)
class Choice:
    """Hold the options of an extraction with those that were chosen for recipes; none are without
    --for."""

    options: ExtractOptions
    needs: tuple[RecipeNeeds, ...] = ()
    words: tuple[str, ...] = ()  # the chosen ones, as they would be typed

    @property
    def recipes(self) -> str:
        """Return the recipes' names, as --for takes them."""
        return ",".join(each.name for each in self.needs)

    @property
    def record(self) -> dict[str, Any]:
        """Return what a summary says of --for; empty without it."""
        names = [each.name for each in self.needs]
        return {"for": {"recipes": names, "options": list(self.words)}} if names else {}

    @property
    def nothing_to_extract(self) -> str:
        """Say that these recipes read no cache and no teacher is given; empty where there is
        work."""
        if not self.needs or self.options.names or any(each.fields for each in self.needs):
            return ""
        return f"--for {self.recipes}: no cache is read, nothing to extract"


def choose(options: ExtractOptions, say: Callable[[str], None] = say) -> Choice:
    """Choose what the recipes of --for need and no option gives, and say so. UsageError where no
    one cache serves them, or not with the options that are given."""
    if options.recipes is None:
        return Choice(options)
    names = dict.fromkeys(name.strip() for name in options.recipes.split(","))
    needs = tuple(recipe_needs.find_needs(name) for name in names)
    readers = [each for each in needs if each.fields]
    if not readers:
        return Choice(options, needs)
    choice = _with_chosen(options, needs, readers)
    say(_note(choice, readers))
    return choice


def _with_chosen(
    options: ExtractOptions, needs: tuple[RecipeNeeds, ...], readers: list[RecipeNeeds]
) -> Choice:
    given = _given(options, readers)
    cache = joined_needs.join_needs(readers, given)
    own = [] if cache.teacher in options.names else [cache.teacher]
    added = [*own, *(name for name in cache.others if name not in options.names)]
    names = (*own, *options.names, *added[len(own) :])
    levels = _levels(options.levels, names, cache)
    policy, usual = _policy(cache, given), Policy()
    changed = {key: value for key, value in policy.items() if value != getattr(usual, key)}
    _check_registered(added)
    words = [
        *(word for name in added for word in ("--teacher", name)),
        *(word for value in levels for word in ("--levels", value)),
        *(word for key, value in changed.items() for word in (f"--{key}", _text(value))),
    ]
    options = replace(options, names=names, levels=(*options.levels, *levels), **changed)
    return Choice(options, needs, tuple(words))


def _given(options: ExtractOptions, readers: list[RecipeNeeds]) -> GivenOptions:
    """Return what is given; a named policy gives all of its fields."""
    policy = load_policy(options.policy_name, **options.policy_changes)
    named = options.policy_name != "default"
    return GivenOptions(
        teacher=_own_teacher(options.names, readers) or _added_to(options),
        scale=policy.scale if named or options.scale is not None else None,
        jitter=policy.jitter if named or options.jitter is not None else None,
        size=policy.size if named or options.size is not None else None,
        views=None if options.add else options.view_count,
    )


def _policy(cache: CacheNeeds, given: GivenOptions) -> dict[str, Any]:
    """Return the fields of the policy that are chosen, because none is given."""
    wanted = {"size": cache.size, "scale": cache.scale, "jitter": cache.jitter}
    return {key: value for key, value in wanted.items() if getattr(given, key) is None}


def _text(value: Any) -> str:
    """Write a value exactly, as an option takes it."""
    parts = value if isinstance(value, tuple) else (value,)
    return ",".join(f"{part:g}" if float(f"{part:g}") == part else repr(part) for part in parts)


def _levels(values: Sequence[str], names: Sequence[str], cache: CacheNeeds) -> list[str]:
    """Return the values of --levels that are lacking: of the cache's own teacher, and of others
    that have levels."""
    from featcache.extraction.options import per_teacher

    found = per_teacher("--levels", values, names)
    own = [f"last:{cache.levels}"] if found[cache.teacher] is None else []
    others = [name for name in cache.feature_others if found[name] is None]
    return [*own, *(f"{name}=last:1" for name in others)]


def _check_registered(names: Sequence[str]) -> None:
    """Refuse code and files that a recipe's literal names, and not the command line."""
    from featcache import teachers

    for name in names:
        if not teachers.is_registered(name):
            raise UsageError(
                f"--for: the teacher {name!r} is named by a recipe: code and files are taken only "
                "from your own command line; if it is one of your own, name it with --teacher"
            )


def _note(choice: Choice, readers: list[RecipeNeeds]) -> str:
    chosen = command_line(*choice.words) if choice.words else "all that they need is given"
    idle = [each.name for each in choice.needs if not each.fields]
    first = _own_teacher(choice.options.names, readers)
    others = [each.name for each in readers if each.teacher not in ("", first)]
    notes = [
        *([f"{', '.join(idle)}: no cache is read"] if idle else []),
        *([f"{', '.join(others)}: published with another teacher, so train with --cache"]
          if others else []),
    ]  # fmt: skip
    return f"note: --for {choice.recipes}: {'; '.join([chosen, *notes])}"


def _own_teacher(names: Sequence[str], readers: list[RecipeNeeds]) -> str | None:
    """Return the first that no recipe reads beside the cache's own teacher: a second one, or a
    tokenizer."""
    others = {field.rpartition("/")[0] for each in readers for field in each.fields}
    return next((name for name in names if name not in others), None)


def _added_to(options: ExtractOptions) -> str | None:
    """Return the teacher of the cache that is added to; None without --add."""
    if not options.add or options.out is None or not (options.out / manifest.NAME).is_file():
        return None
    return str(manifest.read(options.out)["identity"]["teacher"]["name"])


def check_plans(choice: Choice, plans: Sequence[Plan]) -> None:
    """Raise UsageError where the cache would not serve a recipe, with the teachers' own sizes
    known."""
    for each in choice.needs:
        if not each.fields:
            continue
        stored = _stored(plans)
        if why := serves.lacking(stored, each.literal) or _misfit(plans, each):
            raise UsageError(
                f"--for {each.name}: with {_given_words(choice)}, {why}; give what it needs or "
                f"leave that out, or leave {each.name} out of --for"
            )


def _stored(plans: Sequence[Plan]) -> serves.StoredFacts:
    """Return the facts of the cache that is planned."""
    first, *others = plans
    beside = [f"{plan.teacher.name}/{array.name}" for plan in others for array in plan.arrays]
    return serves.StoredFacts(
        depth=first.teacher.depth,
        patches=first.teacher.patches,
        size=first.policy.size,
        input_px=first.teacher.input_px,
        keep=first.keep,
        levels=first.levels,
        fields=[*(array.name for array in first.arrays), *beside],
        has_projection=lambda: "proj" in first.teacher.tail(),
    )


def _misfit(plans: Sequence[Plan], needs: RecipeNeeds) -> str:
    """Say how the student's grid, or what is read of another teacher, does not fit."""
    first, *others = plans
    patches = first.teacher.patches
    for plan in others:
        name = plan.teacher.name
        read = [field for field in needs.fields if field.rpartition("/")[0] == name]
        if read and plan.teacher.patches != patches:
            return (
                f"{name} has {counted(plan.teacher.patches, 'patch', 'patches')}, "
                f"{first.teacher.name} has {patches}"
            )
        if f"{name}/features" in read and plan.teacher.depth not in plan.levels:
            return f"level {plan.teacher.depth} of {name} is not stored (--levels {name}=last:1)"
        if f"{name}/features" in read and plan.keep is not None:
            return (
                f"{counted(plan.keep, 'patch', 'patches')} of {name} are kept "
                "(--keep), all are read"
            )
    return ""


def _given_words(choice: Choice) -> str:
    """The options of which one does not fit, as they stand now."""
    options = choice.options
    words = [
        *(word for name in options.names for word in ("--teacher", name)),
        *(word for value in options.levels for word in ("--levels", value)),
        *(("--keep", options.keep) if options.keep else ()),
    ]
    return command_line(*words)
