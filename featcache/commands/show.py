"""`featcache show` tells one record of a cache: its views, what the teacher says of them, and
whether every byte is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.console import record_text
from featcache.console.block_map import terminal_shades
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import CachePath, LocalPath, images_variable
from featcache.console.picture_options import with_pictures
from featcache.console.text import echo, join_lines, print_facts
from featcache.errors import UsageError, UserError, command_line
from featcache.reading.cache import Cache
from featcache.storage import json_file

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="Show one record of a cache: views, attention, mask order.",
    epilog="Examples:\n"
    "  featcache show caches/clip-b16-1a2b3c4d n01440764/n01440764_10026\n"
    "  featcache show caches/clip-b16-1a2b3c4d 17 --view 2 --out record.png --images train/",
)
@click.argument("cache", type=CachePath())
@click.argument("key", metavar="KEY|N")
@option(
    "--view",
    group=HelpGroup.VIEWS,
    type=click.IntRange(0, 10**6),
    help="This view alone. [default: all]",
)
@option(
    "--out",
    group=HelpGroup.INPUT,
    type=LocalPath(),
    help="Draw the record into this new PNG file as well.",
)
@with_pictures(
    "images_spec",
    group=HelpGroup.INPUT,
    help="The pictures that --out draws views from. [default: $FEATCACHE_IMAGES, else none]",
)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print everything as JSON.")
def command(
    cache: Path,
    key: str,
    view: int | None,
    out: Path | None,
    images_spec: str | None,
    as_json: bool,
) -> None:
    """Show one record of CACHE, by its key or the number N of its row, from 0: views, norms of
    every level, attention, mask order; every array is compared with its checksum."""
    from featcache.drawing import record, row_choice

    _check_out(out, images_spec)
    with Cache(cache, partial=True) as opened:
        row, note = row_choice.by_word(opened, key)
        views = _views(opened, view)
        if note:
            echo(join_lines([f"note: {note}"]), err=True)
        facts = record.describe(opened, row, views)
        if out is not None:
            facts["problems"] += _draw(opened, row, views, out, images_spec)
    facts["out"] = None if out is None else str(out)
    print_facts(facts, as_json, _text(facts), indent=1)
    if facts["problems"]:
        raise UserError(
            f"row {row} of {str(cache)!r}, key {facts['key'][:200]!r}: {len(facts['problems'])} "
            f"problem(s), the first: {facts['problems'][0]}; "
            f"`{command_line('featcache', 'verify', cache)}` tells whether its bytes are at fault"
        )


def _check_out(out: Path | None, images: str | None) -> None:
    if out is None and images is not None:
        raise UsageError(
            "--images gives --out its pixels, and no --out is given; add --out FILE.png"
        )
    if out is not None and out.suffix.lower() != ".png":
        raise UsageError(
            f"--out {str(out)!r}: a PNG file is drawn; give a name that ends with .png"
        )
    if out is not None and (out.exists() or out.is_symlink()):
        raise UserError(
            f"--out {str(out)!r} is there already, and nothing is overwritten; give another"
        )


def _views(cache: Cache, view: int | None) -> list[int]:
    if view is not None and view >= cache.views:
        raise UsageError(
            f"--view {view}: cache {str(cache.path)!r} has views 0 to {cache.views - 1}; give one "
            "of these"
        )
    return list(range(cache.views)) if view is None else [view]


def _draw(cache: Cache, row: int, views: Sequence[int], out: Path, images: str | None) -> list[str]:
    """Draw the record into a file; return what is wrong with its pixels."""
    from featcache.drawing import pictures, record
    from featcache.drawing.view_pixels import Pictures

    pixels, problems = record.draw(cache, row, views, Pictures(cache, images or images_variable()))
    try:
        if not json_file.create_file(out, pictures.png(pixels)):
            raise UserError(f"--out {str(out)!r} is there already; give another")
    except OSError as error:
        raise UserError(
            f"--out {str(out)!r} cannot be written: {error.strerror or error}; give another file"
        ) from error
    return problems


def _text(facts: dict[str, Any]) -> str:
    shown = [*record_text.lines(facts, terminal_shades())]
    return join_lines([*shown, *([f"drawn: {facts['out']}"] if facts["out"] else [])])
