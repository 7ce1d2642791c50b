"""`student report` makes a page of runs: curves, what differs, scores, costs, and what the models
make of pictures."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import SEED, CachePath, LocalPath, images_variable
from featcache.console.picture_options import with_pictures
from featcache.console.text import echo, format_bytes, print_facts
from featcache.errors import one_line


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="Make one HTML page of runs.",
    epilog="Examples:\n\n  student report runs/mralign-s0 --out report.html\n\n"
    "  student report runs/a runs/b --cache CACHE --images train/ --out ablation.html",
)
@click.argument("runs", type=LocalPath(), nargs=-1, required=True)
@option(
    "--out",
    group=HelpGroup.INPUT,
    type=LocalPath(),
    required=True,
    metavar="FILE.html",
    help="The page.",
)
@option(
    "--cache",
    group=HelpGroup.INPUT,
    type=CachePath(),
    help="Whose views are shown. [default: the runs' own, below $FEATCACHE_HOME]",
)
@with_pictures(
    "images",
    group=HelpGroup.INPUT,
    help="Pictures to show to the models. [default: $FEATCACHE_IMAGES]",
)
@option(
    "--count",
    group=HelpGroup.INPUT,
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Pictures that are shown.",
)
@option(
    "--seed",
    group=HelpGroup.INPUT,
    type=SEED,
    default=0,
    show_default=True,
    help="Of their choice.",
)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the facts as JSON.")
def command(
    runs: tuple[Path, ...],
    out: Path,
    cache: Path | None,
    images: str | None,
    count: int,
    seed: int,
    as_json: bool,
) -> None:
    """Make one HTML page of RUNS: their curves on shared axes, what differs, scores with intervals,
    costs; and with a cache and its pictures the alignment matrix, attention and features of teacher
    and students, masks and reconstructions.

    The page opens from disk and fetches nothing. What cannot be drawn is told on it, with the
    option that would bring it. A report at FILE.html is replaced; another file is not.
    """
    from student.reporting import report

    request = report.Request(runs, cache, images or images_variable(), count, seed)
    facts = report.write(request, out)
    if not as_json:
        for what in facts["missing"]:
            echo(one_line(f"note: not on the page: {what}"), err=True)
    told = facts["verdict"] if len(runs) > 1 else "1 run"
    shown = f"{out}  {format_bytes(facts['bytes'])}; {told}"
    print_facts(facts, as_json, one_line(shown))
