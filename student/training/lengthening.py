"""A run that goes on may be planned for more steps than before; its record says so.

Warm-up and cosine are functions of (step, total), so the rest of the schedule is that of a run of
the new length, from the step that is done. Nothing of what is done changes, and the whole is no run
of the new length from its start: its first steps had the learning rates of the shorter one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featcache.errors import UserError, counted
from student import checkpoint
from student.training import optim

PLANNED = "planned"  # lengths before: [{steps, done}], the oldest first
# what may differ between a run and the longer one
LENGTH = ("steps", "config.epochs", PLANNED)


def with_plans(record: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return a resumed run's record with the lengths that were planned before. Raises UserError for
    a shorter one."""
    if not (out / checkpoint.CONFIG).is_file():
        return record
    saved = checkpoint.read_config(out)
    if saved.get("recipe") != record["recipe"]:
        return record  # another run, as the comparison will tell
    before, now = saved.get("steps"), record["steps"]
    plans = saved.get(PLANNED) or []
    if isinstance(before, int) and isinstance(plans, list) and before != now:
        done = checkpoint.latest_step(out) or 0
        if now < before:
            raise UserError(
                f"--resume: {str(out)!r} is planned for {counted(before, 'step')} and "
                f"has made {done}, {now} "
                f"are given; {before} or more are allowed: give --steps {before}, or another --out"
            )
        plans = [*plans, {"steps": before, "done": done}]
    return {**record, PLANNED: plans} if plans else record


def is_longer(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Tell whether a flat record is of more steps than the one that is on disk."""
    steps = before.get("steps")
    return isinstance(steps, int) and now["steps"] > steps


def note(record: dict[str, Any], done: int, rate: optim.Schedule) -> str:
    """Return what a person should know of a run that this call made longer; empty of another."""
    plans = record.get(PLANNED) or [{}]
    before, total = plans[-1].get("steps"), record["steps"]
    if plans[-1].get("done") != done or before is None or before >= total:
        return ""
    return (
        f"the run was planned for {counted(before, 'step')} and goes on from step "
        f"{done} to {total}: warm-up "
        f"and cosine are planned anew over {total}, so that the learning rate of step {done + 1} "
        f"is {rate(done, total):.3g}, {rate(done, before):.3g} by the old plan; what is done stays "
        f"as it is, and the whole is no run of {counted(total, 'step')} from its start"
    )
