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
from featcache.reader import Cache
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
    """The cache under $FEATCACHE_HOME that serves the recipe on these pictures; None where the recipe needs none and
    there is none. Several are a UsageError, none is one with the command that makes it."""
    plain = from_overrides(recipe.Config, overrides)
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
    spec = recipe.needs(plain)
    if not spec.fields:
        return None
    looked = f"looked at {'; '.join(rejected[:2])}" if rejected else "it is empty"
    raise UserError(f"no cache under {str(home.home())!r} serves {name} ({looked}); {todo(spec, plain, None, source)}")


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
    """The exact extract command that would make what is missing."""
    last = tuple(range(config.teacher_depth - len(spec.levels) + 1, config.teacher_depth + 1))
    levels = f"last:{len(spec.levels)}" if spec.levels == last else ",".join(map(str, spec.levels))
    command = [
        "featcache",
        "extract",
        "--teacher",
        config.teacher if spec.fields else "clip-b16",
        "--levels",
        levels or "last:1",
    ]
    if cache is None:
        command += ["--images", source.spec if source else "SRC"]
        return f"make it with: {shlex.join(command)}"
    provenance, policy = cache.manifest["provenance"], cache.identity["policy"]
    command += ["--images", provenance["source"], "--views", str(cache.views)]
    if provenance["weights"] != "registered":
        command += ["--weights", provenance["weights"]]
    command += [
        f"--scale={policy['scale'][0]:g},{policy['scale'][1]:g}",
        f"--size={policy['size']}",
        f"--flip={policy['flip']:g}",
    ]
    command += [f"--jitter={policy['jitter']:g}", f"--filter={policy['filter']}", f"--seed={policy['seed']}"]
    return f"make one with: {shlex.join(command)}"


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
