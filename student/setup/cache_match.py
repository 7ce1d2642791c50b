"""From what a recipe needs to a cache that has it, or to the command that would make one.

Facts of a cache (view size, patch grid, teacher) are filled into the recipe's configuration; what the user set by hand
must agree with them. Caches are looked for under $FEATCACHE_HOME unless one is given. A cache of at most 2 GiB is
verified whole before training; the files of a larger one are checked for existence and size when it is opened, its rows
as they are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from featcache.catalog import extract_command as invocation
from featcache.catalog import home
from featcache.errors import UsageError, UserError
from featcache.maintenance import verify
from featcache.pictures import open_source as images
from featcache.reading import crop_range as crops
from featcache.reading.cache import Cache
from featcache.reading.join import join, stores_pixels
from featcache.views.draw import Policy
from student.config import OutputConfig, RecipeConfig, from_overrides
from student.recipes import TargetSpec
from student.targets import second

VERIFIED_BYTES = 2 << 30  # a cache up to this size is read through before training: a second or two


@dataclass(frozen=True)
class Reading:
    """How a cache is read; none of it changes what is read."""

    threads: int | None = None
    verify_rows: float = 1.0
    io: str = "auto"
    partial: bool = False  # without the shards that are absent

    def open(self, path: Path) -> Cache:
        return Cache(path, threads=self.threads, verify_rows=self.verify_rows, io=self.io, partial=self.partial)


@dataclass(frozen=True)
class Found:
    """A cache that serves the recipe, and the configuration with its facts."""

    cache: Cache
    config: RecipeConfig
    spec: TargetSpec
    overrides: tuple[str, ...]  # what was set by hand, and what this cache makes the default
    notes: tuple[str, ...] = ()  # what a person should know of it

    @property
    def tokens(self) -> int | None:
        """How many tokens of each level are read; None: all that are stored. Where the mask is the order in which they
        lie, those it shows come first."""
        ranked = self.cache.identity["tokens"] == "ranked" and self.config.mask == "stored"
        few = self.spec.visible_only and not self.spec.moments and "features" in self.spec.fields
        if not ranked or not few:
            return None
        return 1 + self.config.visible


def with_facts(kind: type[RecipeConfig], overrides: Sequence[str], facts: dict[str, Any]) -> RecipeConfig:
    """Facts first, then what the user set; the two must agree. A fact that the recipe has no field for is left out."""
    names = {field.name for field in dataclasses.fields(kind)}
    facts = {key: value for key, value in facts.items() if key in names}
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


def _facts(recipe: ModuleType, overrides: Sequence[str], cache: Cache) -> dict[str, Any]:
    """`facts`, for a recipe of the teacher's output what only the tail says, and those of a second teacher."""
    of_output = issubclass(recipe.Config, OutputConfig)
    output = output_facts(cache.tail(), cache.identity["teacher"]["width"]) if of_output else {}
    return {**facts(cache.identity), **output, **second.facts(recipe.Config, overrides, cache)}


def output_facts(tail: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Channels of the teacher's own output: of its projection, or its width where it has none."""
    return {"teacher_out": tail["proj"].shape[1] if "proj" in tail else width}


def patch_size(size: int, patches: int) -> int:
    """Pixels of a student's patch on the teacher's square grid."""
    side = math.isqrt(patches)
    if side * side != patches or size % side:
        raise UserError(
            f"views of {size} pixels cannot be cut into the teacher's {patches} patches; extract at another --size"
        )
    return size // side


def open_given(
    path: Path, recipe: ModuleType, name: str, overrides: Sequence[str], reading: Reading | None = None
) -> Found:
    """The cache at `path`, checked against the recipe's needs."""
    cache = (reading or Reading()).open(path)
    given = tuple(overrides)
    config = with_facts(recipe.Config, given, _facts(recipe, given, cache))
    spec = recipe.needs(config)
    notes: list[str] = []
    if _keeps_few(cache, spec) and not any(text.partition("=")[0].strip() == "mask" for text in given):
        given = (*given, "mask=stored")
        config = with_facts(recipe.Config, given, _facts(recipe, given, cache))
        spec = recipe.needs(config)
        notes.append(f"{_kept(cache)}: mask=stored, a view shows the same in each epoch")
    lacking = missing(cache, spec, config)
    if lacking:
        raise UserError(f"cache {str(path)!r} does not serve {name}: {'; '.join(lacking)}; {todo(spec, config, cache)}")
    if spec.derive == "z":
        check_projection(cache.tail(), f"cache {str(path)!r}")
    return Found(cache, config, spec, given, tuple(notes))


def _keeps_few(cache: Cache, spec: TargetSpec) -> bool:
    """Whether only the first tokens of each view are stored, and the recipe reads tokens."""
    return "features" in spec.fields and "keep" in cache.identity


def _kept(cache: Cache) -> str:
    keep, patches = cache.identity["keep"], cache.identity["teacher"]["patches"]
    return f"the cache keeps the first {keep} of {patches} patches of each view (--keep), in their stored order"


def missing(cache: Cache, spec: TargetSpec, config: RecipeConfig) -> list[str]:
    """What a recipe needs and this cache lacks, in words."""
    levels = _missing_levels(cache, spec)
    fields = [field for field in spec.fields if field not in cache.fields]
    shards = f"{len(cache.records)} of {len(cache.manifest['shards'])} shards"
    found = {
        f"it is incomplete ({shards}; --fallback online trains all the same)": not cache.complete and not cache.absent,
        f"field {', '.join(fields)} is missing, it has {', '.join(cache.fields)}": fields,
        f"level {', '.join(map(str, levels))} is missing, it has {', '.join(map(str, cache.levels))}": levels,
    }
    own = [text for text, lacks in found.items() if lacks]
    return [*own, *_missing_tokens(cache, spec, config), *second.missing(cache, spec)]


def check_projection(tail: Mapping[str, Any], what: str) -> None:
    """The target z is made by the teacher's projection, which only CLIP-like teachers have."""
    if "proj" not in tail:
        raise UserError(
            f"{what} does not give target z: its teacher has no projection, only {', '.join(sorted(tail))}; --set "
            "target=f takes the output of its last norm in place of it"
        )


def _missing_levels(cache: Cache, spec: TargetSpec) -> list[int]:
    return sorted(set(spec.levels) - set(cache.levels))


def _missing_tokens(cache: Cache, spec: TargetSpec, config: RecipeConfig) -> list[str]:
    """Why the tokens of a kept cache are not those the recipe reads, and what to set."""
    if not _keeps_few(cache, spec):
        return []
    if spec.moments:
        return [f"{_kept(cache)}, and statistics of all are wanted: --set another target_norm, or take another cache"]
    if not spec.visible_only:
        return [f"{_kept(cache)}, and the recipe reads all"]
    if config.mask != "stored":
        return [f"{_kept(cache)}, and mask={config.mask} shows others: --set mask=stored, or take another"]
    if config.visible > cache.identity["keep"]:
        text = (
            f"and mask_ratio={config.mask_ratio:g} shows {config.visible}: --set a larger mask_ratio, or take another"
        )
        return [f"{_kept(cache)}, {text}"]
    return []


def verify_small(cache: Cache) -> None:
    """UserError with the file's name where any byte of a small cache is not the one that was written."""
    if cache.bytes > VERIFIED_BYTES:
        return
    problems, _ = verify.files(cache.path, without=cache.absent)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"cache file {problems[0]}{more}; training does not begin with a damaged cache: run `featcache repair "
            f"{cache.path}`"
        )


def find(
    recipe: ModuleType,
    name: str,
    overrides: Sequence[str],
    source: images.Source | None,
    reading: Reading | None = None,
) -> Found | None:
    """The cache under $FEATCACHE_HOME that serves the recipe on these pictures; None where the recipe needs none.

    Several are a UsageError; none is a UserError with the command that makes one.
    """
    plain = from_overrides(recipe.Config, overrides)
    if not recipe.needs(plain).fields:
        return None
    found, rejected = [], []
    for path in home.caches():
        try:
            candidate = open_given(path, recipe, name, overrides, reading)
            _check_fit(candidate, plain, source)
            found.append(candidate)
        except UserError as error:
            rejected.append(f"{path}: {error}")
    exact = [each for each in found if _scale(each) == each.spec.scale]
    found = exact or found  # of two, the one whose views are shown without a choice among them
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


def _scale(found: Found) -> crops.Scale:
    """The range of the areas of a cache's crops."""
    low, high = found.cache.identity["policy"]["scale"]
    return float(low), float(high)


def _check_fit(candidate: Found, plain: RecipeConfig, source: images.Source | None) -> None:
    """What a search asks beyond an explicit --cache: the recipe's own teacher and crops, and these pictures."""
    identity = candidate.cache.identity
    if candidate.spec.fields and identity["teacher"]["name"] != plain.teacher:
        raise UserError(f"its teacher is {identity['teacher']['name']}, {plain.teacher} is needed")
    policy, spec = identity["policy"], candidate.spec
    if not crops.within(spec.scale, _scale(candidate)) or policy["jitter"] != spec.jitter:
        raise UserError(
            f"its views are drawn at scale {policy['scale']} with jitter {policy['jitter']:g}, {spec.scale} with "
            f"{spec.jitter:g} is published"
        )
    if source is not None:
        join(candidate.cache, source, decodes=not stores_pixels(candidate.cache))


def todo(spec: TargetSpec, config: RecipeConfig, cache: Cache | None, source: images.Source | None = None) -> str:
    """The exact extract command that makes what is missing: an incomplete cache is finished in its place, missing
    levels are added to it, and for the rest another is made."""
    if cache is None:
        levels = invocation.levels_text(spec.levels, config.teacher_depth)
        facts = ["--teacher", config.teacher, "--levels", levels]
        size = [] if config.img_size == Policy().size else ["--size", str(config.img_size)]
        others = [word for name in _others(spec.fields) for word in ("--teacher", name)]
        decoder = images.pixel_path(source)["decoder"] if source else "pillow"
        path = [] if decoder == "pillow" else ["--decoder", decoder]
        command = [*facts, *size, *_crops(spec), *others, *path, "--images", source.spec if source else "SRC"]
    elif not cache.complete:
        command = [*invocation.options(cache.manifest), "--out", str(cache.path)]
    elif names := _others(field for field in spec.fields if field not in cache.fields):
        command = ["--teacher", names[0], *_last_level(spec, names[0]), *_same_views(cache)]
        command += ["--add", "--out", str(cache.path)]
    elif second.keeps_few(cache, spec):
        command = [*invocation.options(cache.manifest, keep=False), "--teacher", spec.second]
    elif second.missing(cache, spec):
        command = ["--teacher", spec.second, *_last_level(spec, spec.second), *_same_views(cache)]
        command += ["--add", "--out", str(cache.path)]
    elif _missing_tokens(cache, spec, config) or any(field not in cache.fields for field in spec.fields):
        wanted = sorted({*cache.levels, *spec.levels})
        command = invocation.options(cache.manifest, wanted, cache.views, keep=False)
    else:
        command = invocation.options(cache.manifest, _missing_levels(cache, spec), cache.views)
        command += ["--add", "--out", str(cache.path)]
    return f"make it with: {invocation.command(command)}"


def _others(fields: Iterable[str]) -> list[str]:
    """Which other teachers' arrays are asked for: NAME of NAME/token_ids and NAME/features."""
    return [field.rpartition("/")[0] for field in fields if "/" in field]


def _last_level(spec: TargetSpec, name: str) -> list[str]:
    """The option for a second teacher of features; a tokenizer has one level."""
    return ["--levels", "last:1"] if name == spec.second else []


def _same_views(cache: Cache) -> list[str]:
    """The options that another teacher over a cache's views shares with it."""
    own = {"teacher", "levels", "weights", "order", "codec", "tokens", "keep", "pixels", "precision", "batch-size"}
    words = [word for word in invocation.options(cache.manifest) if word != "--compile"]
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for key, value in pairs if key.removeprefix("--") not in own for word in (key, value)]


def _crops(spec: TargetSpec) -> list[str]:
    """The options of a publication's crops, where they are not the usual ones."""
    scale = [] if spec.scale == Policy().scale else ["--scale", ",".join(f"{end:g}" for end in spec.scale)]
    return [*scale, *([] if spec.jitter == Policy().jitter else ["--jitter", f"{spec.jitter:g}"])]
