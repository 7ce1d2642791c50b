"""A run's targets come from a cache that was given or found, from the teacher in the loop, or from
a cache with the teacher for what is absent from it (`--fallback`)."""

from __future__ import annotations

from featcache.errors import UsageError
from featcache.models.tokenizer import FIELD
from featcache.pictures.source import Source
from student.recipes import TargetSpec
from student.setup import cache_match, content_match, notes
from student.setup.cache_match import MatchedCache
from student.setup.cache_search import find_cache
from student.setup.cached_inputs import cached_inputs
from student.setup.fallback_inputs import fallback_inputs
from student.setup.online_inputs import online_inputs
from student.setup.options import Options, RunRequest
from student.setup.source_choice import decoded_source, given_source
from student.setup.training_inputs import TrainingInputs


def choose_targets(request: RunRequest) -> TrainingInputs:
    """Find the inputs that the options ask for; UserError where there are none."""
    options = request.options
    # a wrong setting is told first of all
    _check_options(options, request.recipe.needs(request.config))
    notes.say_jitter(request)
    source = given_source(options)
    found = _match(request, source)
    if found is not None:
        cache_match.verify_small(found.cache)
    if options.teacher == "online" or found is None:
        content_match.check(options, "here the teacher computes the targets")
        return online_inputs(request, found, decoded_source(source, found, options))
    if found.cache.absent:
        content_match.check(options, "--fallback goes by the order of the extraction's own list")
        return fallback_inputs(request, found, decoded_source(source, found, options))
    if options.fallback:
        request.say("note: no shard of the cache is absent, --fallback has nothing to do")
    return cached_inputs(request, found, source)


def _match(request: RunRequest, source: Source | None) -> MatchedCache | None:
    """Open the cache that was given; else, unless the teacher is in the loop, the one that
    serves."""
    options = request.options
    asked = (request.recipe, request.name, request.settings)
    if options.cache is not None:
        return cache_match.open_given(options.cache, *asked, options.reading)
    if options.teacher == "cached":
        return find_cache(*asked, source, options.reading)
    return None


def _check_options(options: Options, spec: TargetSpec) -> None:
    """Raise UsageError for options that do nothing beside the others, or nothing right."""
    if options.fallback:
        _check_fallback(options)
    beside = spec.second or any(field.rpartition("/")[2] == FIELD for field in spec.fields)
    if options.other_weights and (options.teacher != "online" or not beside):
        raise UsageError(
            "--other-weights is about a tokenizer or a second teacher in the loop, and none is "
            "run: give --teacher online with a recipe that reads of one, or leave it out"
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


def _check_fallback(options: Options) -> None:
    if options.teacher == "online" or options.cache is None:
        why = (
            "--teacher online computes all targets"
            if options.teacher == "online"
            else "no --cache is given"
        )
        raise UsageError(
            f"--fallback {options.fallback} is about shards that are absent from a cache, and "
            f"{why}; give --cache, or leave --fallback out"
        )
    if options.resident:
        raise UsageError(
            "--fallback does not go with --resident, which reads a whole cache; leave one of them "
            "out"
        )
