"""Trackers get the rows of metrics.jsonl too: TensorBoard or Weights & Biases, through Accelerate.

metrics.jsonl is always written and is what everything here reads; a tracker only shows it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers

from featcache.errors import UsageError, UserError, one_line
from featcache.storage import identity, json_file

JSON = "json"  # metrics.jsonl and nothing else
NAMES = (JSON, "tensorboard", "wandb")
FOLDER = "tracking"  # in the run
_WRITTEN = re.compile(r"id|hparams\.yml|events\.out\.tfevents\..*")

Log = Callable[[dict[str, Any]], None]


def check(names: Sequence[str]) -> tuple[str, ...]:
    """Return the trackers beside metrics.jsonl; one whose package is missing is one line that says
    what to install."""
    here = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in here and name != JSON:
            raise UsageError(
                f"--tracker {name}: the package {name} is not installed; run `pip install {name}` "
                f"(or `pip install 'featcache[{name}]'`), or take --tracker {JSON}, which needs "
                "none"
            )
    return tuple(dict.fromkeys(name for name in names if name != JSON))


@contextlib.contextmanager
def start_trackers(
    names: Sequence[str], acc: Accelerator, run: Path, record: dict[str, Any], first: int
) -> Iterator[Log | None]:
    """Yield a function that takes rows of metrics while the run goes on, or None without trackers.
    `first` steps are shown already."""
    if not names or not acc.is_main_process:
        yield None
        return
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    acc.project_configuration.set_directories(str(folder))
    acc.log_with = filter_trackers(list(names), acc.logging_dir)
    kwargs = {
        "tensorboard": {"purge_step": first + 1},  # what lies beyond the checkpoint is made again
        # One curve for all parts of a run.
        "wandb": {"id": _identity(folder), "resume": "allow", "name": run.name, "dir": str(folder)},
    }
    try:
        acc.init_trackers("student", _flat(record), {name: kwargs[name] for name in names})
    except Exception as error:  # of a service: no login, no network, no room
        raise UserError(
            f"--tracker {', '.join(names)} cannot begin: {type(error).__name__}: "
            f"{one_line(str(error))}; set it up (wandb: `wandb login`, or WANDB_MODE=offline), or "
            f"take --tracker {JSON}, which needs nothing"
        ) from error
    try:
        yield lambda row: acc.log(
            {key: value for key, value in row.items() if key not in ("step", "time")},
            step=row["step"],
        )
    finally:
        for tracker in acc.trackers:  # acc.end_training would also end the process group
            tracker.finish()


def forget(run: Path) -> None:
    """Remove what trackers wrote into a run that made no step; files of other names stay, and so
    do their folders."""
    top = run / FOLDER
    if top.is_symlink():
        return
    for folder, _, files in os.walk(top, topdown=False):
        is_wandb = "wandb" in Path(folder).relative_to(top).parts
        for name in files:
            if is_wandb or _WRITTEN.fullmatch(name):
                Path(folder, name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's file is in it
            Path(folder).rmdir()


def _identity(folder: Path) -> str:
    """Return a run's id, drawn when its folder is new and kept in it."""
    path = folder / "id"
    if not path.is_file():
        json_file.write_file(path, os.urandom(8).hex().encode())
    return path.read_text()


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return settings as trackers take them: dotted names, plain values."""
    plain = (bool, int, float, str)
    return {
        key: value if isinstance(value, plain) else str(value)
        for key, value in identity.flatten(record)
    }
