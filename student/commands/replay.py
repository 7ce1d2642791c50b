"""`student replay` runs a micro-batch again whose loss was not finite."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.console.params import LocalPath, LocalText
from featcache.console.text import print_facts


@click.command(
    epilog="Example:\n\n  student replay runs/mralign-s0/nonfinite/step-00000412.safetensors "
    "--precision fp32"
)
@click.argument("file", type=LocalPath())
@click.option(
    "--recipe",
    "recipe_name",
    type=LocalText(),
    help="Your own .py file, where the run had one. [default: the run's recipe]",
)
@click.option("--precision", help="fp32, bf16 or fp16. [default: the run's]")
@click.option("--device", help="cpu, cuda, ... [default: cuda where there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    file: Path, recipe_name: str | None, precision: str | None, device: str | None, as_json: bool
) -> None:
    """Run a micro-batch again whose loss was not finite, with the weights it met; FILE is of
    RUN/nonfinite.

    Tells the loss then and now, and where it goes wrong: weights, inputs, the first module,
    gradients.
    """
    from featcache.runtime.device import pick_device
    from student.training import nonfinite

    facts = nonfinite.run_again(file, recipe_name, pick_device(device), precision)
    print_facts(facts, as_json, nonfinite.text(facts))
