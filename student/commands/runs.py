"""`student runs` lists the runs below a folder: how far they are, and how good."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath
from featcache.console.text import echo, format_json
from featcache.errors import one_line


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="List the runs below a folder: how far, and how good.",
    epilog="Examples:\n\n  student runs\n\n  student runs /data/runs --sort linear/test\n\n"
    "  student runs --json",
)
@click.argument("folder", type=LocalPath(), default=Path("runs"), required=False)
@option(
    "--sort",
    group=HelpGroup.REPORT,
    metavar="SCORE",
    help="Best first by the newest score of this protocol, or of PROTOCOL/TEST.",
)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print everything as JSON.")
def command(folder: Path, sort: str | None, as_json: bool) -> None:
    """List the runs below FOLDER, or below runs/: recipe, state, step, loss, learning rate, newest
    scores, size on disk and the time of the last row.

    Nothing in a folder tells that a process is at work: a run that wrote a row within ten minutes
    is `running?`. A damaged run is one line. Links are not followed.
    """
    from student.reporting import run_facts, score_order, tables

    found = [run_facts.describe(run) for run in run_facts.find(folder)]
    damaged = [facts for facts in found if "damaged" in facts]
    good = [facts for facts in found if "damaged" not in facts]
    label = None
    if sort is not None:
        good, label, notes = score_order.best_first(good, sort)
        for note in notes:
            echo(one_line(note), err=True)
    if as_json:
        echo(format_json([*good, *damaged], indent=1))
    elif not found:
        echo(f"no runs below {str(folder)!r}; `student train --out` makes one")
    else:
        echo(tables.of_runs([*good, *damaged], label))
