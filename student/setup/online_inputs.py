"""Inputs are computed by the teacher in the loop: over the views and pictures of a cache where one
is given, else over fresh views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models import precision
from featcache.models.contract import Teacher, has_attention
from featcache.models.tokenizer import FIELD, TokenizerTeacher, network_of
from featcache.models.weights import weight_hash
from featcache.pictures.source import Source
from featcache.reading import join
from featcache.reading.feature_reader import FeatureReader
from featcache.storage import codec_state
from featcache.views import pixel_path
from featcache.views.policy import AREA, Policy, load_policy, policy_from_dict
from student.config import build_config
from student.recipes import TargetSpec
from student.setup import cache_match, notes
from student.setup.cache_match import MatchedCache
from student.setup.missing import no_attention_text
from student.setup.options import Options, RunRequest
from student.setup.teacher_choice import load_other, load_teacher
from student.setup.training_inputs import TrainingInputs, refuse_view_options, select_views
from student.setup.view_choice import ViewSelection
from student.targets.online import TEACHER_FIELDS, OnlineTargets
from student.targets.online_others import OnlineNetwork, OnlineSecond, OnlineTokens


def online_inputs(
    request: RunRequest, found: MatchedCache | None, source: Source
) -> TrainingInputs:
    """Load the teacher, where the recipe needs one, and choose the views it is run on."""
    _check_options(request.options, found)
    recipe, settings = request.recipe, found.settings if found else request.settings
    spec = recipe.needs(build_config(recipe.Config, settings))
    policy = _policy(request, spec, found, source)
    names = _other_names(spec, found)
    own = any(field in TEACHER_FIELDS for field in spec.fields)
    teacher = _compiled(load_teacher(request, found), request) if own else None
    others = {name: _load_other(request, found, name, spec, alone=not own) for name in names}
    facts = _facts(found, policy, teacher) | _other_facts(found, policy, teacher, others, spec)
    config = cache_match.config_with_facts(recipe.Config, settings, facts)
    spec = recipe.needs(config)
    if teacher is not None and spec.derive == "z":
        cache_match.check_projection(teacher.tail(), f"teacher {teacher.name!r}")
    attends = teacher is None or has_attention(teacher)
    if teacher is not None and "attention" in spec.fields and not attends:
        raise UserError(f"{request.name}: {no_attention_text(teacher.name, config)}")
    selection = _select(request, found, source)
    views = request.options.views or (found.cache.views if found else None)
    own_order = "attentive" if attends else "uniform"
    order = found.cache.identity["order"] if found else own_order
    stored_as = _stored_as(request, found, spec)
    beside = [_beside(found, network, spec, request) for network in others.values()]
    targets = OnlineTargets(
        policy, spec, teacher, views, order, selection.schedule, stored_as, beside
    )
    record = _record(targets, source, selection)
    return TrainingInputs(config, source, targets, selection.pictures, record)


def _other_names(spec: TargetSpec, found: MatchedCache | None) -> list[str]:
    """Return the tokenizer and the second teacher that a recipe reads of. A tokenizer's field
    without a name is of the teacher that its cache begins with."""
    own = found.cache.identity["teacher"]["name"] if found else spec.teacher
    tokens = [field for field in spec.fields if field.rpartition("/")[2] == FIELD]
    names = [field.rpartition("/")[0] or own for field in tokens]
    return [*names, *([spec.second] if spec.second else ())]


def _load_other(
    request: RunRequest, found: MatchedCache | None, name: str, spec: TargetSpec, alone: bool
) -> Teacher:
    """Load a network that runs beside the teacher; UsageError where it gives something else."""
    if teachers.is_tokenizer(name) == (name == spec.second):
        what = "token ids" if name == spec.second else "features"
        raise UsageError(f"teacher {name!r} gives {what}, and the recipe reads the other of it")
    return _compiled(load_other(request, found, name, _other_names(spec, found), alone), request)


def _beside(
    found: MatchedCache | None, network: Teacher, spec: TargetSpec, request: RunRequest
) -> OnlineNetwork:
    """Wrap a network that runs beside the teacher as its targets take it."""
    if isinstance(network, TokenizerTeacher):
        fields = (field for field in spec.fields if field.rpartition("/")[2] == FIELD)
        return OnlineTokens(network, next(fields), spec)
    field, stored_as = f"{spec.second}/features", None
    if found and codec_state.needs_state(found.cache.manifest_of(spec.second)):
        stored_as = FeatureReader(found.cache, spec.second, levels=(spec.second_level,))
        request.say(f"note: levels of {spec.second} go through codec {stored_as.codec_name}")
    return OnlineSecond(network, field, spec, stored_as)


def _other_facts(
    found: MatchedCache | None,
    policy: Policy,
    teacher: Teacher | None,
    others: Mapping[str, Teacher],
    spec: TargetSpec,
) -> dict[str, Any]:
    """Return the facts of the networks beside the teacher: a second one's depth and width; the grid
    of a tokenizer where nothing else tells it."""
    if spec.second:
        second = others[spec.second]
        return {"joint_depth": second.depth, "joint_width": second.width}
    if others and teacher is None and found is None:
        patches = next(iter(others.values())).patches
        return {"patch_size": cache_match.patch_size(policy.size, patches)}
    return {}


def _stored_as(
    request: RunRequest, found: MatchedCache | None, spec: TargetSpec
) -> FeatureReader | None:
    """The lossy codec of the cache, through which the teacher's levels go, so that a run with the
    teacher in the loop is one from the cache; None where there is none."""
    if found is None or "features" not in spec.fields:
        return None
    if not codec_state.needs_state(found.cache.manifest):
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
        policy = _fresh_policy(request.options, spec, path)
    else:
        identity, what = found.cache.identity, f"cache {str(found.cache.path)!r}"
        policy = policy_from_dict(identity["policy"])
        pixel_path.check_pixel_path(source, identity["pixel_path"], what)
    pixel_path.check_filter(path, policy.filter)
    return policy


def _fresh_policy(options: Options, spec: TargetSpec, path: dict[str, Any]) -> Policy:
    """The policy that was named, or the crops of the recipe's publication, with the filter of the
    pixel path; --size wins."""
    changes: dict[str, Any] = {"filter": AREA} if path["decoder"] == "ffcv" else {}
    if options.size is not None:
        changes["size"] = options.size
    if options.policy:
        return load_policy(options.policy, **changes)
    return load_policy(scale=spec.scale, jitter=spec.jitter, **changes)


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
    networks = {other.field: other.network for other in targets.others}
    if networks:
        record["others"] = {
            field: {"teacher": network.name, "weight_hash": weight_hash(network)}
            for field, network in networks.items()
        }
    if targets.stored_as is not None:
        record |= {"codec": targets.stored_as.codec_name}
    return record
