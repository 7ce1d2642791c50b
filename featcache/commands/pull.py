"""`featcache pull` copies a cache, or a part of it, from an object store."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.catalog import home
from featcache.commands.copy import FIRST_VIEWS, SOME_LEVELS, carry_out, parse_levels_of
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath, ObjectPath
from featcache.maintenance import transfer
from featcache.storage.mount import mount_at


@click.command(
    cls=Command,
    section=Section.MAKE,
    short_help="Copy a cache, or a part of it, from an object store.",
    epilog="Examples:\n\n  featcache pull s3://bucket/clip-b16\n\n"
    "  featcache pull s3://bucket/clip-b16 /local/last --levels last:1 --views 2\n\n"
    "  featcache pull s3://bucket/clip-b16 /local/small --keep 58",
)
@click.argument("url", type=ObjectPath())
@click.argument("dest", type=LocalPath(), required=False)
@FIRST_VIEWS
@SOME_LEVELS
@option(
    "--keep",
    group=HelpGroup.STORAGE,
    help="Only the first N patches of a view in mask order, or a share such as 0.3. [default: all "
    "that are stored]",
)
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the summary as JSON."
)
def command(
    url: Path,
    dest: Path | None,
    views: int | None,
    levels: str | None,
    keep: str | None,
    as_json: bool,
) -> None:
    """Copy the cache at URL to DEST, by default to $FEATCACHE_HOME; with --views, --levels or
    --keep a part of it, of which alone the bytes are fetched. If it is stopped or killed, the same
    command goes on where it was.
    """
    out = dest or home.home() / mount_at(url).url.name
    chosen = None if levels is None else parse_levels_of(url, levels)

    def work(progress: transfer.TransferProgress) -> list[str]:
        if keep is None:
            return transfer.copy(url, out, views=views, levels=chosen, progress=progress)
        from featcache.maintenance.derive import derive
        from featcache.maintenance.derive_plan import Wish

        wish = Wish(levels=chosen, views=views, tokens="ranked", keep=keep, codec=None)
        return derive(url, out, wish, progress=progress)

    carry_out("pull", url, out, as_json, work)
