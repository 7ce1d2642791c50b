"""The cache that serves a recipe is searched for under $FEATCACHE_HOME."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from featcache.catalog import home
from featcache.errors import UsageError, UserError, counted
from featcache.pictures.source import Source
from featcache.reading import crop_range
from featcache.reading.join import join_by_key, stores_pixels
from featcache.storage import manifest
from featcache.views import pixel_path
from student.config import RecipeConfig, Settings, build_config
from student.setup.cache_match import MatchedCache, ReadOptions, open_given
from student.setup.remedy import extract_remedy


def find_cache(
    recipe: ModuleType,
    name: str,
    settings: Settings,
    source: Source | None,
    reading: ReadOptions | None = None,
) -> MatchedCache | None:
    """Find the cache under $FEATCACHE_HOME that serves the recipe on these pictures; None where the
    recipe needs none.

    Several are a UsageError; none is a UserError with the command that makes one.
    """
    plain = build_config(recipe.Config, settings)
    if not recipe.needs(plain).fields:
        return None
    found, rejected = [], []
    for path in home.caches():
        if why := _unreadable(path):
            home.note_passed_over(path, why)
            rejected.append(f"{path}: {why}")
            continue
        try:
            candidate = open_given(path, recipe, name, settings, reading)
            _check_fit(candidate, plain, source)
            found.append(candidate)
        except (UserError, OSError) as error:
            rejected.append(f"{path}: {error}")
    found = _only_exact(found, rejected)
    if not found:
        command = extract_remedy(recipe.needs(plain), plain, None, source)
        raise _none_serves(name, rejected, command)
    return _only_one(found, name)


def _only_exact(found: list[MatchedCache], rejected: list[str]) -> list[MatchedCache]:
    """Leave out caches whose codec loses something: they are taken where they are named."""
    exact = [each for each in found if not each.lossy_codec]
    if not exact:
        rejected[:0] = [
            f"{each.cache.path}: it serves in codec {each.lossy_codec}, which is lossy, and is not "
            "taken unless --cache names it"
            for each in found
        ]
    return exact


def _unreadable(path: Path) -> str:
    """Say why a folder is no cache that can be read; empty where it is one, whomever it serves."""
    try:
        manifest.read(path)
    except UserError as error:
        return str(error)
    except OSError as error:
        return str(error.strerror)
    return ""


def _none_serves(name: str, rejected: list[str], command: str) -> UserError:
    looked = f"looked at {'; '.join(rejected[:2])}" if rejected else "it is empty"
    return UserError(
        f"no cache under {str(home.home())!r} serves {name} ({looked}); give one with --cache, or "
        f"{command}"
    )


def _only_one(found: list[MatchedCache], name: str) -> MatchedCache:
    """Of several, the one that is no archive, and whose views are shown without a choice among
    them."""
    found = [each for each in found if not each.cache.is_archive] or found
    exact = [each for each in found if _scale(each) == each.spec.scale]
    found = exact or found
    if len(found) > 1:
        paths = ", ".join(str(each.cache.path) for each in found)
        raise UsageError(
            f"{counted(len(found), 'cache')} serve {name}: {paths}; choose one with --cache"
        )
    return found[0]


def _scale(found: MatchedCache) -> crop_range.Scale:
    """The range of the areas of a cache's crops."""
    low, high = found.cache.identity["policy"]["scale"]
    return float(low), float(high)


def _check_fit(candidate: MatchedCache, plain: RecipeConfig, source: Source | None) -> None:
    """Ask what an explicit --cache is not asked: the recipe's own teacher and crops, and these
    pictures."""
    identity = candidate.cache.identity
    if candidate.spec.fields and identity["teacher"]["name"] != plain.teacher:
        raise UserError(f"its teacher is {identity['teacher']['name']}, {plain.teacher} is needed")
    policy, spec = identity["policy"], candidate.spec
    if not crop_range.is_within(spec.scale, _scale(candidate)) or policy["jitter"] != spec.jitter:
        raise UserError(
            f"its views are drawn at scale {policy['scale']} with jitter {policy['jitter']:g}, "
            f"{spec.scale} with {spec.jitter:g} is published"
        )
    if source is not None:
        turns = identity["pixel_path"].get("exif_transpose") is True
        join_by_key(
            candidate.cache,
            pixel_path.with_exif(source, turns),
            decodes=not stores_pixels(candidate.cache),
        )
