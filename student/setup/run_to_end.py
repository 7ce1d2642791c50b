"""A run is trained to its end, or stopped, and the ledger says how far it came."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from accelerate import Accelerator

from featcache.catalog.account import account
from featcache.errors import StoppedError, UserError, counted
from student import checkpoint
from student.data.loader import Loader
from student.setup import build, picture_check, run_cost
from student.setup.console import Console, Told
from student.training import accelerator, dry_run, preemption, train
from student.training.lost_process import lost_process_told
from student.training.train import Run


def run_to_end(run: Run, loader: Loader, acc: Accelerator, console: Console) -> dict[str, Any]:
    """Train, and note in the ledger how far the run came and what it cost, however it ended; return
    the summary."""
    _announce(run, loader, acc, console)
    if console.speaks:
        run_cost.note_use(run)
    before = checkpoint.latest_step(run.out)
    with _account(run, acc, console) as line:
        try:
            with lost_process_told():
                picture_check.check_pictures(run, loader, acc, console.say)
                summary = train.train(run, loader, acc, console.voice.display)
        except (StoppedError, KeyboardInterrupt) as error:
            line["stopped"] = True
            raise _stopped(error, run, console) from None
        except (UserError, OSError):
            console.end()
            _report_failure(run, before, console)
            raise
        finally:
            line["step"] = checkpoint.latest_step(run.out)
        line.update(summary, run=line["run"])
    return summary


def _account(
    run: Run, acc: Accelerator, console: Console
) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """Open the account of a run, one line for all of its processes."""
    return account(
        "eval finetune" if run.about["kind"] == "labelled" else "train",
        begun=console.begun,
        gather=functools.partial(run_cost.gather, acc),
        finish=functools.partial(run_cost.saved, run),
        speaks=console.speaks,
        recipe=run.name,
        cache_id=run.about.get("id"),
        run=str(run.out.absolute()),
        processes=acc.num_processes,
        device=str(acc.device),
    )


def measure_run(run: Run, loader: Loader, acc: Accelerator, console: Console) -> Told:
    """Say what would be trained and what it costs; every process takes part."""
    facts = build.run_facts(run, loader)
    with accelerator.out_of_memory_told(loader.batch_size):
        facts |= dry_run.measure(run, loader, acc)
    return Told(facts, dry_run.text(facts), console.speaks)


def _announce(run: Run, loader: Loader, acc: Accelerator, console: Console) -> None:
    facts = build.run_facts(run, loader)
    kind = "" if run.about["kind"] == "labelled" else "recipe "
    console.say(
        f"{kind}{run.name}: {counted(facts['pictures'], 'picture')}, "
        f"{facts['targets']}, {counted(facts['steps'], 'step')} of {facts['global_batch']}, "
        f"{accelerator.where(acc)} -> {run.out}"
    )


def _stopped(error: BaseException, run: Run, console: Console) -> StoppedError | SystemExit:
    """The one line of a run that was stopped."""
    if isinstance(error, StoppedError):
        return console.stopped(error)
    return console.stopped(preemption.stopped_at_once(run.out, run.resume))


def _report_failure(run: Run, before: int | None, console: Console) -> None:
    """Say which checkpoint is kept, where the run saved one before it failed."""
    step = checkpoint.latest_step(run.out)
    if console.speaks and step != before:
        console.say(
            f"note: the checkpoint of step {step} is kept; {preemption.resume_hint(run.resume)}"
        )
