"""`featcache gallery` draws what a cache stores, on a sample of its pictures, as a page to look
at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import SEED, CachePath, LocalPath, images_variable
from featcache.console.picture_options import with_pictures
from featcache.console.progress_bar import ProgressBar
from featcache.console.text import echo, format_bytes, join_lines, print_facts
from featcache.errors import UsageError, UserError, command_line, counted
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.storage.new_folder import check_new

_COUNT = click.IntRange(1, 10_000)  # of pictures on one page


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="Draw pictures of a cache as a page to look at.",
    epilog="Examples:\n"
    "  featcache gallery caches/clip-b16-1a2b3c4d --out gallery --images train/\n"
    "  featcache gallery caches/clip-b16-1a2b3c4d --out two --keys n01440764/n01440764_10026 "
    "--views 1",
)
@click.argument("cache", type=CachePath())
@option(
    "--out", group=HelpGroup.INPUT, type=LocalPath(), required=True, help="A new or empty folder."
)
@option(
    "--count",
    group=HelpGroup.INPUT,
    type=_COUNT,
    help="How many pictures are drawn, chosen by --seed. [default: 24]",
)
@option("--seed", group=HelpGroup.INPUT, type=SEED, help="Which pictures are drawn. [default: 0]")
@option(
    "--keys",
    group=HelpGroup.INPUT,
    multiple=True,
    metavar="KEY",
    help="Draw this picture; may be given again.",
)
@option(
    "--views",
    group=HelpGroup.VIEWS,
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Of each picture only the first N views.",
)
@with_pictures(
    "images_spec",
    group=HelpGroup.INPUT,
    help="The pictures of the extraction. [default: $FEATCACHE_IMAGES, else none]",
)
@option(
    "--json",
    "as_json",
    group=HelpGroup.REPORT,
    is_flag=True,
    help="Print what was written as JSON.",
)
def command(
    cache: Path,
    out: Path,
    count: int | None,
    seed: int | None,
    keys: tuple[str, ...],
    views: int,
    images_spec: str | None,
    as_json: bool,
) -> None:
    """Draw pictures of CACHE as a page: views and their boxes, attention, visible patches and
    features as colours.

    Without --images, views are drawn from what the cache stores alone: their pixels, or the means
    of blocks of pixels.
    """
    from featcache.drawing import gallery, row_choice

    check_new(out)
    if keys and (count is not None or seed is not None):
        raise UsageError("--keys names the pictures, --count and --seed choose them: give one way")
    bar = ProgressBar("gallery", "pictures")
    with Cache(cache, partial=True) as opened:
        if keys:
            rows = row_choice.by_keys(opened, keys)
        else:
            rows = row_choice.by_seed(24 if count is None else count, len(opened), seed or 0)
        images = images_spec or images_variable()
        done = gallery.draw(opened, rows, out, images=images, views=views, progress=bar)
        said = manifest.title(opened.manifest, len(opened), opened.views)
    bar.close()
    print_facts({"cache": str(cache), **done}, as_json, _text(done, said))
    _tell_problems(cache, done)


def _text(done: dict[str, Any], title: str) -> str:
    return join_lines(
        [
            title,
            f"{counted(done['pictures'], 'picture')}, {counted(done['views'], 'view')} each "
            f"-> {done['out']}/index.html ({counted(done['files'], 'file')}, "
            f"{format_bytes(done['bytes'])})",
        ]
    )


def _tell_problems(cache: Path, done: dict[str, Any]) -> None:
    """Say what could not be drawn. Raises UserError where something could not."""
    problems = done["problems"]
    for problem in problems[:10]:
        echo(join_lines([f"note: {problem}"]), err=True)
    if problems:
        raise UserError(
            f"{counted(len(problems), 'problem')} of {str(cache)!r} in {done['out']!r}, each is "
            f"told there, the first: {problems[0]}; `{command_line('featcache', 'verify', cache)}` "
            "tells whether its bytes are at fault"
        )
