"""`student export` writes a run's encoder as another library reads it."""

from __future__ import annotations

from typing import Any

import click

from featcache.console.command import Command, Section
from featcache.console.text import print_facts
from student import exporting
from student.setup import export_parameters


@click.command(
    cls=Command,
    section=Section.TRAIN,
    short_help="Write an encoder for timm, transformers, ONNX and others.",
    params=export_parameters.parameters(exporting.names()),
    epilog="Examples:\n\n  student export runs/mralign-s0 --format timm --out mralign-timm\n\n"
    "  student export RUN --format hf --checkpoint 5000 --ema --images val/ --out DIR\n\n"
    "  student export runs/mralign-s0 --format onnx --out mralign-onnx",
)
def command(as_json: bool, **given: Any) -> None:
    """Write a run's encoder, with its head where it was fine-tuned, for another library: weights,
    the library's config and a model card. It is read back by that library and compared before it is
    called done."""
    from student.api import export

    facts, text = export.carry_out(given)
    print_facts(facts, as_json, text)
