"""The teacher in the loop is the one that a cache was made with, or the recipe's own."""

from __future__ import annotations

from typing import Any

from featcache import teachers
from featcache.errors import IdentityError
from featcache.models import precision
from featcache.models.contract import Teacher
from featcache.models.weights import is_random, weight_hash
from student.setup.cache_match import MatchedCache
from student.setup.options import RunRequest

OPTION = "--teacher-name"


def load_teacher(request: RunRequest, found: MatchedCache | None) -> Teacher:
    """Load the teacher; IdentityError where its weights are not those that the cache was made
    with."""
    if found is None:
        weights = request.options.weights or None
        teacher = teachers.load(_own_spec(request), weights, request.device)
    else:
        teacher = _load_same(request, found)
    if is_random(teacher.weights):
        request.say(f"note: {teacher.weights} - these weights are drawn, not trained")
    return teacher if found is None else precision.configure_like(teacher, found.cache.identity)


def _own_spec(request: RunRequest) -> str:
    """Return the recipe's teacher; a --config file's is one of a file's."""
    spec, named = request.config.teacher, _named(request)
    if request.options.teacher_name:
        return request.options.teacher_name
    if request.settings.origins.get("teacher") != "file":
        return spec  # an option's, or the recipe's own
    return teachers.recorded_spec(spec, named, f"--config {str(request.options.config)!r}", OPTION)


def _named(request: RunRequest) -> list[str]:
    """Return the teachers that the command line names."""
    settings, given = request.settings, request.options.teacher_name
    by_setting = settings.origins.get("teacher") == "option"
    return [*([given] if given else ()), *([settings.values["teacher"]] if by_setting else ())]


def _load_same(request: RunRequest, found: MatchedCache) -> Teacher:
    """Load the teacher of a cache, with the weights that were given, else those it names."""
    identity: dict[str, Any] = found.cache.identity["teacher"]
    weights = request.options.weights or found.cache.manifest["provenance"]["weights"]
    where = f"cache {str(found.cache.path)!r}"
    spec = teachers.recorded_spec(identity["name"], _named(request), where, OPTION)
    teacher = teachers.load(spec, weights, request.device)
    teacher.name = identity["name"]  # wherever the user's file lies now
    if weight_hash(teacher) != identity["weight_hash"]:
        raise IdentityError(
            f"weights {weights!r} have hash {weight_hash(teacher)}, the cache was made with "
            f"{identity['weight_hash']}; give those with --weights, or leave --cache out"
        )
    return teacher
