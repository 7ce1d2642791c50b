"""`student train` trains a student by a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from featcache.console import config_file
from featcache.console.command import Command, Section
from student.setup import train_parameters


def _settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the recipe, from --config and --set."""
    from student import recipes
    from student.setup.file_settings import merged_values

    return merged_values(recipes.load(given["recipe_name"]).Config, given)


def _setting(option: str) -> str:
    """Say that an unknown option is a setting of recipes, which --set gives."""
    import dataclasses

    from student import recipes

    key = option.lstrip("-").replace("-", "_")
    kinds = (recipes.load(name).Config for name in recipes.names())
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return f"it is a setting of the recipe: --set {key}=VALUE" if key in known else ""


def _recorded(run: Path) -> dict[str, Any]:
    """Return the options that a run was made with."""
    from student.setup import recorded_options

    return recorded_options.read(run)


@config_file.accepts(
    settings=_settings,
    own_code={
        "recipe_name": lambda name: not name.endswith(".py"),
        "teacher_name": config_file.is_registered,
    },
    rivals={"epochs": "steps", "steps": "epochs"},
    also_settings=("epochs",),
    recorded=_recorded,
    choice_or_setting=("teacher", "decoder"),
)
@click.command(
    cls=Command,
    section=Section.TRAIN,
    short_help="Train a student by a recipe.",
    unknown=_setting,
    params=train_parameters.parameters(),
    epilog="Examples:\n  student train --images train/ --epochs 200\n"
    "  student train --recipe mralign --cache caches/clip-b16-1a2b3c4d "
    "--batch-size 256\n"
    "  student train --recipe maskalign --images train/ --set encoder=small "
    "--set drop_path=0 --out runs/small\n"
    "  accelerate launch -m student train --recipe mralign --cache CACHE --out RUN --resume\n"
    "  student train --resume runs/mralign-s0\n"
    "  student train --config run.yaml --seed 1",
)
def command(as_json: bool, **given: Any) -> None:
    """Train a student by RECIPE from cached targets, or with the teacher in the loop.

    Stopped by Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 it saves a checkpoint after the step in hand and
    exits with status 75; --resume goes on, and --resume RUN alone does so by the options that the
    run was made with.
    """
    from student.api import train
    from student.setup.console import TERMINAL

    train.carry_out(given, TERMINAL).print(as_json)
