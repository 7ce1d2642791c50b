"""Where a run's views and targets come from: a cache that was given or found, the teacher in the
loop, or a cache with the teacher for what is absent from it (`--fallback`). What a person should
know before training goes through `say`.

n training pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import teachers
from featcache.errors import IdentityError, UsageError
from featcache.models import precision
from featcache.models.contract import Teacher
from featcache.models.weights import is_random, weight_hash
from featcache.pictures.source import ALLOWED, Source
from featcache.reading import join
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.views import pixel_path
from featcache.views.policy import AREA, Policy, load_policy, policy_from_dict
from student import config
from student.recipes import TargetSpec
from student.setup import cache_match, view_choice
from student.setup.cache_match import MatchedCache
from student.setup.cache_search import find_cache
from student.setup.options import Options, Say
from student.targets import fallback
from student.targets.cached import CachedTargets
from student.targets.contract import Targets
from student.targets.fallback import FallbackTargets
from student.targets.online import OnlineTargets

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingInputs:
    """The recipe's settings with the facts of what is read, its targets and the training
    pictures."""

    config: config.RecipeConfig
    source: Source
    targets: Targets
    pictures: I64  # numbers of the training pictures in the source
    about: dict[str, Any]  # for config.json

    @property
    def places(self) -> I64:
        """(n,) where each training picture lies: its row in the cache, or its number in the
        source."""
        return self.targets.rows if isinstance(self.targets, CachedTargets) else self.pictures


def choose_targets(
    name: str, recipe: ModuleType, overrides: Sequence[str], options: Options, device: str, say: Say
) -> TrainingInputs:
    """What the options ask for; what they ask for in vain is one line."""
    plain = config.from_overrides(recipe.Config, overrides)  # or a wrong setting, told at once
    _check(options, recipe.needs(plain))
    _say_deviation(recipe, plain, say)
    source = (
        pixel_path.open_through(options.images, options.decoder or "pillow")
        if options.images
        else None
    )
    found = _cache(name, recipe, overrides, source, options)
    if found is not None:
        cache_match.verify_small(found.cache)
    if options.teacher == "online" or found is None:
        source = _like(source or _source_of(found, options.decoder), found, options)
        return _online(recipe, overrides, found, source, device, options, say)
    if found.cache.absent:
        source = _like(source or _source_of(found, options.decoder), found, options)
        return _with_fallback(found, source, device, options, say)
    if options.fallback:
        say("note: no shard of the cache is absent, --fallback has nothing to do")
    return _cached(found, source, options, say)


def _check(options: Options, spec: TargetSpec) -> None:
    """Options that would do nothing beside the others, or nothing right."""
    if options.fallback and (options.teacher == "online" or options.cache is None):
        why = (
            "--teacher online computes all targets"
            if options.teacher == "online"
            else "no --cache is given"
        )
        raise UsageError(
            f"--fallback {options.fallback} is about shards that are absent from a cache, and "
            f"{why}; give --cache, or leave --fallback out"
        )
    if options.fallback and options.resident:
        raise UsageError(
            "--fallback does not go with --resident, which reads a whole cache; leave one of them "
            "out"
        )
    if options.accumulate > 1 and options.teacher == "online" and spec.moments:
        raise UsageError(
            f"--accumulate {options.accumulate} with --teacher online: these targets are "
            "normalised over the whole batch, of which the teacher has seen one part only "
            "(target_norm=bn); allowed: --accumulate 1, a cache in place of the teacher, or "
            "another target_norm"
        )
    if options.fallback_limit is not None and not options.fallback:
        raise UsageError(
            "--fallback-limit bounds --fallback, which is not given: give both, or none"
        )


def _cache(
    name: str, recipe: ModuleType, overrides: Sequence[str], source: Source | None, options: Options
) -> MatchedCache | None:
    """The cache that was given; else, unless the teacher is in the loop, the one that serves."""
    if options.cache is not None:
        return cache_match.open_given(options.cache, recipe, name, overrides, options.reading)
    return (
        find_cache(recipe, name, overrides, source, options.reading)
        if options.teacher == "cached"
        else None
    )


def _like(source: Source, found: MatchedCache | None, options: Options) -> Source:
    """The pictures through the decoder that was asked for, else through that of the cache."""
    return (
        source
        if found is None or options.decoder
        else pixel_path.match_decoder(source, found.cache.identity["pixel_path"])
    )


def _source_of(found: MatchedCache | None, decoder: str | None) -> Source:
    """The pictures a cache was made from, where it says and they are still there."""
    if found is None:
        raise UsageError(
            f"no pictures given: --images SRC is {ALLOWED}; FEATCACHE_IMAGES sets a default"
        )
    return pixel_path.open_through(
        found.cache.manifest["provenance"]["source"], decoder or "pillow"
    )


# --- from a cache ---------------------------------------------------------------------------------


def _cached(
    found: MatchedCache, given: Source | None, options: Options, say: Say
) -> TrainingInputs:
    _refuse({"--views": options.views, "--policy": options.policy})
    if not options.fallback:  # which wants them again when shards are absent
        _refuse({"--weights": options.weights})
    cache = found.cache
    stored = join.stores_pixels(cache) and not options.decode
    if stored and options.decoder:
        raise UsageError(
            f"--decoder {options.decoder} is about decoding pictures, and the cache stores pixels: "
            "leave it out, or give --decode with it"
        )
    source = given or (join.StoredPixels(cache) if stored else _source_of(found, options.decoder))
    source = source if stored else _like(source, found, options)
    pictures, rows, skipped = join.join_by_key(cache, source, decodes=not stored)
    _say_skipped(skipped, say)
    _say_about(found, say)
    show = _shown(found, pictures, rows, options, say)
    if stored:
        say(
            "note: pixels come from the cache, nothing is decoded; --decode decodes the pictures "
            "in place of them"
        )
    elif join.stores_pixels(cache):
        say(f"note: pixels are decoded from {source.spec}, those in the cache are left alone")
    targets = CachedTargets(
        cache, found.spec, show.rows, options.pixel_tolerance, found.tokens, stored, show.turns
    )
    return TrainingInputs(
        found.config, source, targets, show.pictures, _about(found, options, show, stored)
    )


def _about(
    found: MatchedCache, options: Options, show: view_choice.ViewSelection, stored: bool
) -> dict[str, Any]:
    """A cache and its use, for config.json."""
    cache = found.cache
    about = {
        "kind": "cached",
        "id": cache.manifest["id"],
        "identity": cache.identity,
        "views": cache.views,
    }
    # What was read, and how: of no effect on any number, so that a resumed run may change it.
    reading = {
        **asdict(options.reading),
        "tokens": found.tokens or "all",
        "pixels": "stored" if stored else "decoded",
    }
    return {**about, **show.about, "pixel_tolerance": options.pixel_tolerance, "reading": reading}


def _with_fallback(
    found: MatchedCache, source: Source, device: str, options: Options, say: Say
) -> TrainingInputs:
    """A cache without some of its shards. Pixels are decoded for all pictures, though the cache may
    store some."""
    _refuse({"--views": options.views, "--policy": options.policy})
    cache, spec = found.cache, found.spec
    fallback.check_spec(spec)
    limit = fallback.LIMIT if options.fallback_limit is None else options.fallback_limit
    pictures, rows, skipped = fallback.join(cache, source, limit)
    _say_skipped(skipped, say)
    _say_about(found, say)
    show = _shown(found, pictures[rows >= 0], rows[rows >= 0], options, say)
    if show.turns is not None:
        raise UsageError(
            "--fallback online shows all views, and of this cache some are shown, not known for "
            f"absent shards: leave it out and run `featcache repair {cache.path}`, or show all "
            f"with --scale {_scale(cache)}"
        )
    absent = int((rows < 0).sum())
    say(
        f"note: {fallback.absent_text(cache)}: the teacher computes the targets of {absent} of "
        f"{len(rows)} pictures ({absent / len(rows):.4g}, allowed {limit:g}), whose pixels nothing "
        "can be compared with"
    )
    if join.stores_pixels(cache):
        say(f"note: pixels are decoded from {source.spec}, those in the cache are left alone")
    identity = cache.identity
    weights = _weights(found, options)
    teacher = (
        _teacher(identity, identity["teacher"]["name"], weights, device, say)
        if spec.fields
        else None
    )
    cached = CachedTargets(cache, spec, rows, options.pixel_tolerance, found.tokens, False)
    online = OnlineTargets(
        cached.policy, spec, teacher, cache.views, identity["order"], codec=cached.codec
    )
    about = _about(found, options, show, False)
    about["reading"] |= {"fallback": {"shards": list(cache.absent), "pictures": absent}}
    return TrainingInputs(found.config, source, FallbackTargets(cached, online), pictures, about)


def _scale(cache: Cache) -> str:
    """The range of a cache's crops, as --scale takes it."""
    return ",".join(f"{end:g}" for end in cache.identity["policy"]["scale"])


def _shown(
    found: MatchedCache, pictures: I64, rows: I64, options: Options, say: Say
) -> view_choice.ViewSelection:
    """The views that are shown, and what is said of them."""
    show = view_choice.choose_views(
        found.cache, pictures, rows, found.spec.scale, options.scale, options.without_view
    )
    for note in show.notes:
        say(f"note: {note}")
    return show


def _say_about(found: MatchedCache, say: Say) -> None:
    """What a person should know of the cache that serves."""
    about, policy = found.cache.manifest, found.cache.identity["policy"]
    if manifest.is_random(about) and found.spec.fields:
        say(f"note: {manifest.title(about)}")
    if policy["jitter"] != found.spec.jitter and found.spec.fields:
        say(
            f"note: colours jittered by {policy['jitter']:g}; the recipe was published with "
            f"{found.spec.jitter:g}"
        )
    for note in (
        *found.notes,
        *(f"{part} is not whole, nothing of it is read" for part in found.cache.unfinished),
    ):
        say(f"note: {note}")


def _say_deviation(recipe: ModuleType, asked: config.RecipeConfig, say: Say) -> None:
    """What of the views was set otherwise than the recipe was published with."""
    published, jitter = recipe.needs(recipe.Config()).jitter, recipe.needs(asked).jitter
    if jitter != published:
        say(
            f"note: jitter={jitter:g} deviates from the recipe, which was published with "
            f"{published:g}"
        )


def _say_skipped(skipped: int, say: Say) -> None:
    if skipped:
        say(f"note: {skipped} pictures are in the cache's quarantine and are skipped")


def _refuse(given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} {value} does not go with a cache, which has its own: leave one of them "
                "out"
            )


# --- from the teacher -----------------------------------------------------------------------------


def _online(
    recipe: ModuleType,
    overrides: Sequence[str],
    found: MatchedCache | None,
    source: Source,
    device: str,
    options: Options,
    say: Say,
) -> TrainingInputs:
    """The teacher in the loop: over a cache's own views and pictures where one is given, else over
    fresh ones."""
    identity = found.cache.identity if found else None
    _refuse_reading(options)
    if found:
        _refuse({"--views": options.views, "--policy": options.policy})
        overrides = found.overrides
    elif options.scale is not None:
        raise UsageError(
            "--scale chooses among the views of a cache, and none is read here: give --policy, or "
            "--cache"
        )
    plain = config.from_overrides(recipe.Config, overrides)
    path = pixel_path.pixel_path(source)
    policy = (
        policy_from_dict(identity["policy"])
        if identity
        else _fresh(options.policy, recipe.needs(plain), path)
    )
    if found:
        pixel_path.check_pixel_path(
            source, found.cache.identity["pixel_path"], f"cache {str(found.cache.path)!r}"
        )
    pixel_path.check_filter(path, policy.filter)
    count = options.views or (found.cache.views if found else None)
    teacher = None
    if recipe.needs(plain).fields:
        name = identity["teacher"]["name"] if identity else plain.teacher
        teacher = _teacher(identity, name, _weights(found, options), device, say)
    settings = cache_match.config_with_facts(
        recipe.Config, overrides, _online_facts(identity, policy, teacher)
    )
    if teacher is not None and recipe.needs(settings).derive == "z":
        cache_match.check_projection(teacher.tail(), f"teacher {teacher.name!r}")
    show = view_choice.ViewSelection(np.arange(len(source)), np.arange(len(source)))
    if found:
        pictures, rows, skipped = join.join_by_key(found.cache, source)
        _say_skipped(skipped, say)
        show = _shown(found, pictures, rows, options, say)
    about = {
        "kind": "online",
        "policy": policy.as_dict(),
        "views": count,
        "pixel_path": path,
        **show.about,
    }
    if teacher is not None:
        about |= {"teacher": teacher.name, "weight_hash": weight_hash(teacher)}
    order = identity["order"] if identity else "attentive"
    targets = OnlineTargets(policy, recipe.needs(settings), teacher, count, order, show.turns)
    return TrainingInputs(settings, source, targets, show.pictures, about)


def _weights(found: MatchedCache | None, options: Options) -> str | None:
    """Those that were given, else those a cache was made with."""
    return options.weights or (found.cache.manifest["provenance"]["weights"] if found else None)


def _teacher(
    identity: dict[str, Any] | None, name: str, given: str | None, device: str, say: Say
) -> Teacher:
    """The teacher, which must be the very one of a cache where there is one."""
    teacher = teachers.load(name, given, device)
    if identity and weight_hash(teacher) != identity["teacher"]["weight_hash"]:
        raise IdentityError(
            f"weights {given!r} have hash {weight_hash(teacher)}, the cache was made with "
            f"{identity['teacher']['weight_hash']}; give those with --weights, or leave --cache out"
        )
    if is_random(teacher.weights):
        say(f"note: {teacher.weights} - these weights are drawn, not trained")
    return precision.configure_like(teacher, identity) if identity else teacher


def _refuse_reading(options: Options) -> None:
    """Options of reading a cache where none is read."""
    given = {
        "--direct": options.direct,
        "--verify-rows": options.verify_rows != 1,
        "--read-threads": options.read_threads is not None,
    }
    for option, is_given in given.items():
        if is_given:
            raise UsageError(
                f"{option} is about reading targets from a cache, and none are read here: leave it "
                "out"
            )


def _fresh(name: str | None, spec: TargetSpec, path: dict[str, Any]) -> Policy:
    """The policy that was named, or the crops of the recipe's publication, with the filter of the
    pixel path."""
    filter = {"filter": AREA} if path["decoder"] == "ffcv" else {}
    return (
        load_policy(name, **filter)
        if name
        else load_policy(scale=spec.scale, jitter=spec.jitter, **filter)
    )


def _online_facts(
    identity: dict[str, Any] | None, policy: Policy, teacher: Teacher | None
) -> dict[str, Any]:
    if teacher is None:
        return cache_match.cache_facts(identity) if identity else {"img_size": policy.size}
    return {
        "img_size": policy.size,
        "patch_size": cache_match.patch_size(policy.size, teacher.patches),
        "teacher": teacher.name,
        "teacher_depth": teacher.depth,
        "teacher_width": teacher.width,
        **cache_match.output_facts(teacher.tail(), teacher.width),
    }
