"""What a recipe needs and a cache lacks, in words."""

from __future__ import annotations

from featcache.reading.cache import Cache
from student.config import RecipeConfig
from student.recipes import TargetSpec


def keeps_few(cache: Cache, spec: TargetSpec) -> bool:
    """Whether only the first tokens of each view are stored, and the recipe reads tokens."""
    return "features" in spec.fields and "keep" in cache.identity


def _kept(cache: Cache) -> str:
    keep, patches = cache.identity["keep"], cache.identity["teacher"]["patches"]
    return (
        f"the cache keeps the first {keep} of {patches} patches of each view (--keep), in their "
        "stored order"
    )


def missing(cache: Cache, spec: TargetSpec, config: RecipeConfig) -> list[str]:
    """What a recipe needs and this cache lacks, in words."""
    levels = missing_levels(cache, spec)
    fields = [field for field in spec.fields if field not in cache.fields]
    shards = f"{len(cache.records)} of {len(cache.manifest['shards'])} shards"
    found = {
        f"it is incomplete ({shards}; --fallback online trains all the same)": not cache.complete
        and not cache.absent,
        f"field {', '.join(fields)} is missing, it has {', '.join(cache.fields)}": fields,
        f"level {', '.join(map(str, levels))} is missing, it has "
        f"{', '.join(map(str, cache.levels))}": levels,
    }
    own = [text for text, lacks in found.items() if lacks]
    return [*own, *missing_tokens(cache, spec, config), *second_missing(cache, spec)]


def missing_levels(cache: Cache, spec: TargetSpec) -> list[int]:
    return sorted(set(spec.levels) - set(cache.levels))


def missing_tokens(cache: Cache, spec: TargetSpec, config: RecipeConfig) -> list[str]:
    """Why the tokens of a kept cache are not those the recipe reads, and what to set."""
    if not keeps_few(cache, spec):
        return []
    if spec.moments:
        return [
            f"{_kept(cache)}, and statistics of all are wanted: --set another target_norm, or take "
            "another cache"
        ]
    if not spec.visible_only:
        return [f"{_kept(cache)}, and the recipe reads all"]
    if config.mask != "stored":
        return [
            f"{_kept(cache)}, and mask={config.mask} shows others: --set mask=stored, or take "
            "another"
        ]
    if config.visible > cache.identity["keep"]:
        text = (
            f"and mask_ratio={config.mask_ratio:g} shows {config.visible}: --set a larger "
            "mask_ratio, or take another"
        )
        return [f"{_kept(cache)}, {text}"]
    return []


def second_missing(cache: Cache, spec: TargetSpec) -> list[str]:
    """Why a cache that has the second teacher's arrays does not serve, in words."""
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
        f"{views} of its {cache.views} views have {name}": views < cache.views,
        f"{name} has {patches} patches, {spec.patches} are needed": patches != spec.patches,
        f"of {name} it keeps {identity.get('keep')} patches, and others may be "
        "visible": second_keeps_few(cache, spec),
    }
    return [text for text, lacks in found.items() if lacks]


def second_keeps_few(cache: Cache, spec: TargetSpec) -> bool:
    """Whether only some patches of the second teacher are stored; in its own order, which is not
    the mask's."""
    there = spec.second and f"{spec.second}/features" in cache.fields
    return bool(there) and "keep" in cache.manifest_of(spec.second)["identity"]
