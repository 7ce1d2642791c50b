"""`featcache convert` writes a cache in the other store, without the teacher."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.commands.copy import carry_out
from featcache.console.params import LocalPath
from featcache.maintenance import transfer
from featcache.storage.store import STORES


@click.command(
    epilog="Examples:\n\n"
    "  featcache convert caches/clip-b16-1a2b3c4d /data/clip-b16-tars --store webdataset\n\n"
    "  featcache convert /data/clip-b16-tars caches/clip-b16 --store zarr"
)
@click.argument("cache", type=LocalPath())
@click.argument("out", type=LocalPath())
@click.option(
    "--store", "name", type=click.Choice(list(STORES)), required=True, help="The store of OUT."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(cache: Path, out: Path, name: str, as_json: bool) -> None:
    """Write CACHE, and what was added to it, to OUT in the other store. Killed, the same command
    continues.

    Every row is checked as it is read; converting back gives the same bytes again.
    """
    carry_out(
        "convert",
        out,
        as_json,
        lambda progress: transfer.convert(cache, out, name, progress=progress),
    )
