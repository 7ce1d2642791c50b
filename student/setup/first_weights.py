"""A new run's encoder begins with the weights of another run's encoder (`--init`).

Nothing of what is named is run: a checkpoint and a safetensors file hold weights alone. Positions
are resized to the pictures of the new run by timm's own functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import UserError
from student import checkpoint
from student.features.frozen import digest_of
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
    load = checkpoint.load_encoder if given.is_dir() else checkpoint.load_encoder_file
    encoder, _ = load(given)
    about = {"init": digest_of(encoder, {})}
    return lambda model: _fill(model, encoder, img_size, given), about


@torch.no_grad()
def _fill(model: nn.Module, encoder: Any, img_size: int, given: Path) -> None:
    own: Any = getattr(model, "encoder", None)
    if not isinstance(own, nn.Module):
        raise UserError(
            f"--init {str(given)!r}: the model of this recipe has no encoder to fill; leave --init "
            "out"
        )
    try:
        with warnings.catch_warnings():
            # torch complains of how timm indexes tables, which nothing here can answer
            warnings.filterwarnings("ignore", category=UserWarning, module="timm")
            encoder.set_input_size(img_size=(img_size, img_size))
    except (AssertionError, AttributeError, ValueError) as error:
        raise _unfit(given, f"its encoder takes no pictures of {img_size} pixels") from error
    here, there = own.state_dict(), encoder.state_dict()
    there = {name: value for name, value in there.items() if name in here or not _is_head(name)}
    for name in sorted(here.keys() ^ there.keys()):
        raise _unfit(given, f"{name[:100]} is {'missing' if name in here else 'not of this one'}")
    for name, value in here.items():
        if value.shape != there[name].shape:
            raise _unfit(
                given, f"{name} is {tuple(there[name].shape)}, {tuple(value.shape)} is needed"
            )
    own.load_state_dict(there)


def _is_head(name: str) -> bool:
    return name.startswith(("head.", "fc_norm."))


def _unfit(given: Path, why: str) -> UserError:
    return UserError(
        f"--init {str(given)!r} does not fit this run's encoder: {why}; give a run of the same "
        "encoder and patches, or --set encoder=... as it has"
    )
