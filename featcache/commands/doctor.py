"""`featcache doctor` tells what of this installation and machine works, and what to do about the
rest."""

from __future__ import annotations

from typing import Any

import click

from featcache.console import text
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.errors import UserError
from featcache.maintenance.doctor import examine
from featcache.maintenance.finding import BROKEN, Finding


@click.command(
    cls=Command,
    section=Section.KEEP,
    short_help="Say what of this installation and machine works.",
    epilog="Examples:\n\n  featcache doctor\n\n"
    "  FEATCACHE_HOME=/data/caches featcache doctor --json",
)
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the findings as JSON."
)
def command(as_json: bool) -> None:
    """Look at versions, extras, compiled code, cores, memory, GPUs, limits, variables, disks and
    the caches below $FEATCACHE_HOME; say what is wrong, and what to do about it.

    Each line begins with ok, note (work goes on, though not as well as it might) or BROKEN. The
    status is 1 where anything is broken, and 0 otherwise. The home's disk is read for at most two
    seconds, by a file of at most 256 MiB that is gone afterwards. Nothing is asked of the network.
    """
    found = examine()
    broken = list(dict.fromkeys(each.what for each in found if each.state == BROKEN))
    facts: dict[str, Any] = {
        "well": not broken,
        "broken": broken,
        "findings": [each.as_facts() for each in found],
    }
    verdict = [] if broken else ["all that work needs is well"]
    lines = text.join_lines([*map(_line, found), *verdict])
    text.print_facts(facts, as_json, lines, indent=1)
    if broken:
        raise UserError(f"doctor: broken: {', '.join(broken)}; the lines above say what to do")


def _line(found: Finding) -> str:
    state = "BROKEN" if found.state == BROKEN else found.state
    advice = f"; {found.advice}" if found.advice else ""
    return f"{state:<7} {found.what:<24} {found.value}{advice}"
