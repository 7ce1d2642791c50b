"""A run is trained to its end, or stopped, and the ledger says how far it came."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from featcache.catalog import home
from featcache.errors import STOPPED, StoppedError, UserError
from student import checkpoint
from student.data.loader import Loader
from student.setup import build, picture_check
from student.setup.console import Console
from student.training import preemption, train
from student.training.train import Run


def run_to_end(run: Run, loader: Loader, acc: Accelerator, console: Console) -> dict[str, Any]:
    """Train, and note in the ledger how far the run came, however it ended; return the summary."""
    _announce(run, loader, console)
    before = checkpoint.latest_step(run.out)
    try:
        picture_check.check_pictures(run, loader, acc, console.say)
        summary = train.train(run, loader, acc)
    except (StoppedError, KeyboardInterrupt) as error:
        raise _stopped(error, run, before, console) from None
    except (UserError, OSError):
        _report_failure(run, before, console)
        raise
    if console.speaks:
        _note_run(run, before, summary)
    return summary


def _announce(run: Run, loader: Loader, console: Console) -> None:
    facts = build.run_facts(run, loader)
    console.say(
        f"{run.name}: {facts['pictures']} pictures, {facts['targets']}, {facts['steps']} "
        f"steps of {facts['global_batch']} -> {run.out}"
    )


def _stopped(
    error: BaseException, run: Run, before: int | None, console: Console
) -> StoppedError | SystemExit:
    """The one line of a run that was stopped; processes that do not speak have the status alone."""
    if not console.speaks:
        return SystemExit(STOPPED)
    _note_run(run, before, {"stopped": True})
    if isinstance(error, StoppedError):
        return error
    return preemption.stopped_at_once(run.out, run.resume)


def _report_failure(run: Run, before: int | None, console: Console) -> None:
    """Say which checkpoint is kept, where the run saved one before it failed."""
    from student import checkpoint

    step = checkpoint.latest_step(run.out)
    if console.speaks and step != before:
        _note_run(run, before, {"stopped": True})
        console.say(
            f"note: the checkpoint of step {step} is kept; {preemption.resume_hint(run.resume)}"
        )


def _note_run(run: Run, before: int | None, facts: dict[str, Any]) -> None:
    """Add a line to the ledger, where this process brought the run further than it was `before`."""
    if (step := checkpoint.latest_step(run.out)) != before:
        facts = {**facts, "run": str(run.out.absolute()), "step": step}
        command = "eval finetune" if run.about["kind"] == "labelled" else "train"
        home.log_run(command=command, recipe=run.name, cache_id=run.about.get("id"), **facts)
