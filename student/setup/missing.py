"""A recipe's needs are compared with a cache, and what it lacks is said in words."""

from __future__ import annotations

from featcache.errors import counted, listed
from featcache.reading.cache import Cache
from student.config import RecipeConfig
from student.recipes import TargetSpec


def keeps_few(cache: Cache, spec: TargetSpec) -> bool:
    """Tell whether only the first tokens of each view are stored, and the recipe reads tokens."""
    return "features" in spec.fields and "keep" in cache.identity


def kept_text(cache: Cache) -> str:
    """Say in words how many patches a cache keeps."""
    keep, patches = cache.identity["keep"], cache.identity["teacher"]["patches"]
    return (
        f"the cache keeps the first {keep} of {counted(patches, 'patch', 'patches')} of "
        "each view (--keep), in their "
        "stored order"
    )


def missing(cache: Cache, spec: TargetSpec, config: RecipeConfig) -> list[str]:
    """List in words what a recipe needs and this cache lacks."""
    levels = missing_levels(cache, spec)
    if lacks_attention(cache, spec):
        return [no_attention_text(cache.teachers[0], config)]
    fields = [field for field in spec.fields if field not in cache.fields]
    shards = f"{len(cache.records)} of {counted(len(cache.manifest['shards']), 'shard')}"
    found = {
        f"it is incomplete ({shards}; --fallback online trains all the same)": not cache.complete
        and not cache.absent,
        f"{listed(fields, 'field {} is', 'fields {} are')} missing, it has "
        f"{', '.join(cache.fields)}": fields,
        f"{listed(levels, 'level {} is', 'levels {} are')} missing, it has "
        f"{', '.join(map(str, cache.levels))}{_fewer_levels(cache, config)}": levels,
    }
    own = [text for text, lacks in found.items() if lacks]
    return [*own, *missing_tokens(cache, spec, config), *second_missing(cache, spec)]


def lacks_attention(cache: Cache, spec: TargetSpec) -> bool:
    """Tell whether a recipe needs attention of a teacher that gives none: of all others it is
    stored, so that no extraction adds it."""
    stored = {"features", "mask_order"} <= set(cache.fields)
    return "attention" in spec.fields and stored and "attention" not in cache.fields


def no_attention_text(teacher: str, config: RecipeConfig) -> str:
    """Say in words that a mask by attention cannot be had, and what can."""
    return (
        f"mask={config.mask} reads attention, and teacher {teacher!r} has none (no [CLS] token, no "
        "attention pool): --set mask=uniform, or take another teacher, such as clip-b16"
    )


def missing_levels(cache: Cache, spec: TargetSpec) -> list[int]:
    """Return the levels that a recipe needs and this cache lacks, ascending."""
    return sorted(set(spec.levels) - set(cache.levels))


def _fewer_levels(cache: Cache, config: RecipeConfig) -> str:
    """Say which setting reads the last levels of a cache alone, where the recipe has such a one."""
    if not hasattr(config, "level_weights"):
        return ""
    stored, depth = set(cache.levels), config.teacher_depth
    count = next(n for n in range(depth + 1) if depth - n not in stored)
    return f" (--set level_weights=top:{count} reads its last)" if count else ""


def missing_tokens(cache: Cache, spec: TargetSpec, config: RecipeConfig) -> list[str]:
    """Say why the tokens of a kept cache are not those the recipe reads, and what to set."""
    if not keeps_few(cache, spec):
        return []
    problems = {
        "statistics of all are wanted: --set another target_norm, or take another "
        "cache": spec.moments,
        "the recipe reads all": not spec.visible_only,
        f"mask={config.mask} shows others: --set mask=stored, or take another": config.mask
        != "stored",
        f"mask_ratio={config.mask_ratio:g} shows {config.visible}: --set a larger mask_ratio, or "
        "take another": config.visible > cache.identity["keep"],
    }
    first = [problem for problem, lacks in problems.items() if lacks][:1]
    return [f"{kept_text(cache)}, and {problem}" for problem in first]


def second_missing(cache: Cache, spec: TargetSpec) -> list[str]:
    """Say why a cache that has the second teacher's arrays does not serve."""
    name = spec.second
    if not name or f"{name}/features" not in cache.fields:  # which the missing field says
        return []
    identity = cache.manifest_of(name)["identity"]
    levels, views, patches = (
        cache.levels_of(name),
        cache.views_of(name),
        identity["teacher"]["patches"],
    )
    found = {
        f"level {spec.second_level} of {name} is missing, it has "
        f"{', '.join(map(str, levels))}": spec.second_level not in levels,
        f"{views} of its {counted(cache.views, 'view has', 'views have')} {name}": views
        < cache.views,
        f"{name} has {counted(patches, 'patch', 'patches')}, {spec.patches} are needed": patches
        != spec.patches,
        f"of {name} it keeps {counted(identity.get('keep'), 'patch', 'patches')}, and "
        "others may be "
        "visible": second_keeps_few(cache, spec),
    }
    return [text for text, lacks in found.items() if lacks]


def second_keeps_few(cache: Cache, spec: TargetSpec) -> bool:
    """Tell whether only some patches of the second teacher are stored; they lie in its own order,
    which is not the mask's."""
    is_stored = spec.second and f"{spec.second}/features" in cache.fields
    return bool(is_stored) and "keep" in cache.manifest_of(spec.second)["identity"]
