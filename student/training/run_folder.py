"""A run's folder is made before the first step, checked when the run is resumed, and removed again
where no step was made.

    RUN/config.json  environment.json  metrics.jsonl  checkpoints/  encoder.safetensors
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import featcache
from featcache.console import config_file
from featcache.errors import UserError, command_line, counted
from featcache.runtime import variables
from featcache.storage import identity, json_file
from student import checkpoint
from student.training import lengthening, nonfinite, trackers
from student.training.metrics import NAME, read

# Parts of config.json that may change when a run goes on: how a cache was read is of no effect on
# any number, and how the model was run of none beyond rounding.
FREE = ("targets.reading.", "running.")


def check(
    out: Path, record: dict[str, Any], resume: bool, defaults: Mapping[str, Any] | None = None
) -> None:
    """Refuse a folder that holds something else, or another run than the one to resume.

    A setting that the run's version did not know yet had its value of `defaults` there.
    """
    path = out / checkpoint.CONFIG
    _refuse_strange_kinds(out)
    if resume and path.is_file():
        saved = checkpoint.read_config(out)
        saved["config"] = {**(defaults or {}), **saved["config"]}
        before, now = (dict(identity.flatten(each)) for each in (saved, record))
        names = [key for key in {**before, **now} if not key.startswith(FREE)]
        free = lengthening.LENGTH if lengthening.is_longer(before, now) else ()
        changed = [key for key in names if before.get(key) != now.get(key) and key not in free]
        if changed:
            shown = "; ".join(
                f"{key[:80]} {repr(before.get(key))[:80]} before, {repr(now.get(key))[:80]} now"
                for key in changed[:4]
            )
            others = [key[:80] for key in changed[4:12]] + ["..."] * (len(changed) > 12)
            more = f"; and {', '.join(others)}" if others else ""
            raise UserError(
                f"--resume: {str(out)!r} is another run: {shown}{more}; give its own arguments, "
                f"as {command_line('student', 'train', '--resume', out)} does by itself, or begin "
                f"another run with --out NEW{_batch_advice(before.get('data.global_batch'), now)}"
            )
    else:
        check_new(out)


def check_new(out: Path) -> None:
    """Refuse a folder in which something lies, for a run that begins."""
    if out.exists() and any(not each.name.startswith(".") for each in out.iterdir()):
        raise UserError(
            f"--out {str(out)!r} is not empty; continue that run with --resume, or give another "
            "--out"
        )


def _refuse_strange_kinds(out: Path) -> None:
    """Refuse a run folder in which one of our names is a link: what is written and removed under it
    would lie elsewhere; and one in which it is a pipe or another thing that is waited for."""
    files = (checkpoint.CONFIG, "environment.json", NAME, checkpoint.ENCODER)
    for name in (*files, checkpoint.FOLDER, nonfinite.FOLDER, trackers.FOLDER):
        path, kind = out / name, "file" if name in files else "folder"
        if path.is_symlink():
            raise UserError(
                f"{str(path)!r} is a link, and a run writes into its own folder alone; put "
                "the file or folder itself there, or give another --out"
            )
        if path.exists() and not (path.is_file() if kind == "file" else path.is_dir()):
            raise UserError(
                f"{str(path)!r} is no plain {kind}; move it away, or give another --out"
            )


def _batch_advice(before: object, now: dict[str, Any]) -> str:
    """Return the --batch-size with which this number of processes takes the run's own global
    batch."""
    parts = now["running.processes"] * now["running.accumulate"]
    if not isinstance(before, int) or before == now["data.global_batch"] or before % parts:
        return ""
    return (
        f"; --batch-size {before // parts} on "
        f"{counted(now['running.processes'], 'process', 'processes')} with "
        f"--accumulate {now['running.accumulate']} makes its global batch of {before}"
    )


def make(out: Path, record: dict[str, Any]) -> bool:
    """Make the run folder and its first files; return whether there was no run in it before."""
    path = out / checkpoint.CONFIG
    is_new = not path.is_file()
    out.mkdir(parents=True, exist_ok=True)
    # The record first: a process that dies from here on leaves a run that --resume takes.
    json_file.write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    json_file.write_file(
        out / "environment.json", (json.dumps(environment(), indent=1) + "\n").encode()
    )
    (out / NAME).touch()
    return is_new


def forget_unbegun(run: Path) -> None:
    """Remove the folder of a new run that ended before its first step, so that the corrected
    command finds it free."""
    if checkpoint.list_checkpoints(run) or read(run):
        return
    for name in (NAME, "environment.json", checkpoint.CONFIG):
        (run / name).unlink(missing_ok=True)
    trackers.forget(run)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        run.rmdir()


def environment() -> dict[str, Any]:
    """Return versions, device and commit of this process, for people who compare runs."""
    import timm

    versions = {
        "featcache": featcache.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        **versions,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "command": sys.argv,
        "options": config_file.given_options(),
        "variables": variables.recorded(),
    }


def commit() -> str | None:
    """Return the commit that this code is at; None where it is no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # there is no git here
        return None
    return done.stdout.strip() or None
