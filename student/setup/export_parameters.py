"""The parameters of `student export`, which a command line and a Python call share."""

from __future__ import annotations

from collections.abc import Sequence

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import Choice, LocalPath, LocalText
from featcache.console.picture_options import picture_options


def parameters(formats: Sequence[str]) -> list[click.Parameter]:
    """Return the parameters: the run, one of the formats, the weights and the folder."""
    return [
        click.Argument(["run"], type=LocalPath()),
        Option(
            ["--format", "form"],
            group=HelpGroup.INPUT,
            type=Choice(formats),
            required=True,
            help="timm: its hub format; hf: transformers' ViTModel; mae, vitdet: the names of "
            "MAE's and ViTDet's checkpoints; onnx: one file for ONNX Runtime.",
        ),
        Option(
            ["--checkpoint"],
            group=HelpGroup.INPUT,
            type=click.IntRange(0, 10**12),
            help="Step of the checkpoint. [default: newest]",
        ),
        Option(
            ["--ema"],
            group=HelpGroup.INPUT,
            is_flag=True,
            help="The average of the weights, of a run that keeps one.",
        ),
        Option(
            ["--best"],
            group=HelpGroup.INPUT,
            is_flag=True,
            help="Of a fine-tuning: the weights of its best epoch.",
        ),
        *picture_options(
            "images_spec",
            group=HelpGroup.INPUT,
            help="Pictures to compare on. [default: $FEATCACHE_IMAGES, else a made picture]",
        ),
        Option(
            ["--out"],
            group=HelpGroup.INPUT,
            type=LocalPath(),
            required=True,
            help="A new or empty folder.",
        ),
        Option(
            ["--push", "repo"],
            group=HelpGroup.INPUT,
            metavar="REPO",
            type=LocalText(),
            help="Then upload the folder to this repository of the Hugging Face hub.",
        ),
        Option(
            ["--public"],
            group=HelpGroup.INPUT,
            is_flag=True,
            help="With --push: a new repository is public.",
        ),
        Option(["--json", "as_json"], group=HelpGroup.REPORT, is_flag=True, help="Print as JSON."),
    ]
