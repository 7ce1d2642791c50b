"""One `featcache extract` command makes what is missing; an error message names it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from featcache.catalog import extract_command, home
from featcache.errors import UserError, command_line
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.storage import manifest, picture_lists
from featcache.views import pixel_path
from featcache.views.policy import Policy
from student.config import RecipeConfig
from student.recipes import TargetSpec
from student.setup.missing import (
    missing,
    missing_levels,
    missing_tokens,
    second_keeps_few,
    second_missing,
)


def extract_remedy(
    spec: TargetSpec, config: RecipeConfig, cache: Cache | None, source: Source | None = None
) -> str:
    """Name the extract command that makes what is missing: an incomplete cache is finished in its
    folder, missing levels are added to it, and for the rest another is made."""
    if cache is None:
        command = _new_cache(spec, config, source)
    elif not cache.complete:
        return f"finish it with: {extract_command.for_cache(cache.manifest, cache.path)}"
    elif extract_command.is_derived(cache.manifest):
        return _of_parent(spec, config, cache)
    else:
        command = _more(spec, config, cache)
    return f"make it with: {extract_command.shell_line(command)}"


def _of_parent(spec: TargetSpec, config: RecipeConfig, cache: Cache) -> str:
    """Say what to do where a derived cache does not serve: nothing is added to it, but the one that
    it was derived from may serve, or be added to."""
    wanted = cache.identity["parent"]
    path = next((each for each in home.caches() if wanted in _ids(each)), None)
    if path is None:
        recorded = extract_command.parent_path(cache.manifest)
        place = f" ({recorded!r})" if recorded else ""
        return (
            f"it was derived from cache {wanted}{place}, which is not below "
            f"{str(home.home())!r}: train from that one, or derive another of it with "
            "`featcache derive`"
        )
    try:
        with Cache(path) as parent:
            if not missing(parent, spec, config):
                return (
                    f"the cache that it was derived from serves: {command_line('--cache', path)}, "
                    "or derive another of it with `featcache derive`"
                )
            return f"derive it again once the parent has it: {extract_remedy(spec, config, parent)}"
    except UserError as error:
        return f"the cache that it was derived from cannot be read: {error}"


def _ids(path: Path) -> list[str]:
    """Return the ids that a cache has and had; none where it cannot be read."""
    try:
        return picture_lists.ids(manifest.read(path)["identity"])
    except (UserError, OSError):
        return []


def _new_cache(spec: TargetSpec, config: RecipeConfig, source: Source | None) -> list[str]:
    """The options of a cache that serves, where there is none."""
    levels = extract_command.format_levels(spec.levels, config.teacher_depth)
    size = [] if config.img_size == Policy().size else ["--size", str(config.img_size)]
    others = [word for name in _others(spec.fields) for word in ("--teacher", name)]
    path = pixel_path.options(pixel_path.pixel_path(source)) if source else []
    images = source.spec if source else "SRC"
    return [
        *("--teacher", config.teacher, "--levels", levels),
        *size,
        *_crops(spec),
        *others,
        *path,
        *("--images", images),
    ]


def _more(spec: TargetSpec, config: RecipeConfig, cache: Cache) -> list[str]:
    """The options that add to a complete cache, or make another where nothing can be added."""
    absent = [field for field in spec.fields if field not in cache.fields]
    if names := _others(absent):
        return _add_teacher(spec, cache, names[0])
    if second_keeps_few(cache, spec):
        whole = extract_command.extract_options(cache.manifest, keep=False)
        return [*whole, "--teacher", spec.second]
    if second_missing(cache, spec):
        return _add_teacher(spec, cache, spec.second)
    if absent or missing_tokens(cache, spec, config):
        wanted = sorted({*cache.levels, *spec.levels})
        return extract_command.extract_options(cache.manifest, wanted, cache.views, keep=False)
    levels = missing_levels(cache, spec)
    options = extract_command.extract_options(cache.manifest, levels, cache.views)
    return [*options, *_add_to(cache)]


def _add_teacher(spec: TargetSpec, cache: Cache, name: str) -> list[str]:
    """The options that add another teacher over the views of a cache."""
    return [
        "--teacher",
        name,
        *_last_level(spec, name),
        *_same_views(cache),
        *_add_to(cache),
    ]


def _add_to(cache: Cache) -> list[str]:
    return ["--add", "--out", str(cache.path)]


def _others(fields: Iterable[str]) -> list[str]:
    """The other teachers whose arrays are asked for: NAME of NAME/token_ids and NAME/features."""
    return [field.rpartition("/")[0] for field in fields if "/" in field]


def _last_level(spec: TargetSpec, name: str) -> list[str]:
    """The option for a second teacher of features; a tokenizer has one level."""
    return ["--levels", "last:1"] if name == spec.second else []


# Options that another teacher over a cache's views does not share with it.
_OF_THE_TEACHER = {
    "--teacher",
    "--levels",
    "--weights",
    "--order",
    "--codec",
    "--tokens",
    "--keep",
    "--pixels",
    "--precision",
    "--batch-size",
    "--compile",
}


def _same_views(cache: Cache) -> list[str]:
    """The options that another teacher over a cache's views shares with it."""
    options = extract_command.extract_options(cache.manifest)
    flags = [word for word in options if word in ("--compile", "--exif")]  # without a value
    words = [word for word in options if word not in flags]
    pairs = zip(words[::2], words[1::2], strict=True)
    shared = [word for pair in pairs if pair[0] not in _OF_THE_TEACHER for word in pair]
    return [*shared, *(flag for flag in flags if flag not in _OF_THE_TEACHER)]


def _crops(spec: TargetSpec) -> list[str]:
    """The options of a publication's crops, where they are not the usual ones."""
    usual = Policy()
    scale = ["--scale", ",".join(f"{end:g}" for end in spec.scale)]
    jitter = ["--jitter", f"{spec.jitter:g}"]
    return [
        *(scale if spec.scale != usual.scale else []),
        *(jitter if spec.jitter != usual.jitter else []),
    ]
