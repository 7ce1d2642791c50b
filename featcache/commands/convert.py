"""`featcache convert` writes a cache in another store or format, without the teacher."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.commands.copy import carry_out
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import CachePath, Choice
from featcache.maintenance import transfer
from featcache.storage.store import FORMATS, STORES


@click.command(
    cls=Command,
    section=Section.MAKE,
    short_help="Write a cache in another store or format.",
    epilog="Examples:\n\n"
    "  featcache convert caches/clip-b16-1a2b3c4d /data/clip-b16-tars --store webdataset\n\n"
    "  featcache convert /data/clip-b16-tars caches/clip-b16 --store zarr\n\n"
    "  featcache convert caches/old caches/new --format 4",
)
@click.argument("cache", type=CachePath())
@click.argument("out", type=CachePath())
@option(
    "--store",
    group=HelpGroup.STORAGE,
    type=Choice(list(STORES)),
    help="The store of OUT. [default: that of CACHE]",
)
@option(
    "--format",
    group=HelpGroup.STORAGE,
    type=Choice([*map(str, FORMATS)]),
    help="The format of OUT; 4 has an index of rows for other libraries. [default: that of CACHE]",
)
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the summary as JSON."
)
def command(cache: Path, out: Path, store: str | None, format: str | None, as_json: bool) -> None:
    """Write CACHE, and what was added to it, to OUT in another store or format. If it is
    stopped or killed, the same command goes on where it was.

    Every row is checked as it is read; converting back gives the same rows, to the byte.
    """
    carry_out(
        "convert",
        cache,
        out,
        as_json,
        lambda progress: transfer.convert(
            cache, out, store=store, format=int(format) if format else None, progress=progress
        ),
    )
