"""Inputs are computed by the teacher in the loop: over the views and pictures of a cache where one
is given, else over fresh views."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from featcache.errors import UsageError
from featcache.models import precision
from featcache.models.contract import Teacher
from featcache.models.tokenizer import network_of
from featcache.models.weights import weight_hash
from featcache.pictures.source import Source
from featcache.reading import join
from featcache.reading.feature_reader import FeatureReader
from featcache.views import pixel_path
from featcache.views.policy import AREA, Policy, load_policy, policy_from_dict
from student.config import build_config
from student.recipes import TargetSpec
from student.setup import cache_match, notes
from student.setup.cache_match import MatchedCache
from student.setup.options import Options, RunRequest
from student.setup.teacher_choice import load_teacher
from student.setup.training_inputs import TrainingInputs, refuse_view_options, select_views
from student.setup.view_choice import ViewSelection
from student.targets.online import OnlineTargets


def online_inputs(
    request: RunRequest, found: MatchedCache | None, source: Source
) -> TrainingInputs:
    """Load the teacher, where the recipe needs one, and choose the views it is run on."""
    _check_options(request.options, found)
    recipe, settings = request.recipe, found.settings if found else request.settings
    spec = recipe.needs(build_config(recipe.Config, settings))
    policy = _policy(request, spec, found, source)
    teacher = _compiled(load_teacher(request, found), request) if spec.fields else None
    facts = _facts(found, policy, teacher)
    config = cache_match.config_with_facts(recipe.Config, settings, facts)
    spec = recipe.needs(config)
    if teacher is not None and spec.derive == "z":
        cache_match.check_projection(teacher.tail(), f"teacher {teacher.name!r}")
    selection = _select(request, found, source)
    views = request.options.views or (found.cache.views if found else None)
    order = found.cache.identity["order"] if found else "attentive"
    stored_as = _stored_as(request, found, spec)
    targets = OnlineTargets(policy, spec, teacher, views, order, selection.schedule, stored_as)
    record = _record(targets, source, selection)
    return TrainingInputs(config, source, targets, selection.pictures, record)


def _stored_as(
    request: RunRequest, found: MatchedCache | None, spec: TargetSpec
) -> FeatureReader | None:
    """The lossy codec of the cache, through which the teacher's levels go, so that a run with the
    teacher in the loop is one from the cache; None where there is none."""
    if found is None or not found.lossy_codec or "features" not in spec.fields:
        return None
    reader = FeatureReader(found.cache, levels=spec.levels)
    request.say(f"note: the teacher's levels go through codec {reader.codec_name}, as in the cache")
    return reader


def _compiled(teacher: Teacher, request: RunRequest) -> Teacher:
    """Let --compile be of the whole step, of which the teacher is the larger part; one that is no
    network stays as it is."""
    if not request.options.compiled or not isinstance(network_of(teacher), nn.Module):
        return teacher
    return precision.configure(teacher, precision.execution_config(teacher).precision, True)


def _check_options(options: Options, found: MatchedCache | None) -> None:
    _refuse_read_options(options)
    if found:
        refuse_view_options(options)
    elif options.scale is not None:
        raise UsageError(
            "--scale chooses among the views of a cache, and none is read here: give --policy, or "
            "--cache"
        )


def _refuse_read_options(options: Options) -> None:
    """Raise UsageError for options of reading a cache, since none is read."""
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


def _policy(
    request: RunRequest, spec: TargetSpec, found: MatchedCache | None, source: Source
) -> Policy:
    """The views of the cache, of --policy, or of the recipe's publication."""
    path = pixel_path.pixel_path(source)
    if found is None:
        policy = _fresh_policy(request.options.policy, spec, path)
    else:
        identity, what = found.cache.identity, f"cache {str(found.cache.path)!r}"
        policy = policy_from_dict(identity["policy"])
        pixel_path.check_pixel_path(source, identity["pixel_path"], what)
    pixel_path.check_filter(path, policy.filter)
    return policy


def _fresh_policy(name: str | None, spec: TargetSpec, path: dict[str, Any]) -> Policy:
    """The policy that was named, or the crops of the recipe's publication, with the filter of the
    pixel path."""
    filter = {"filter": AREA} if path["decoder"] == "ffcv" else {}
    if name:
        return load_policy(name, **filter)
    return load_policy(scale=spec.scale, jitter=spec.jitter, **filter)


def _facts(found: MatchedCache | None, policy: Policy, teacher: Teacher | None) -> dict[str, Any]:
    """Return the facts for the configuration: the teacher's, else the cache's, else the
    policy's."""
    if teacher is None:
        identity = found.cache.identity if found else None
        return cache_match.cache_facts(identity) if identity else {"img_size": policy.size}
    return {
        "img_size": policy.size,
        "patch_size": cache_match.patch_size(policy.size, teacher.patches),
        "teacher": teacher.name,
        "teacher_depth": teacher.depth,
        "teacher_width": teacher.width,
        **cache_match.output_facts(teacher.tail(), teacher.width),
    }


def _select(request: RunRequest, found: MatchedCache | None, source: Source) -> ViewSelection:
    """All pictures and views, or those of the cache that are shown."""
    if found is None:
        return ViewSelection(np.arange(len(source)), np.arange(len(source)))
    pictures, rows, skipped = join.join_by_key(found.cache, source)
    notes.say_skipped(request.say, skipped)
    return select_views(request, found, pictures, rows)


def _record(targets: OnlineTargets, source: Source, selection: ViewSelection) -> dict[str, Any]:
    """The views and the teacher, for config.json."""
    record = {
        "kind": "online",
        "policy": targets.policy.as_dict(),
        "views": targets.views,
        "pixel_path": pixel_path.pixel_path(source),
        **selection.record,
    }
    teacher = targets.teacher
    if teacher is not None:
        record |= {"teacher": teacher.name, "weight_hash": weight_hash(teacher)}
    if targets.stored_as is not None:
        record |= {"codec": targets.stored_as.codec_name}
    return record
