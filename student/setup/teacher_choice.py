"""The teacher in the loop is the one that a cache was made with, or the recipe's own; so are a
tokenizer and a second teacher beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featcache import teachers
from featcache.errors import IdentityError
from featcache.extraction.options import weights_per_teacher
from featcache.models import precision
from featcache.models.contract import Teacher
from featcache.models.weights import is_random, weight_hash
from student.setup.cache_match import MatchedCache
from student.setup.options import RunRequest

OPTION = "--teacher-name"
SET = "--set"


def load_teacher(request: RunRequest, found: MatchedCache | None) -> Teacher:
    """Load the teacher; IdentityError where its weights are not those that the cache was made
    with."""
    if found is None:
        weights = request.options.weights or None
        teacher = teachers.load(_own_spec(request), weights, request.device)
    else:
        teacher = _load_same(request, found)
    _say_drawn(request, teacher)
    return teacher if found is None else precision.configure_like(teacher, found.cache.identity)


def load_other(
    request: RunRequest, found: MatchedCache | None, spec: str, names: Sequence[str], alone: bool
) -> Teacher:
    """Load a tokenizer or a second teacher, which the recipe's settings name, as the cache has it
    where one is given. `names` are all that run beside the teacher; `alone` says that there is
    none, so that --weights speaks of this network."""
    named = [spec] if _named_by_option(request, spec) else []
    if _named_by_file(request, spec):
        spec = teachers.recorded_spec(spec, named, str(request.options.file_settings), SET)
    about = found.cache.manifest_of(spec) if found and spec in found.cache.teachers else None
    recorded = about["provenance"]["weights"] if about else None
    given = weights_per_teacher(request.options.other_weights, names)[spec]
    weights = given or (request.options.weights if alone else None) or recorded
    teacher = teachers.load_any(spec, weights, request.device)
    _say_drawn(request, teacher)
    if about is None:
        return teacher
    _check_hash(teacher, weights, about["identity"]["teacher"])
    return precision.configure_like(teacher, about["identity"])


def _say_drawn(request: RunRequest, teacher: Teacher) -> None:
    if is_random(teacher.weights):
        request.say(f"note: {teacher.weights} - these weights are drawn, not trained")


def _named_by_option(request: RunRequest, spec: str) -> bool:
    return any(_names(request, key, spec) for key, how in request.settings.origins.items()
               if how == "option")  # fmt: skip


def _named_by_file(request: RunRequest, spec: str) -> bool:
    return any(_names(request, key, spec) for key, how in request.settings.origins.items()
               if how == "file")  # fmt: skip


def _names(request: RunRequest, key: str, spec: str) -> bool:
    """Tell whether a setting is a network's spec, or a field of its part of a cache."""
    value = request.settings.values[key]
    return isinstance(value, str) and spec in (value, value.rpartition("/")[0])


def _own_spec(request: RunRequest) -> str:
    """Return the recipe's teacher; a --config file's is one of a file's."""
    spec, named = request.config.teacher, _named(request)
    if request.options.teacher_name:
        return request.options.teacher_name
    if request.settings.origins.get("teacher") != "file":
        return spec  # an option's, or the recipe's own
    return teachers.recorded_spec(spec, named, str(request.options.file_settings), OPTION)


def _named(request: RunRequest) -> list[str]:
    """Return the teachers that the command line names."""
    settings, given = request.settings, request.options.teacher_name
    by_setting = settings.origins.get("teacher") == "option"
    return [*([given] if given else ()), *([settings.values["teacher"]] if by_setting else ())]


def _load_same(request: RunRequest, found: MatchedCache) -> Teacher:
    """Load the teacher of a cache, with the weights that were given, else those it names."""
    identity: dict[str, Any] = found.cache.identity["teacher"]
    where = f"cache {str(found.cache.path)!r}"
    spec = teachers.recorded_spec(identity["name"], _named(request), where, OPTION)
    weights = request.options.weights or found.cache.manifest["provenance"]["weights"]
    teacher = teachers.load(spec, weights, request.device)
    teacher.name = identity["name"]  # wherever the user's file lies now
    _check_hash(teacher, weights, identity)
    return teacher


def _check_hash(teacher: Teacher, weights: str | None, identity: dict[str, Any]) -> None:
    if weight_hash(teacher) != identity.get("weight_hash", ""):
        raise IdentityError(
            f"weights {weights!r} have hash {weight_hash(teacher)}, the cache was made with "
            f"{identity['weight_hash']}; give those with --weights, or leave --cache out"
        )
