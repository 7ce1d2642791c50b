"""`student compare` puts runs side by side, and says whether they are an ablation."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath
from featcache.console.text import print_facts
from featcache.errors import UsageError, UserError


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="Put runs side by side: settings, losses, scores.",
    epilog="Examples:\n\n  student compare runs/mralign-s0 runs/mralign-mask60\n\n"
    "  student compare runs/a runs/b --json && echo 'an ablation'",
)
@click.argument("runs", type=LocalPath(), nargs=-1, required=True)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print everything as JSON.")
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Compare RUNS: settings that differ, losses at the same steps, scores with intervals.

    Runs are an ablation where the recipe and its settings alone differ. Cache identity, view
    schedule, pictures, seed, sampling, aug_repeats, steps, effective batch and evaluations must be
    the same; precision, the average of the weights and the machine are reported. Exit status: 0
    for an ablation, or where nothing differs; 1 where something differs that must be the same.
    """
    from student.reporting import comparison, tables

    if len(runs) < 2:
        raise UsageError("compare: one run given; give two or more")
    facts = comparison.compare(runs)
    print_facts(comparison.plain(facts), as_json, tables.of_comparison(facts))
    if not facts["ablation"]:
        raise UserError(
            f"{facts['verdict']} must be the same; compare runs that were made and judged alike"
        )
