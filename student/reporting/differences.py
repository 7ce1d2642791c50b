"""The records of runs are compared key by key, and each key belongs to a group.

Runs are an ablation of a recipe's settings where those alone differ. Every key that no rule names
counts as one that must be equal, so that what later versions record is never passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featcache.storage import identity

# what an ablation varies
SETTING = "setting"
# told, and no obstacle: numbers change by rounding alone, or not at all
TOLD = "run as"
# what an ablation holds equal
CACHE, VIEWS, PICTURES = "cache identity", "view schedule", "pictures"
SEED, SAMPLING, REPEATS = "seed", "sampling", "aug_repeats"
STEPS, BATCH, EVALUATION, OTHER = "steps", "effective batch", "evaluation", "record"
HELD = (
    CACHE, VIEWS, PICTURES, SEED, SAMPLING, REPEATS, STEPS, BATCH, EVALUATION, OTHER,
)  # fmt: skip

# The first rule whose text begins the key, or is all of it, holds; None: it has no effect, or
# follows from others (steps an epoch from pictures and batch).
_RULES: tuple[tuple[str, str | None], ...] = (
    ("recipe", SETTING),
    ("config.", SETTING),
    ("targets.begun.", SETTING),  # the encoder that fine-tuning begins from
    ("running.", TOLD),
    ("precision", TOLD),
    ("ema", TOLD),
    ("environment.", TOLD),
    ("targets.pixel_tolerance", TOLD),
    ("targets.reading.", None),
    ("targets.crops.left_out_first", None),  # names; how many there are is compared
    ("targets.crops.", VIEWS),
    ("targets.views", VIEWS),
    ("targets.policy.", VIEWS),
    ("targets.labels", PICTURES),
    ("targets.classes", PICTURES),
    ("targets.tests.", EVALUATION),
    ("targets.crop_pct", EVALUATION),
    ("targets.", CACHE),
    ("seed", SEED),
    ("steps", STEPS),
    ("data.sampling", SAMPLING),
    ("data.aug_repeats", REPEATS),
    ("data.global_batch", BATCH),
    ("data.steps_per_epoch", None),
    ("data.", PICTURES),
)
Record = Mapping[str, Any]
# group -> key -> the value of each run; a run without the key has `ABSENT`
Differences = dict[str, dict[str, list[Any]]]


class _Absent:
    """Stands for a value that a run does not have; null is a value."""

    def __repr__(self) -> str:
        return "-"


ABSENT = _Absent()


def compare(records: Sequence[Record]) -> Differences:
    """Return every key whose values differ between the records, by group."""
    found: Differences = {}
    for key, values in differing(records):
        group = group_of(key)
        if group is not None:
            found.setdefault(group, {})[key.removeprefix("config.")] = values
    return found


def group_of(key: str) -> str | None:
    """Return the group of a key of config.json; None for one without effect.

    >>> group_of("config.mask_ratio"), group_of("data.aug_repeats"), group_of("of_tomorrow")
    ('setting', 'aug_repeats', 'record')
    """
    for rule, group in _RULES:
        if key == rule or (rule.endswith(".") and key.startswith(rule)):
            return group
    return OTHER


def differing(records: Sequence[Record]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the dotted names whose values differ, with the value of each record.

    >>> list(differing([{"a": {"b": 1}, "c": 2}, {"a": {"b": True}, "c": 2}]))
    [('a.b', [1, True])]
    """
    flat = [dict(identity.flatten(record)) for record in records]
    for key in dict.fromkeys(key for each in flat for key in each):
        values = [each.get(key, ABSENT) for each in flat]
        if len({_text(value) for value in values}) > 1:
            yield key, values


def _text(value: Any) -> str:
    """Return a text that is equal where values are: 1 is not true, and null is no absence."""
    return "-" if value is ABSENT else json.dumps(value, sort_keys=True)
