"""A new run's encoder begins with the weights of another encoder (`--init`): of a run, of its
encoder.safetensors, or of a folder that `student export` wrote.

Nothing of what is named is run: a checkpoint and a safetensors file hold weights alone. Positions
are resized to the pictures of the new run by timm's own functions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import UserError
from featcache.models.weights import load_state
from student import checkpoint
from student.features import exported_weights
from student.features.exported_weights import ExportedWeights, Traits, traits_of
from student.features.frozen import digest_of, digest_of_tensors
from student.setup.options import Options

Start = Callable[[nn.Module], None]


def first_weights(
    options: Options, out: Path, img_size: int
) -> tuple[Start | None, dict[str, Any]]:
    """Return what gives a new model its first weights, and what config.json says of it; a run that
    goes on has its own weights, and keeps what it says."""
    if options.init is None:
        return None, {}
    if options.resume and (out / checkpoint.CONFIG).is_file():
        targets = checkpoint.read_config(out).get("targets")
        if isinstance(targets, dict) and "init" in targets and checkpoint.list_checkpoints(out):
            return None, {"init": targets["init"]}
    given = options.init
    if given.is_dir() and not exported_weights.is_run(given):
        found = exported_weights.read(given)
        about = {"init": digest_of_tensors(found.state)}
        return lambda model: _fill_exported(model, found, img_size, given), about
    encoder = checkpoint.load_encoder(given)[0] if given.is_dir() else _of_file(given)
    about = {"init": digest_of(encoder, {})}
    return lambda model: _fill(model, encoder, img_size, given), about


def _of_file(given: Path) -> nn.Module:
    try:
        return checkpoint.load_encoder_file(given)[0]
    except UserError as error:
        why = str(error).rpartition("; give")[0]
        raise UserError(f"--init: {why}; give {exported_weights.CAN_BE}") from error


def _fill_exported(model: nn.Module, found: ExportedWeights, img_size: int, given: Path) -> None:
    """Let an encoder of the run's own kind, at the picture size of the export, take its weights
    first."""
    encoder = copy.deepcopy(_encoder_of(model, given))
    _check_traits(encoder, found.traits, given)
    _set_size(encoder, found.img_px, given)
    _check_shapes(encoder.state_dict(), found.state, given)
    load_state(encoder, found.state, str(given), "--init")
    _fill(model, encoder, img_size, given)


@torch.no_grad()
def _fill(model: nn.Module, encoder: Any, img_size: int, given: Path) -> None:
    own = _encoder_of(model, given)
    _check_traits(own, traits_of(encoder), given)
    _set_size(encoder, img_size, given)
    here, there = own.state_dict(), encoder.state_dict()
    there = {name: value for name, value in there.items() if name in here or not _is_head(name)}
    _check_shapes(here, there, given)
    own.load_state_dict(there)


def _encoder_of(model: nn.Module, given: Path) -> nn.Module:
    own: Any = getattr(model, "encoder", None)
    if not isinstance(own, nn.Module):
        raise UserError(
            f"--init {str(given)!r}: the model of this recipe has no encoder to fill; leave --init "
            "out"
        )
    return own


def _check_traits(own: nn.Module, there: Traits, given: Path) -> None:
    """Refuse what no shape tells, and would be run wrongly without a word."""
    here = asdict(traits_of(own))
    for fact, value in asdict(there).items():
        if here[fact] != value:
            told = [", ".join(map(str, each)) or "none" for each in (value, here[fact])]
            raise _unfit(given, f"{fact} {told[0]}, {told[1]} is needed")


def _set_size(encoder: Any, img_size: int, given: Path) -> None:
    try:
        with warnings.catch_warnings():
            # torch complains of how timm indexes tables, which nothing here can answer
            warnings.filterwarnings("ignore", category=UserWarning, module="timm")
            encoder.set_input_size(img_size=(img_size, img_size))
    except (AssertionError, AttributeError, ValueError) as error:
        raise _unfit(given, f"its encoder takes no pictures of {img_size} pixels") from error


def _check_shapes(here: dict[str, Any], there: dict[str, Any], given: Path) -> None:
    for name in sorted(here.keys() ^ there.keys()):
        raise _unfit(given, f"{name[:100]} is {'missing' if name in here else 'not of this one'}")
    for name, value in here.items():
        if value.shape != there[name].shape:
            raise _unfit(
                given, f"{name} is {tuple(there[name].shape)}, {tuple(value.shape)} is needed"
            )


def _is_head(name: str) -> bool:
    return name.startswith(("head.", "fc_norm."))


def _unfit(given: Path, why: str) -> UserError:
    return UserError(
        f"--init {str(given)!r} does not fit this run's encoder: {why}; give one of the same "
        "encoder and patches (of exports, timm's alone keeps LayerScale), or --set encoder=... as "
        "it has"
    )
