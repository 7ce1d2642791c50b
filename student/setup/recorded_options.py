"""The options that a run was made with are read from its folder, so that `--resume RUN` goes on by
them.

They are a stranger's as those of a `--config` file are: data and no code, each checked as if it had
been typed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featcache.errors import UserError, command_line
from featcache.runtime import strict_json
from student import checkpoint

# Of the one call, or chosen anew: the batch that keeps the run's global batch.
_NOT_TAKEN = ("resume", "out", "json", "dry-run", "batch-size")
_TOLD = 12  # options in a line


def read(run: Path) -> dict[str, Any]:
    """Return the options of a run by the keys of a `--config` file. Raises UserError where it is no
    run of `student train`, or records none."""
    about = checkpoint.read_config(run)
    targets = about.get("targets")
    if isinstance(targets, dict) and targets.get("kind") == "labelled":
        raise UserError(
            f"--resume {str(run)!r} is a run of `student eval finetune`; give that command again, "
            "with --resume"
        )
    path = run / "environment.json"
    try:
        options = strict_json.as_object(strict_json.read_file(path)).get("options")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume {str(run)!r}: {path.name} does not say the run's options ({error}); "
            f"{_advice(run, about)}"
        ) from error
    if not isinstance(options, dict):
        raise UserError(
            f"--resume {str(run)!r} was last made by a Python call, which records no options; "
            f"{_advice(run, about)}"
        )
    return {key: value for key, value in options.items() if key not in _NOT_TAKEN}


def _advice(run: Path, about: dict[str, Any]) -> str:
    words = ("--recipe", str(about["recipe"])[:80], "--out", run, "--resume")
    return f"give its own arguments: {command_line('student', 'train', *words)} ..."


def told(taken: dict[str, Any]) -> str:
    """Return options as one line for people."""
    shown = [f"{key}={value}" for key, value in list(taken.items())[:_TOLD]]
    return ", ".join([*shown, *(["..."] if len(taken) > _TOLD else [])]) or "none but defaults"
