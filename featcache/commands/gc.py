"""`featcache gc`: what dead processes left below $FEATCACHE_HOME, and caches that no training run used."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from featcache.catalog import home
from featcache.commands import ls, rm
from featcache.console import text as show
from featcache.storage import commit as publish
from featcache.storage.part import added

_DAY_S = 86400.0


@click.command(
    epilog="Examples:\n\n  featcache gc --dry-run\n\n  featcache gc --unused 90\n\n  featcache gc --unused 90 --yes"
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
    """Remove temporary files, leases and half-removed caches of processes that are gone. Work of live ones is safe.

    With --unused, complete caches are listed that no `student train` below this home used and whose newest file is
    older than DAYS days; they are removed with --yes only. Programs of your own that read a cache (featcache.open,
    featcache.torch.Dataset) leave no trace: look at the list before you give --yes.
    """
    left = [(path, rm.size(path)) for path in leftovers()]
    idle = [] if unused is None else [(path, rm.size(path)) for path in nobodys(unused)]
    if not dry_run:
        for path, _ in left:
            _remove(path)
        for path, _ in idle if yes else []:
            rm.remove(path)
    removed = {str(path): count for path, count in (*left, *idle) if not path.exists()}
    facts = {
        "home": str(home.home()),
        "dry_run": dry_run,
        "leftovers": {str(path): count for path, count in left},
        "unused": {str(path): count for path, count in idle},
        "removed": list(removed),
        "freed": sum(removed.values()),
    }
    show.facts_or_text(facts, as_json, _story(facts))


def leftovers() -> Iterator[Path]:
    """Files and folders that no live process works on, each once."""
    found = [path for path in home.home().glob(".*.tmp") if publish.is_dead(path)]
    for cache in ls.caches():
        for part in (cache, *added(cache)):
            found += publish.leftovers(part)
        found += [path for path in rm.leases(cache) if rm.stale(path)]
    yield from sorted(set(found))


def nobodys(days: float) -> Iterator[Path]:
    """Complete caches that no training run in the ledger used, untouched for so many days."""
    for cache in ls.caches():
        facts = ls.describe(cache)
        complete = facts.get("shards") == facts.get("shards_complete") and facts.get("parts") == facts.get(
            "parts_complete"
        )
        if "damaged" in facts or not complete or facts["last_used"] or cache.is_symlink() or rm.busy(cache):
            continue
        newest = max(path.lstat().st_mtime for path in cache.rglob("*") if path.is_file())
        if time.time() - newest > days * _DAY_S:
            yield cache


def _remove(path: Path) -> None:
    """Whatever is gone in the meantime, another did."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _story(facts: dict[str, Any]) -> str:
    verb = "would remove" if facts["dry_run"] else "cannot remove"
    lines = [
        f"{'removed' if path in facts['removed'] else otherwise} {path}: {show.size(count)}"
        for what, otherwise in (("leftovers", verb), ("unused", "unused:"))
        for path, count in facts[what].items()
    ]
    if set(facts["unused"]) - set(facts["removed"]):
        lines.append(
            "unused: by no `student train` that this home's ledger knows; other programs' reading is not noted; "
            "the same command with --yes removes them"
        )
    if not lines:
        return f"nothing to remove below {facts['home']}"
    return "\n".join([*lines, f"{show.size(facts['freed'])} freed"])
