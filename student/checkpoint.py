"""A checkpoint of a run is one file a step, complete or absent, and read without running anything
in it.

    RUN/checkpoints/step-00000020.pt = {step, model, optimizer, scaler, skipped},
                                         and ema with `--ema`

No generator's state is kept: every random draw of a step is seeded by (seed, step), so a run
resumes by arithmetic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import UsageError, UserError
from featcache.storage import json_file
from student.models.build import build_encoder

FOLDER = "checkpoints"
KEEP = 2  # newest checkpoints of a run that stay on disk
CONFIG = "config.json"
EMA = "ema"  # the average of the weights in a checkpoint, where the run keeps one


def save(run: Path, step: int, content: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`, durable before older ones go."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    json_file.sweep(folder)
    # an open file: given a path, torch would write the temporary name into the archive
    with json_file.replaced(path) as temporary, temporary.open("wb") as file:
        torch.save({"step": step, **content}, file)
    for old in list_checkpoints(run)[:-KEEP]:
        old.unlink()
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; a file that was being written when its process
    died is not among them."""
    return sorted((run / FOLDER).glob("step-*.pt"))


def latest_step(run: Path) -> int | None:
    """Return the step of a run's newest checkpoint; None where there is none."""
    paths = list_checkpoints(run)
    return int(paths[-1].stem.removeprefix("step-")) if paths else None


def load_latest(run: Path) -> dict[str, Any]:
    """Read the newest checkpoint onto the CPU."""
    paths = list_checkpoints(run)
    if not paths:
        raise UserError(
            f"run {str(run)!r} has no checkpoint; train it first, or give the folder of a run"
        )
    try:
        saved = torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # truncated or foreign files fail in many ways
        raise _unusable(run, f"cannot be read ({type(error).__name__})") from error
    if not (
        isinstance(saved, dict)
        and isinstance(saved.get("step"), int)
        and isinstance(saved.get("model"), dict)
    ):
        raise _unusable(run, "does not hold a step and a model")
    return saved


def restore(
    run: Path, saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> int:
    """Load a checkpoint into model and optimizer (None: its turn comes later); return its step."""
    try:
        model.load_state_dict(saved["model"])
        if optimizer is not None:
            optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _unusable(run, "does not fit this run's model") from error
    return int(saved["step"])


def restore_ema(run: Path, saved: dict[str, Any], average: nn.Module) -> None:
    """Load a checkpoint's average of the weights (--ema) into a model."""
    try:
        average.load_state_dict(saved[EMA])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(run, "holds no average of this run's model") from error


def _unusable(run: Path, what: str) -> UserError:
    return UserError(
        f"checkpoint {str(list_checkpoints(run)[-1])!r} {what}; remove it to go on from the one "
        "before"
    )


def read_config(run: Path) -> dict[str, Any]:
    """Read config.json of a run."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(
            f"no run at {str(run)!r}: {CONFIG} is missing; give the folder that `student train "
            "--out` wrote"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{str(path)!r} is damaged: {error}; restore it, or train again into another --out"
        ) from error


def load_encoder(run: Path, ema: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Return the newest encoder of a run in eval mode, or the average of its weights, and the
    recipe's configuration."""
    settings = read_config(run)["config"]
    saved = load_latest(run)
    if ema and EMA not in saved:
        raise UsageError(
            f"--ema: run {str(run)!r} keeps no average of its weights; leave --ema out, or train "
            "with it"
        )
    weights = saved[EMA if ema else "model"]
    encoder = build_encoder(settings, settings.get("family", "mae"))
    try:
        encoder.load_state_dict(_part(weights, "encoder."))
    except RuntimeError as error:
        raise _unusable(run, "does not fit the encoder of its config.json") from error
    return encoder.eval(), settings


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
