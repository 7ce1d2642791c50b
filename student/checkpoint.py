"""A checkpoint of a run is one file a step, complete or absent, and read without running anything
in it.

    RUN/checkpoints/step-00000020.pt = {step, model, optimizer, scaler, skipped},
                                         and ema with `--ema`
    RUN/encoder.safetensors          = the newest one's encoder alone, with all that builds it

No generator's state is kept: every random draw of a step is seeded by (seed, step), so a run
resumes by arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcache.errors import UsageError, UserError
from featcache.models import restricted_unpickler
from featcache.runtime import strict_json
from featcache.runtime.meter import meter
from featcache.storage import json_file
from student.models import classifier, weights_file
from student.models.build import build_encoder

FOLDER = "checkpoints"
ENCODER = "encoder.safetensors"
ENCODER_FORMAT = "featcache encoder 1"
KEEP = 2  # newest checkpoints of a run that stay on disk
CONFIG = "config.json"
_NAME = re.compile(r"step-\d{8,12}\.pt")
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of a parameter, in AdamW's state
# of a group of parameters: those that change numbers
_SETTINGS = {
    "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay",
}  # fmt: skip
EMA = "ema"  # the average of the weights in a checkpoint, where the run keeps one


@dataclass(frozen=True)
class Retention:
    """Says which checkpoints of a run stay: the newest ones, and every one whose step `every`
    divides (None: no others)."""

    newest: int = KEEP
    every: int | None = None

    def dropped(self, paths: list[Path]) -> list[Path]:
        """Return those of a run's checkpoints, oldest first, that do not stay."""
        return [
            path
            for path in paths[: -self.newest]
            if self.every is None or step_of(path) % self.every
        ]


def save(run: Path, step: int, content: dict[str, Any], retention: Retention = Retention()) -> Path:
    """Write the checkpoint of `step`, durable before older ones go."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    json_file.sweep(folder)
    # an open file: given a path, torch would write the temporary name into the archive
    with json_file.replaced(path) as temporary, temporary.open("wb") as file:
        torch.save({"step": step, **content}, file)
        meter.count("bytes_written", file.tell())
    for old in retention.dropped(list_checkpoints(run)):
        old.unlink()
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; a file that was being written when its process
    died is not among them, nor is anything else that lies there."""
    found = [path for path in (run / FOLDER).glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_file()), key=step_of)


def latest_step(run: Path) -> int | None:
    """Return the step of a run's newest checkpoint; None where there is none."""
    paths = list_checkpoints(run)
    return step_of(paths[-1]) if paths else None


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.stem.removeprefix("step-"))


def load_latest(run: Path) -> dict[str, Any]:
    """Read the newest checkpoint, as `load` does."""
    return load(run, None)


def load(run: Path, step: int | None) -> dict[str, Any]:
    """Read a checkpoint (None: the newest) onto the CPU: {step, model, optimizer, scaler, skipped}
    and perhaps ema, of the types that `save` writes; anything else is a UserError."""
    path = _path(run, step)
    try:
        saved = restricted_unpickler.load(path)
    except (OSError, ValueError) as error:  # truncated or foreign files fail in many ways
        raise _unusable(run, f"cannot be read ({str(error)[:120]})", step) from error
    if why := _problem(saved, step_of(path)):
        raise _unusable(run, why, step)
    return dict(saved)


def _path(run: Path, step: int | None) -> Path:
    paths = list_checkpoints(run)
    if not paths:
        raise UserError(
            f"run {str(run)!r} has no checkpoint; train it first, or give the folder of a run"
        )
    found = [path for path in paths if step is None or step_of(path) == step]
    if not found:
        steps = [str(step_of(path)) for path in paths]
        shown = ", ".join([*steps[:8], *(["..."] if len(steps) > 8 else [])])
        raise UsageError(
            f"run {str(run)!r} has no checkpoint of step {step}; there are those of {shown}; "
            "`student train --keep-checkpoints` says which ones stay"
        )
    return found[-1]


def _problem(saved: object, step: int) -> str:
    """Say what keeps an object from being the content of a checkpoint; empty where nothing does."""
    if not (isinstance(saved, dict) and type(saved.get("step")) is int and "model" in saved):
        return "does not hold a step and a model"
    if saved["step"] != step:
        return f"holds step {str(saved['step'])[:20]}, its name another"
    skipped = saved.get("skipped", 0)
    if type(skipped) is not int or not 0 <= skipped <= step:
        return "holds no number of steps that were left out"
    if not all(isinstance(saved.get(part, {}), dict) for part in ("optimizer", "scaler")):
        return "does not hold an optimizer and a scaler"
    for part in ("model", EMA):
        if why := _weights_problem(saved.get(part, {})):
            return f"holds {why} in the place of {part}"
    return ""


def _weights_problem(weights: object) -> str:
    if not isinstance(weights, dict):
        return "something else"
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return "what are no named tensors"
        if value.is_floating_point() and value.element_size() < 2:
            return f"quantised values of {name[:100]!r}"
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return f"values of {name[:100]!r} that are not finite"
    return ""


def restore(
    run: Path, saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> int:
    """Load a checkpoint into model and optimizer (None: its turn comes later); return its step."""
    _load_weights(run, model, saved["model"], "does not fit this run's model")
    if optimizer is not None:
        try:
            optimizer.load_state_dict(optimizer_state(run, saved, optimizer))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise _unusable(run, "does not fit this run's optimizer") from error
    return int(saved["step"])


def restore_ema(run: Path, saved: dict[str, Any], average: nn.Module) -> None:
    """Load a checkpoint's average of the weights (--ema) into a model."""
    _load_weights(run, average, saved.get(EMA, {}), "holds no average of this run's model")


def _load_weights(run: Path, model: nn.Module, weights: dict[str, Any], what: str) -> None:
    own = model.state_dict()
    if _mismatch(own, weights):
        raise _unusable(run, f"{what} ({_mismatch(own, weights)})")
    model.load_state_dict(weights)


def _mismatch(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Name the first difference in names, shapes and kinds of numbers; empty where all agree."""
    for name in sorted(own.keys() ^ given.keys()):
        return f"{name[:100]} is {'missing' if name in own else 'unknown'}"
    for name, value in own.items():
        if value.shape != given[name].shape:
            return f"{name} is {tuple(given[name].shape)}, {tuple(value.shape)} is needed"
        if value.is_floating_point() != given[name].is_floating_point():
            return f"{name} is {given[name].dtype}, {value.dtype} is needed"
    return ""


def optimizer_state(
    run: Path, saved: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Return a checkpoint's moments of every parameter, with this run's own settings of the groups;
    UserError where they are another optimizer's."""
    given, own = saved.get("optimizer"), optimizer.state_dict()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    if not isinstance(given, dict) or not _same_groups(given.get("param_groups"), own):
        raise _unusable(run, "holds another optimizer's settings")
    state = given.get("state")
    if not isinstance(state, dict) or not set(state) <= set(range(len(parameters))):
        raise _unusable(run, "holds no state of this run's optimizer")
    for i, moments in state.items():
        if not isinstance(moments, dict) or not all(
            _is_moment(name, value, parameters[i]) for name, value in moments.items()
        ):
            raise _unusable(run, f"holds no moments of parameter {i} of this run's optimizer")
    return {"state": state, "param_groups": own["param_groups"]}


def _same_groups(given: object, own: dict[str, Any]) -> bool:
    """Tell whether groups have the same parameters, and the settings that change numbers are the
    same; the learning rate is set at every step."""
    groups = own["param_groups"]
    if not isinstance(given, list) or len(given) != len(groups):
        return False
    for group, other in zip(groups, given, strict=True):
        if not isinstance(other, dict) or other.get("params") != group["params"]:
            return False
        for name in _SETTINGS & group.keys() & other.keys():
            here, there = group[name], other[name]
            if isinstance(here, tuple):
                here, there = list(here), list(there) if isinstance(there, tuple) else there
            if type(here) is not type(there) or here != there:
                return False
    return True


def _is_moment(name: object, value: object, parameter: Tensor) -> bool:
    if name not in _MOMENTS or not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if value.element_size() < 2:  # quantised, and torch cannot say whether it is finite
        return False
    shape = () if name == "step" else parameter.shape
    return value.shape == shape and bool(value.isfinite().all())


def check_scaler(run: Path, saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state of the loss scaler, whose `own` is at its start; UserError where
    it is another's."""
    given = saved.get("scaler")
    moving = ("scale", "_growth_tracker")
    good = (
        isinstance(given, dict)
        and given.keys() == own.keys()
        and all(type(value) in (int, float) for value in given.values())
        and all(given[name] == value for name, value in own.items() if name not in moving)
        and 0 < given["scale"] < float("inf")
        and 0 <= given["_growth_tracker"] <= own["growth_interval"]
    )
    if not good:
        raise _unusable(run, "holds no state of this run's loss scaler")
    return dict(given)  # type: ignore[arg-type]


def _unusable(run: Path, what: str, step: int | None = None) -> UserError:
    """Say what is wrong with a run's checkpoint: the newest, or that of `step`."""
    return UserError(
        f"checkpoint {str(_path(run, step))!r} {what}; remove it to go on from the one before"
    )


def read_config(run: Path) -> dict[str, Any]:
    """Read config.json of a run: an object with the recipe's name and its configuration at
    least."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(
            f"no run at {str(run)!r}: {CONFIG} is missing; give the folder that `student train "
            "--out` wrote"
        )
    try:
        record = strict_json.as_object(strict_json.read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is damaged: {error}; restore it, or train again into another --out"
        ) from error
    if not (isinstance(record.get("recipe"), str) and isinstance(record.get("config"), dict)):
        raise UserError(
            f"{str(path)!r} is not of a run: it lacks a recipe and its config; give the folder "
            "that `student train --out` wrote"
        )
    return record


def load_encoder(
    run: Path, ema: bool = False, step: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the encoder of a run's newest checkpoint, or of the one of `step`, in eval mode, or
    the average of its weights, and the recipe's configuration."""
    settings = read_config(run)["config"]
    return encoder_of(run, settings, load(run, step), ema), settings


def encoder_of(run: Path, settings: dict[str, Any], saved: Any, ema: bool) -> nn.Module:
    """Return the encoder, in eval mode, of a checkpoint that was read already."""
    weights = _part(_weights(run, saved, ema), "encoder.")
    try:
        return _fill(lambda: _build_encoder(run, settings), weights)
    except ValueError as error:
        raise _unfit(run, "encoder", error, saved["step"]) from error


def save_encoder(
    run: Path, step: int, recipe: str, settings: Mapping[str, Any], model: Mapping[str, Any]
) -> None:
    """Write the encoder of a run's model as it is at `step`, without the average of its weights,
    beside the checkpoints. Whole or not at all, so that step and weights are always of each other;
    a model without an `encoder` has none. Costs 4 bytes a parameter, a fourth or fifth of its
    checkpoint."""
    weights = _part(dict(model), "encoder.")
    if weights:
        facts = {"format": ENCODER_FORMAT, "step": step, "recipe": recipe, "config": settings}
        weights_file.write(run / ENCODER, weights, facts)


def load_encoder_file(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the encoder of an `encoder.safetensors`, in eval mode, and its facts: {format, step,
    recipe, config}. The file is enough, wherever it lies. Raises UserError for any other file.

    module, facts = load_encoder_file(Path("runs/mralign-s0/encoder.safetensors"))
    """
    try:
        facts, weights = weights_file.read(path)
        if facts.get("format") != ENCODER_FORMAT or not isinstance(facts.get("config"), dict):
            raise ValueError(f"it is not of the format {ENCODER_FORMAT!r}")
        if type(facts.get("step")) is not int or not isinstance(facts.get("recipe"), str):
            raise ValueError("it says no step and recipe")
        return _fill(lambda: _build(facts["config"]), weights), facts
    except (OSError, UserError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is no encoder of a run: {str(error).splitlines()[0][:300]}; give the "
            f"{ENCODER} of a run, or take load_encoder(RUN)"
        ) from error


def load_model(
    run: Path, build: Callable[[], nn.Module], ema: bool = False, step: int | None = None
) -> nn.Module:
    """Return the whole model of a run, which `build` makes by its configuration, in eval mode; else
    as `load_encoder` does."""
    weights = _weights(run, load(run, step), ema)
    try:
        return _fill(build, weights)
    except ValueError as error:
        raise _unfit(run, "model", error, step) from error


def _unfit(run: Path, what: str, error: ValueError, step: int | None) -> UserError:
    return _unusable(run, f"does not fit the {what} of its {CONFIG} ({error})", step)


def _weights(run: Path, saved: dict[str, Any], ema: bool) -> dict[str, Any]:
    """Return the weights of a checkpoint, or their average."""
    if ema and EMA not in saved:
        raise UsageError(
            f"--ema: run {str(run)!r} keeps no average of its weights; leave --ema out, or train "
            "with it"
        )
    return dict(saved[EMA if ema else "model"])


def _fill(build: Callable[[], nn.Module], weights: dict[str, Any]) -> nn.Module:
    """Build a network twice, first without memory: a file's sizes are believed only where there
    are such weights. Raises ValueError where they do not fit."""
    with torch.device("meta"):
        own = build().state_dict()
    if why := _mismatch(own, weights):
        raise ValueError(why)
    network = build()
    network.load_state_dict(weights)
    return network.eval()


def _build_encoder(run: Path, settings: dict[str, Any]) -> nn.Module:
    """Build the encoder that config.json describes; what cannot be meant is that file's fault."""
    try:
        return _build(settings)
    except UserError as error:
        raise UserError(f"{str(run / CONFIG)!r}: {error}") from error


def _build(settings: dict[str, Any]) -> nn.Module:
    """Build the encoder of a recipe's settings, with its head where it was fine-tuned."""
    build = classifier.build if classifier.is_meant(settings) else build_encoder
    return build(settings, settings.get("family", "mae"))


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
