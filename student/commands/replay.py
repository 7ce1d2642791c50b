"""`student replay` runs a micro-batch again whose loss was not finite."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import Choice, LocalPath, LocalText
from featcache.console.text import print_facts
from student.setup import run_parameters


@click.command(
    cls=Command,
    section=Section.TRAIN,
    short_help="Run a step again whose loss was not finite.",
    epilog="Example:\n\n  student replay runs/mralign-s0/nonfinite/step-00000412.safetensors "
    "--precision fp32",
)
@click.argument("file", type=LocalPath())
@option(
    "--recipe",
    "recipe_name",
    group=HelpGroup.INPUT,
    type=LocalText(),
    help="Your own .py file, where the run had one. [default: the run's recipe]",
)
@option(
    "--precision",
    group=HelpGroup.RUNNING,
    type=Choice(run_parameters.PRECISIONS[1:]),
    help="Of the arithmetic. [default: the run's]",
)
@option(
    "--device", group=HelpGroup.RUNNING, help="cpu, cuda, ... [default: cuda where there is one]"
)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print as JSON.")
def command(
    file: Path, recipe_name: str | None, precision: str | None, device: str | None, as_json: bool
) -> None:
    """Run a micro-batch again whose loss was not finite, with the weights of that step; FILE is of
    RUN/nonfinite.

    Tells the loss then and now, and where it goes wrong: weights, inputs, the first module,
    gradients.
    """
    from featcache.runtime.device import pick_device
    from student.training import nonfinite

    facts = nonfinite.run_again(file, recipe_name, pick_device(device), precision)
    print_facts(facts, as_json, nonfinite.text(facts))
