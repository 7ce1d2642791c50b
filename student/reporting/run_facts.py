"""Runs below a folder are found, and each is described from its config.json, the tail of its
metrics.jsonl and its results.jsonl alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.errors import UsageError, UserError
from student import checkpoint
from student.features import results
from student.reporting import metric_rows
from student.training.metrics import NAME

ENVIRONMENT = "environment.json"
RUNNING_S = 600  # a run that wrote a row within so many seconds may still be running
_LAST = 253_402_300_799  # the last second of the year 9999; a file's time may be any
DEPTH = 8  # of folders that are looked into
Facts = dict[str, Any]


def find(folder: Path) -> Iterator[Path]:
    """Yield the run folders below a folder, by name; it may be one itself. Links are not followed,
    and neither hidden folders nor caches are looked into."""
    if not folder.is_dir():
        raise UsageError(f"no folder at {str(folder)!r}; give the one that holds your runs")
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if _is_run(here, folders, files):
            yield here
            folders.clear()
        elif "manifest.json" in files or len(here.relative_to(folder).parts) >= DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _is_run(here: Path, folders: list[str], files: list[str]) -> bool:
    """Tell whether a folder is a run's, though some of it be lost; config.json alone is no sign,
    as models of other programs have one."""
    return (
        NAME in files
        or {checkpoint.CONFIG, ENVIRONMENT} <= set(files)
        or (checkpoint.FOLDER in folders and bool(checkpoint.list_checkpoints(here)))
    )


def describe(run: Path, now: float | None = None) -> Facts:
    """Return the facts of a run as plain data; a damaged one is {path, damaged: the reason}."""
    try:
        return read(run, checkpoint.read_config(run), time.time() if now is None else now)
    except UserError as error:
        return {"path": str(run), "damaged": str(error)}
    except OSError as error:
        return {"path": str(run), "damaged": f"{error.filename or run}: {error.strerror}"}


def read(run: Path, record: Facts, now: float, row: Facts | None = None) -> Facts:
    """Return the facts of a run whose config.json holds `record`, and perhaps its last `row` of
    metrics, which is read else. Raises UserError and OSError where the run is damaged."""
    steps = record.get("steps")
    if type(steps) is not int or not 0 <= steps < 10**12:
        path = run / checkpoint.CONFIG
        raise UserError(f"{str(path)!r} is damaged: it holds no number of steps; restore it")
    row = row or metric_rows.last_row(run) or {"step": 0}
    saved = checkpoint.latest_step(run)
    written = min(max((run / NAME).stat().st_mtime, 0), _LAST)
    step = max(row["step"], saved or 0)
    return {
        "path": str(run),
        "recipe": record["recipe"],
        "begun": _begun(record),
        "state": _state(step, steps, saved, now - written),
        "step": step,
        "steps": steps,
        "loss": metric_rows.number(row.get("loss")),
        "lr": metric_rows.number(row.get("lr")),
        "scores": newest_scores(run),
        "bytes": _bytes(run),
        "last_written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(written)),
    }


def _begun(record: Facts) -> str | None:
    """Return the recipe, or the teacher, that a fine-tuned run began from; None of another run."""
    targets = record.get("targets")
    begun = targets.get("begun") if isinstance(targets, dict) else None
    if not isinstance(begun, dict):
        return None
    name = begun.get("recipe") or begun.get("teacher")
    return name if isinstance(name, str) else None


def _state(step: int, steps: int, saved: int | None, idle_s: float) -> str:
    """Say how far a run is. Nothing in its folder tells that a process is at work, but for the time
    of its last row."""
    if step == 0 and saved is None:
        return "unbegun"
    if step >= steps:
        return "done" if saved is not None else "done, no checkpoint"
    return "running?" if idle_s < RUNNING_S else "stopped"


def newest_scores(run: Path) -> dict[str, Facts]:
    """Return the newest result of each protocol and test set, by PROTOCOL/TEST."""
    found = {f"{row['protocol']}/{row['test']}": row for row in results.read(run)}
    names = ("score", "interval", "n_test", "checkpoint", "ema", "settings", "time")
    return {
        label: {"protocol": row["protocol"], "test": row["test"]}
        | {name: row[name] for name in names if name in row}
        for label, row in sorted(found.items())
    }


def _bytes(run: Path) -> int:
    """Return the bytes of all files below a run's folder; one that goes meanwhile counts none."""
    total = 0
    for root, _, files in os.walk(run):
        for name in files:
            try:
                total += os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118 (speed)
            except OSError:
                continue
    return total
