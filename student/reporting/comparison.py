"""Runs are compared: settings, losses at the same steps and scores, and whether they are an
ablation of those settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featcache.errors import UserError
from featcache.runtime import strict_json
from student import checkpoint
from student.features import results
from student.reporting import differences, evaluations, metric_rows, run_facts
from student.reporting.differences import EVALUATION, HELD, SETTING, STEPS, TOLD

_COMPARED = ("featcache", "torch", "timm", "device", "commit")  # of environment.json
_NAMED = 12  # settings that the verdict names; two recipes may differ in dozens
Facts = dict[str, Any]


def compare(runs: Sequence[Path]) -> Facts:
    """Return a comparison of runs as plain data: `ablation`, `verdict`, `settings`, `held`, `told`,
    `losses`, `scores` and the facts of each run. UserError where a run is damaged."""
    records = [checkpoint.read_config(run) for run in runs]
    about = [_facts(run, record) for run, record in zip(runs, records, strict=True)]
    judged = judge(runs, records, [facts["step"] for facts in about])
    losses = _losses(runs, min(facts["step"] for facts in about))
    return {**judged, "runs": about, "losses": losses}


def judge(runs: Sequence[Path], records: Sequence[Facts], made: Sequence[int]) -> Facts:
    """Return what differs between runs whose config.json hold `records` and that have `made` so
    many steps: `ablation`, `verdict`, `settings`, `held`, `told` and `scores`."""
    with_environment = [
        {**record, "environment": environment(run)}
        for run, record in zip(runs, records, strict=True)
    ]
    found = differences.compare(with_environment)
    judged = [
        evaluations.newest(results.read(run), record)
        for run, record in zip(runs, records, strict=True)
    ]
    if len(set(made)) > 1:
        found.setdefault(STEPS, {})["steps made"] = list(made)
    if unlike := evaluations.compare(judged):
        found.setdefault(EVALUATION, {}).update(unlike)
    held = {group: found[group] for group in HELD if group in found}
    settings = found.get(SETTING, {})
    return {
        "ablation": not held,
        "verdict": verdict(list(held), list(settings)),
        "settings": settings,
        "held": held,
        "told": found.get(TOLD, {}),
        "scores": evaluations.scores(judged),
    }


def verdict(held: Sequence[str], settings: Sequence[str]) -> str:
    """Say in one line whether runs are an ablation, and of what.

    >>> verdict([], ["mask_ratio"]), verdict(["seed", "steps"], []), verdict([], [])
    ('an ablation of: mask_ratio', 'not an ablation: seed, steps', 'no setting differs')
    """
    if held:
        return f"not an ablation: {', '.join(held)}"
    if not settings:
        return "no setting differs"
    more = f" and {len(settings) - _NAMED} more" if len(settings) > _NAMED else ""
    return f"an ablation of: {', '.join(settings[:_NAMED])}{more}"


def _facts(run: Path, record: Facts) -> Facts:
    try:
        return run_facts.read(run, record, time.time())
    except OSError as error:
        raise UserError(
            f"{str(error.filename or run)!r}: {error.strerror}; restore it, or leave this run out"
        ) from error


def environment(run: Path) -> Facts:
    """Return what a run says of its program and device; a file that cannot be read says nothing."""
    path = run / run_facts.ENVIRONMENT
    try:
        found = {} if path.is_symlink() else strict_json.as_object(strict_json.read_file(path))
    except (OSError, ValueError):
        found = {}
    return {name: found.get(name) for name in _COMPARED}


def _losses(runs: Sequence[Path], last: int) -> list[Facts]:
    """Return the losses at quarters of the steps that all runs have made: {step, values}."""
    steps = sorted({round(last * part / 4) for part in range(1, 5)} - {0})
    rows = [metric_rows.rows_at(run, steps) for run in runs]
    return [
        {"step": step, "values": [metric_rows.number((own[i] or {}).get("loss")) for own in rows]}
        for i, step in enumerate(steps)
    ]


def plain(facts: Facts) -> Facts:
    """Return a comparison as JSON has it: a value that a run lacks is null."""
    held = {group: _plain(keys) for group, keys in facts["held"].items()}
    return {**facts, "held": held, **{name: _plain(facts[name]) for name in ("settings", "told")}}


def _plain(keys: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        key: [None if value is differences.ABSENT else value for value in values]
        for key, values in keys.items()
    }
