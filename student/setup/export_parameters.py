"""The parameters of `student export`, which a command line and a Python call share."""

from __future__ import annotations

from collections.abc import Sequence

import click

from featcache.console.params import LocalPath, LocalText


def parameters(formats: Sequence[str]) -> list[click.Parameter]:
    """Return the parameters: the run, one of the formats, the weights and the folder."""
    return [
        click.Argument(["run"], type=LocalPath()),
        click.Option(
            ["--format", "form"],
            type=click.Choice(formats),
            required=True,
            help="timm: its hub format; hf: transformers' ViTModel; mae, vitdet: the names of "
            "MAE's and ViTDet's checkpoints; onnx: one file for ONNX Runtime.",
        ),
        click.Option(
            ["--checkpoint"],
            type=click.IntRange(0, 10**12),
            help="Step of the checkpoint. [default: newest]",
        ),
        click.Option(
            ["--ema"], is_flag=True, help="The average of the weights, of a run that keeps one."
        ),
        click.Option(
            ["--best"], is_flag=True, help="Of a fine-tuning: the weights of its best epoch."
        ),
        click.Option(
            ["--images", "images_spec"],
            type=LocalText(),
            help="Pictures to compare on. [default: FEATCACHE_IMAGES, else a made picture]",
        ),
        click.Option(["--out"], type=LocalPath(), required=True, help="A new or empty folder."),
        click.Option(
            ["--push", "repo"],
            metavar="REPO",
            type=LocalText(),
            help="Then upload the folder to this repository of the Hugging Face hub.",
        ),
        click.Option(["--public"], is_flag=True, help="With --push: a new repository is public."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print as JSON."),
    ]
