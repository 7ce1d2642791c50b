"""`featcache extract` runs a teacher once over the views of pictures, and stores its targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from featcache.api.extract import carry_out
from featcache.console import config_file, extract_parameters
from featcache.console.command import Command, Section
from featcache.console.extract_options import ExtractOptions
from featcache.console.progress_bar import ProgressBar, WaitingNote
from featcache.console.text import echo, print_facts, say

if TYPE_CHECKING:
    from featcache.extraction.progress import ExtractProgress


@config_file.accepts(
    own_code={"names": config_file.is_registered},
    rivals={"device": "devices", "devices": "device"},
    soft=("batch_size",),  # a cache that was begun has its own
)
@click.command(
    cls=Command,
    section=Section.MAKE,
    short_help="Run a teacher over views of pictures, and store its targets.",
    params=extract_parameters.parameters(),
    epilog="Examples:\n"
    "  featcache extract --teacher clip-b16 --images train/ --views 4 --levels last:5\n"
    "  featcache extract --teacher clip-b16 --images 'train-{000000..001281}.tar' "
    "--weights ViT-B-16.safetensors\n"
    "  featcache extract --teacher clip-b16 --teacher dino-b16 --levels last:5 "
    "--levels dino-b16=-1 --images train/\n"
    "  featcache extract --for maskalign,mrmae --images train/ --views 4\n"
    "  featcache extract --teacher synthetic:levels=5,tokens=196,width=768 --images photos/ "
    "--out trial\n"
    "  featcache extract --append --images photos-2026/ --out trial\n"
    "  featcache extract --teacher clip-b16 --images /data/train --out /data/clip --engine ray "
    "--address auto\n"
    "  featcache extract --config cache.yaml --dry-run",
)
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Run a frozen teacher over augmented views of pictures and store what students learn from:
    features of its blocks, its attention, and orders of patches to mask by.

    If it is stopped or killed, the same command goes on where it was.
    """
    options = ExtractOptions(**given)
    asked = ctx.get_parameter_source("batch_size") is not ParameterSource.DEFAULT
    facts, text = carry_out(options, _shown, say, keeps_batch=asked)
    print_facts(facts, options.as_json, text)


@contextlib.contextmanager
def _shown() -> Iterator[ExtractProgress]:
    """Show the progress as a bar."""
    from featcache.extraction.progress import ExtractProgress

    with contextlib.closing(ProgressBar("extract", "pictures")) as bar:

        def show(now: ExtractProgress) -> None:
            bar.first = now.there
            bar(now.there + now.pictures, now.there + now.total)

        progress = ExtractProgress(
            show, WaitingNote(), lambda text: echo(f"note: {text}", err=True)
        )
        bar.text = lambda done, total: f"slowest: {progress.slowest}"
        yield progress
