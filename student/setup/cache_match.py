"""A cache is matched with what a recipe needs, or the command is named that would make one.

Facts of a cache (view size, patch grid, teacher) are filled into the recipe's configuration; what
the user set by hand must agree with them. Caches are looked for under $FEATCACHE_HOME unless one is
given. A cache of at most 2 GiB is verified whole before training; the files of a larger one are
checked for existence and size when it is opened, its rows as they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from featcache.errors import UsageError, UserError, command_line
from featcache.maintenance import verify
from featcache.reading.cache import Cache
from featcache.storage import codec_state
from featcache.storage.files import files_of
from featcache.views import patch_grid
from student.config import OutputConfig, RecipeConfig, Settings, build_config
from student.recipes import TargetSpec
from student.setup.missing import keeps_few, kept_text, lacks_attention, missing
from student.setup.remedy import extract_remedy

VERIFIED_BYTES = 2 << 30  # a cache up to this size is read through before training: a second or two


@dataclass(frozen=True)
class ReadOptions:
    """The options say how a cache is read; none of them changes what is read."""

    threads: int | None = None
    verify_rows: float = 1.0
    io: str = "auto"
    partial: bool = False  # without the shards that are absent

    def open(self, path: Path) -> Cache:
        """Open the cache at `path` with these options."""
        return Cache(
            path,
            threads=self.threads,
            verify_rows=self.verify_rows,
            io=self.io,
            partial=self.partial,
        )


@dataclass(frozen=True)
class MatchedCache:
    """A matched cache serves the recipe, and gives the configuration its facts."""

    cache: Cache
    config: RecipeConfig
    spec: TargetSpec
    settings: Settings  # those of the user, and what this cache makes the default
    notes: tuple[str, ...] = ()  # what the user should know of it

    @property
    def tokens(self) -> int | None:
        """Return how many tokens of each level are read; None: all that are stored. Where the mask
        is the order in which they lie, those it shows come first."""
        ranked = self.cache.identity["tokens"] == "ranked" and self.config.mask == "stored"
        few = self.spec.visible_only and not self.spec.moments and "features" in self.spec.fields
        if not ranked or not few:
            return None
        return 1 + self.config.visible

    @property
    def lossy(self) -> dict[str, Any]:
        """Return the manifest of the teacher whose levels the recipe reads in a codec that loses
        something; empty where there is none."""
        read = [field for field in self.spec.fields if field.rpartition("/")[2] == "features"]
        teachers = [field.rpartition("/")[0] or self.cache.teachers[0] for field in read]
        parts = map(self.cache.manifest_of, teachers)
        return next((each for each in parts if codec_state.needs_state(each)), {})

    @property
    def lossy_codec(self) -> str:
        """Name that codec; empty where there is none."""
        return str(self.lossy["identity"]["codec"]) if self.lossy else ""


def config_with_facts(
    kind: type[RecipeConfig], settings: Settings, facts: dict[str, Any]
) -> RecipeConfig:
    """Build the configuration from facts and from settings, which must agree. A fact that the
    recipe has no field for is left out."""
    names = {field.name for field in dataclasses.fields(kind)}
    facts = {key: value for key, value in facts.items() if key in names}
    config = build_config(kind, Settings().updated(facts, "fact").merged(settings))
    for key, fact in facts.items():
        if getattr(config, key) != fact:
            raise UsageError(
                f"--set {key}={getattr(config, key)} does not fit: the targets have {key}={fact}; "
                "leave it out, or give another cache"
            )
    return config


def cache_facts(identity: dict[str, Any]) -> dict[str, Any]:
    """Return what a cache's identity says about the student's configuration."""
    teacher, size = identity["teacher"], identity["policy"]["size"]
    return {
        "img_size": size,
        "patch_size": patch_size(size, teacher["patches"], teacher.get("input_px")),
        "teacher": teacher["name"],
        "teacher_depth": teacher["depth"],
        "teacher_width": teacher["width"],
    }


def _facts(recipe: ModuleType, settings: Settings, cache: Cache) -> dict[str, Any]:
    """`cache_facts`, those of the teacher's output where the recipe learns it, and those of a
    second teacher."""
    of_output = issubclass(recipe.Config, OutputConfig)
    output = output_facts(cache.tail(), cache.identity["teacher"]["width"]) if of_output else {}
    return {
        **cache_facts(cache.identity),
        **output,
        **second_facts(recipe.Config, settings, cache),
    }


def output_facts(tail: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return the channels of the teacher's own output: of its projection, or its width where it has
    none."""
    return {"teacher_out": tail["proj"].shape[1] if "proj" in tail else width}


def patch_size(size: int, patches: int, input_px: int | None = None) -> int:
    """Return the pixels a side of a student's patch on the teacher's square grid."""
    pixels = patch_grid.patch_px(size, patches)
    if pixels is None:
        raise UserError(
            f"{patch_grid.misfit(size, patches, input_px)}; extract with another --size"
        )
    return pixels


def open_given(
    path: Path,
    recipe: ModuleType,
    name: str,
    settings: Settings,
    reading: ReadOptions | None = None,
) -> MatchedCache:
    """Open the cache at `path`; UserError where it does not serve the recipe."""
    cache = (reading or ReadOptions()).open(path)
    found = _match(cache, recipe, settings)
    if keeps_few(cache, found.spec) and not settings.is_set_by_user("mask"):
        note = f"{kept_text(cache)}: mask=stored, a view shows the same in each epoch"
        found = _match(cache, recipe, settings.updated({"mask": "stored"}, "cache"), note)
    lacking = missing(cache, found.spec, found.config)
    if lacks_attention(cache, found.spec):
        raise UserError(f"cache {str(path)!r} does not serve {name}: {lacking[0]}")
    if lacking:
        raise UserError(
            f"cache {str(path)!r} does not serve {name}: {'; '.join(lacking)}; "
            f"{extract_remedy(found.spec, found.config, cache)}"
        )
    if found.spec.derive == "z":
        check_projection(cache.tail(), f"cache {str(path)!r}")
    return found


def _match(cache: Cache, recipe: ModuleType, settings: Settings, *notes: str) -> MatchedCache:
    """Give the configuration the facts of a cache, whether or not it serves."""
    config = config_with_facts(recipe.Config, settings, _facts(recipe, settings, cache))
    return MatchedCache(cache, config, recipe.needs(config), settings, notes)


def check_projection(tail: Mapping[str, Any], what: str) -> None:
    """Raise UserError where target z cannot be made: only CLIP-like teachers have a projection."""
    if "proj" not in tail:
        raise UserError(
            f"{what} does not give target z: its teacher has no projection, only "
            f"{', '.join(sorted(tail))}; --set target=f takes the output of its last norm in place "
            "of it"
        )


def verify_small(cache: Cache) -> None:
    """Read a small cache whole; UserError with the file's name where any byte is not the one that
    was written."""
    if cache.bytes > VERIFIED_BYTES or files_of(cache.path).may_be_far:
        return
    problems, _ = verify.verify_cache(cache.path, without=cache.absent)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"cache file {problems[0]}{more}; training does not begin with a damaged cache: run "
            f"`{command_line('featcache', 'repair', cache.path)}`"
        )


def second_facts(kind: type[RecipeConfig], settings: Settings, cache: Cache) -> dict[str, Any]:
    """Return what a cache says of the second teacher that a configuration names (`joint`), where it
    has one."""
    if "joint" not in {field.name for field in dataclasses.fields(kind)}:
        return {}
    name = getattr(build_config(kind, settings), "joint")  # noqa: B009  # of some recipes only
    if name not in cache.teachers[1:]:
        return {}
    teacher = cache.manifest_of(name)["identity"]["teacher"]
    return {"joint_depth": teacher["depth"], "joint_width": teacher["width"]}
