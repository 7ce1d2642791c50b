"""From what a recipe needs to a cache that has it, or to the command that would make one.

Facts of a cache (view size, patch grid, teacher) are filled into the recipe's configuration; what the user set by hand
must agree with them. Caches are looked for under $FEATCACHE_HOME unless one is given.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import home, images, manifest
from featcache.errors import IdentityError, UsageError, UserError
from featcache.manifest import REGISTERED
from featcache.reader import Cache
from featcache.views import Policy
from student.config import RecipeConfig, from_overrides
from student.recipes import TargetSpec


@dataclass(frozen=True)
class Found:
    """A cache that serves the recipe, and the configuration with its facts."""

    cache: Cache
    config: RecipeConfig
    spec: TargetSpec


def with_facts(kind: type[RecipeConfig], overrides: Sequence[str], facts: dict[str, Any]) -> RecipeConfig:
    """Facts first, then what the user set; the two must agree."""
    given = [f"{key}={json.dumps(value)}" for key, value in facts.items()]
    config = from_overrides(kind, [*given, *overrides])
    for key, fact in facts.items():
        if getattr(config, key) != fact:
            raise UsageError(
                f"--set {key}={getattr(config, key)} does not fit: the targets have {key}={fact}; leave it out, "
                "or give another cache"
            )
    return config


def facts(identity: dict[str, Any]) -> dict[str, Any]:
    """What a cache's identity says about the student's configuration."""
    teacher, size = identity["teacher"], identity["policy"]["size"]
    return {
        "img_size": size,
        "patch_size": patch_size(size, teacher["patches"]),
        "teacher": teacher["name"],
        "teacher_depth": teacher["depth"],
        "teacher_width": teacher["width"],
    }


def patch_size(size: int, patches: int) -> int:
    """Pixels of a student's patch on the teacher's square grid."""
    side = math.isqrt(patches)
    if side * side != patches or size % side:
        raise UserError(
            f"views of {size} pixels cannot be cut into the teacher's {patches} patches; extract at another --size"
        )
    return size // side


def open_given(path: Path, recipe: ModuleType, name: str, overrides: Sequence[str]) -> Found:
    """The cache at `path`, checked against the recipe's needs."""
    cache = Cache(path)
    config = with_facts(recipe.Config, overrides, facts(cache.identity))
    spec = recipe.needs(config)
    lacking = missing(cache, spec)
    if lacking:
        raise UserError(f"cache {str(path)!r} does not serve {name}: {'; '.join(lacking)}; {todo(spec, config, cache)}")
    return Found(cache, config, spec)


def missing(cache: Cache, spec: TargetSpec) -> list[str]:
    """What a recipe needs and this cache lacks, in words."""
    levels = sorted(set(spec.levels) - set(cache.levels))
    fields = [field for field in spec.fields if field not in cache.fields]
    return [
        *(
            [f"it is incomplete ({len(cache.records)} of {len(cache.manifest['shards'])} shards)"]
            if not cache.complete
            else []
        ),
        *([f"field {', '.join(fields)} is missing, it has {', '.join(cache.fields)}"] if fields else []),
        *(
            [f"level {', '.join(map(str, levels))} is missing, it has {', '.join(map(str, cache.levels))}"]
            if levels
            else []
        ),
    ]


def find(recipe: ModuleType, name: str, overrides: Sequence[str], source: images.Source | None) -> Found | None:
    """The cache under $FEATCACHE_HOME that serves the recipe on these pictures; None where the recipe needs none.

    Several are a UsageError; none is a UserError with the command that makes one.
    """
    plain = from_overrides(recipe.Config, overrides)
    if not recipe.needs(plain).fields:
        return None
    found, rejected = [], []
    for path in home.caches():
        try:
            candidate = open_given(path, recipe, name, overrides)
            _check_fit(candidate, plain, source)
            found.append(candidate)
        except UserError as error:
            rejected.append(f"{path}: {error}")
    if len(found) > 1:
        paths = ", ".join(str(each.cache.path) for each in found)
        raise UsageError(f"{len(found)} caches serve {name}: {paths}; choose one with --cache")
    if found:
        return found[0]
    looked = f"looked at {'; '.join(rejected[:2])}" if rejected else "it is empty"
    command = todo(recipe.needs(plain), plain, None, source)
    raise UserError(
        f"no cache under {str(home.home())!r} serves {name} ({looked}); give one with --cache, or {command}"
    )


def _check_fit(candidate: Found, plain: RecipeConfig, source: images.Source | None) -> None:
    """What a search asks beyond an explicit --cache: the recipe's own teacher and crops, and these pictures."""
    identity = candidate.cache.identity
    if candidate.spec.fields and identity["teacher"]["name"] != plain.teacher:
        raise UserError(f"its teacher is {identity['teacher']['name']}, {plain.teacher} is needed")
    if tuple(identity["policy"]["scale"]) != candidate.spec.scale or identity["policy"]["jitter"]:
        raise UserError(
            f"its views are drawn at scale {identity['policy']['scale']}, {candidate.spec.scale} is published"
        )
    if source is not None:
        join(candidate.cache, source)


def todo(spec: TargetSpec, config: RecipeConfig, cache: Cache | None, source: images.Source | None = None) -> str:
    """The exact extract command that makes what is missing: an incomplete cache is finished in its place."""
    if cache is None:
        facts = ["--teacher", config.teacher, "--levels", levels_text(spec.levels, config.teacher_depth)]
        size = [] if config.img_size == Policy().size else ["--size", str(config.img_size)]
        command = [*facts, *size, "--images", source.spec if source else "SRC"]
    elif cache.complete:
        command = recipe_of(cache, levels_text(sorted({*cache.levels, *spec.levels}), config.teacher_depth))
    else:
        command = [*recipe_of(cache, ",".join(map(str, cache.levels))), "--out", str(cache.path)]
    return f"make it with: {shlex.join(['featcache', 'extract', *command])}"


def levels_text(levels: Sequence[int], depth: int) -> str:
    """Block numbers as `--levels` takes them; a recipe that reads no level still needs a cache with one."""
    if list(levels) == list(range(1, depth + 1)):
        return "all"
    if list(levels) == list(range(depth - len(levels) + 1, depth + 1)):
        return f"last:{max(len(levels), 1)}"
    return ",".join(map(str, levels))


def recipe_of(cache: Cache, levels: str) -> list[str]:
    """The options that extract a cache like this one, with these levels."""
    identity, provenance = cache.identity, cache.manifest["provenance"]
    policy = {key: value for key, value in identity["policy"].items() if value != Policy().as_dict()[key]}
    options = {
        "teacher": identity["teacher"]["name"],
        "levels": levels,
        "images": provenance["source"],
        "views": identity["views"],
        **({} if provenance["weights"] == REGISTERED else {"weights": provenance["weights"]}),
        **{key: ",".join(map(repr, value)) if isinstance(value, list) else value for key, value in policy.items()},
        **{key: identity[key] for key in ("order", "codec", "store")},
        "rows-per-shard": identity["rows_per_shard"],
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def join(cache: Cache, source: images.Source) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """(pictures, rows, skipped): source numbers and cache rows of the training pictures, joined by key.

    Quarantined pictures are skipped and counted; any other picture the cache does not know is an IdentityError.
    """
    rows = cache.keys.find(source.keys)
    unknown = np.flatnonzero(rows < 0)
    quarantined = {row["key"] for row in cache.quarantined}
    strange = [source.keys[i] for i in unknown.tolist() if source.keys[i] not in quarantined]
    if strange:
        raise IdentityError(
            f"{len(strange)} of {len(source)} pictures of {source.spec!r} are not in cache {str(cache.path)!r} "
            f"({manifest.title(cache.manifest)}), the first is {strange[0]!r}; give the pictures it was made from, or "
            "extract these"
        )
    pictures = np.flatnonzero(rows >= 0)
    return pictures, rows[pictures], len(unknown)
