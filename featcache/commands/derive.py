"""`featcache derive` makes a smaller cache of a cache, without its pictures and its teacher."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.commands.copy import FIRST_VIEWS, SOME_LEVELS, carry_out, parse_levels_of
from featcache.console import config_file
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import TOKEN_ORDERS, CachePath, Choice
from featcache.targets import codec_names


@config_file.accepts()
@click.command(
    cls=Command,
    section=Section.MAKE,
    short_help="Make a smaller cache of a cache, without its teacher.",
    epilog="Examples:\n"
    "  featcache derive caches/clip-b16-1a2b3c4d /local/small --codec t4\n"
    "  featcache derive caches/clip-b16-1a2b3c4d /local/small --tokens ranked --keep 58 "
    "--codec t3\n"
    "  featcache derive caches/clip-b16-1a2b3c4d /local/last --levels last:1 --views 1",
)
@click.argument("cache", type=CachePath())
@click.argument("dest", type=CachePath())
@option(
    "--codec",
    group=HelpGroup.STORAGE,
    type=Choice(codec_names.NAMES),
    help="How features are stored: fp16, or q8, t4, t3 of 8, 4, 3 bits. [default: as they are]",
)
@option(
    "--tokens",
    group=HelpGroup.STORAGE,
    type=Choice(TOKEN_ORDERS),
    help="Order of patches: raster, as in the picture, or ranked, in mask order. [default: as they "
    "are]",
)
@option(
    "--keep",
    group=HelpGroup.STORAGE,
    help="Of ranked tokens only the first N patches of a view, or a share such as 0.3. [default: "
    "all that are stored]",
)
@FIRST_VIEWS
@SOME_LEVELS
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the summary as JSON."
)
def command(
    cache: Path,
    dest: Path,
    codec: str | None,
    tokens: str | None,
    keep: str | None,
    views: int | None,
    levels: str | None,
    as_json: bool,
) -> None:
    """Derive a cache at DEST from CACHE: the bytes are those of an extraction with these options.
    If it is stopped or killed, the same command goes on where it was.

    Levels in fp16 become any codec; a lossy one stays as it is. With --views or --levels, additions
    to CACHE are merged: DEST is one flat cache of its own teacher.
    """
    from featcache.maintenance.derive import derive
    from featcache.maintenance.derive_plan import Wish

    chosen = None if levels is None else parse_levels_of(cache, levels)
    wish = Wish(levels=chosen, views=views, tokens=tokens, keep=keep, codec=codec)
    carry_out(
        "derive",
        cache,
        dest,
        as_json,
        lambda progress: derive(cache, dest, wish, progress=progress),
    )
