"""`featcache gc` removes what dead processes left below $FEATCACHE_HOME, and caches that no
training run used."""

from __future__ import annotations

from typing import Any

import click

from featcache.catalog import home
from featcache.console import text
from featcache.maintenance import remove
from featcache.maintenance.garbage import leftovers, remove_leftover, unused_caches


@click.command(
    epilog="Examples:\n\n  featcache gc --dry-run\n\n  featcache gc --unused 90\n\n"
    "  featcache gc --unused 90 --yes"
)
@click.option(
    "--unused",
    type=click.FloatRange(0),
    metavar="DAYS",
    help="Also list caches no training run used, untouched for DAYS days.",
)
@click.option("--yes", is_flag=True, help="With --unused: remove those caches.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(unused: float | None, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Remove temporary files, leases and half-removed caches of processes that are gone. Work of
    live ones is safe.

    With --unused, complete caches are listed that no `student train` below this home used and whose
    newest file is older than DAYS days; they are removed with --yes only. Programs of your own that
    read a cache (featcache.open, featcache.torch.Dataset) leave no trace: look at the list before
    you give --yes.
    """
    left = [(path, remove.folder_bytes(path)) for path in leftovers()]
    idle = (
        []
        if unused is None
        else [(path, remove.folder_bytes(path)) for path in unused_caches(unused)]
    )
    if not dry_run:
        for path, _ in left:
            remove_leftover(path)
        for path, _ in idle if yes else []:
            remove.remove_cache(path)
    removed = {str(path): count for path, count in (*left, *idle) if not path.exists()}
    facts = {
        "home": str(home.home()),
        "dry_run": dry_run,
        "leftovers": {str(path): count for path, count in left},
        "unused": {str(path): count for path, count in idle},
        "removed": list(removed),
        "freed": sum(removed.values()),
    }
    text.print_facts(facts, as_json, _story(facts))


def _story(facts: dict[str, Any]) -> str:
    verb = "would remove" if facts["dry_run"] else "cannot remove"
    lines = [
        f"{'removed' if path in facts['removed'] else otherwise} {path}: {text.format_bytes(count)}"
        for what, otherwise in (("leftovers", verb), ("unused", "unused:"))
        for path, count in facts[what].items()
    ]
    if set(facts["unused"]) - set(facts["removed"]):
        lines.append(
            "unused: by no `student train` that this home's ledger knows; other programs' reading "
            "is not noted; the same command with --yes removes them"
        )
    if not lines:
        return f"nothing to remove below {facts['home']}"
    return text.join_lines([*lines, f"{text.format_bytes(facts['freed'])} freed"])
