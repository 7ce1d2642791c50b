"""`featcache gc` removes what dead processes left below $FEATCACHE_HOME, and caches that no
training run used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from featcache.catalog import far_caches, home
from featcache.console import text
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import FiniteRange, ObjectPlace
from featcache.errors import UsageError, UserError, counted
from featcache.maintenance import far_remove, remove, remove_features
from featcache.maintenance.garbage import find, remove_leftovers
from featcache.objects.url import ObjectUrl


@click.command(
    cls=Command,
    section=Section.KEEP,
    short_help="Remove what dead processes left, and unused caches.",
    epilog="Examples:\n\n  featcache gc --dry-run\n\n  featcache gc --unused 90\n\n"
    "  featcache gc --unused 90 --yes\n\n  featcache gc s3://bucket/caches --dry-run",
)
@click.argument("url", type=ObjectPlace(), required=False)
@option(
    "--unused",
    group=HelpGroup.INPUT,
    type=FiniteRange(0),
    metavar="DAYS",
    help="Also list caches no training run used, and features no evaluation, for DAYS days.",
)
@option(
    "--yes", group=HelpGroup.RUNNING, is_flag=True, help="Do not ask: remove all that is listed."
)
@option(
    "--dry-run",
    group=HelpGroup.REPORT,
    is_flag=True,
    help="Say what would be removed, and remove nothing.",
)
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the findings as JSON."
)
def command(
    url: ObjectUrl | None, unused: float | None, yes: bool, dry_run: bool, as_json: bool
) -> None:
    """List temporary files, leases and half-removed caches of processes that are gone, ask, and
    remove them. Work of live ones is safe, and so is what featcache did not write.

    With --unused, kept features (features/) are listed that no evaluation used for DAYS days, and
    complete caches are listed that no `student train` below this home used and whose
    newest file is older than DAYS days. Runs of this home's other users are known, and of the homes
    that FEATCACHE_LEDGERS names (HOME:HOME); where a ledger cannot be read, no cache is listed.
    Programs of your own that read a cache (featcache.open,
    featcache.torch.Dataset) leave no trace: look at the list before you say yes.

    With URL, the cache there and those one level below are looked through in place of the home:
    leases, and files of shards without a record, that are half an hour old. Parts of uploads that
    were killed are not listed by an object store; its own rules remove them.

    Where there is no terminal to ask at, nothing is removed without --yes.
    """
    if url is not None:
        _collect_far(url, unused, yes, dry_run, as_json)
        return
    found = find(unused)
    left, idle = _sizes(found.leftovers), _sizes(found.unused)
    asks = not yes and not dry_run and sys.stdin.isatty()
    agreed = {
        path: count
        for what, sizes in (("leftover", left), ("unused folder", idle))
        if (yes and not dry_run) or (asks and sizes and _agreed(what, sizes))
        for path, count in sizes.items()
    }
    remove_leftovers([path for path in left if path in agreed])
    for path in idle:
        if path in agreed:
            (remove_features.remove if remove_features.is_kept(path) else remove.remove_cache)(path)
    facts = {
        "home": str(home.home()),
        "dry_run": dry_run,
        "leftovers": {str(path): count for path, count in left.items()},
        "unused": {str(path): count for path, count in idle.items()},
        "left": {str(path): why for path, why in found.left.items()},
        "removed": [str(path) for path in agreed if not path.exists()],
        "freed": sum(count for path, count in agreed.items() if not path.exists()),
    }
    text.print_facts(facts, as_json, _story(facts, {str(path) for path in agreed}))
    _check_asked(len(left), yes or dry_run or asks)


def _collect_far(
    url: ObjectUrl, unused: float | None, yes: bool, dry_run: bool, as_json: bool
) -> None:
    if unused is not None:
        raise UsageError(
            "--unused is of caches below $FEATCACHE_HOME, whose ledger knows who used them: leave "
            "out the URL, or --unused"
        )
    left: dict[str, str] = {}

    def failed(place: str, error: UserError) -> None:
        left[place] = str(error)

    found = {path: far_remove.leftovers(path) for path in far_caches.caches(url, failed)}
    sizes = {
        f"{path}/{name}": facts.bytes
        for path, names in found.items()
        for name, facts in names.items()
    }
    asks = not yes and not dry_run and sys.stdin.isatty()
    total = text.format_bytes(sum(sizes.values()))
    agreed = bool(sizes) and not dry_run
    if agreed and not yes:
        for path, count in sizes.items() if asks else ():
            text.echo(f"leftover {path}: {text.format_bytes(count)}", err=True)
        agreed = asks and text.confirm(f"remove {counted(len(sizes), 'leftover')}, {total}?")
    for cache, names in found.items() if agreed else ():
        far_remove.remove_leftovers(cache, list(names))
    facts = {
        "url": str(url), "dry_run": dry_run, "leftovers": sizes, "left": left, "removed": agreed,
    }  # fmt: skip
    verb = "removed" if agreed else "would remove"
    lines = [f"{verb} {path}: {text.format_bytes(count)}" for path, count in sizes.items()]
    lines += [f"left {place}: {why}" for place, why in left.items()]
    lines.append(f"{total if agreed else '0 B'} freed" if sizes else f"nothing to remove at {url}")
    text.print_facts(facts, as_json, text.join_lines(lines))
    _check_asked(len(sizes), yes or dry_run or asks)


def _check_asked(leftovers: int, was_asked: bool) -> None:
    if leftovers and not was_asked:
        raise UsageError(
            f"gc: there is no terminal to ask at, {leftovers} leftovers are not removed; give "
            "--yes to remove them without a question, or --dry-run to list them"
        )


def _sizes(paths: list[Path]) -> dict[Path, int]:
    return {path: remove.folder_bytes(path) for path in paths}


def _agreed(what: str, sizes: dict[Path, int]) -> bool:
    for path, count in sizes.items():
        text.echo(text.join_lines([f"{what} {path}: {text.format_bytes(count)}"]), err=True)
    total = text.format_bytes(sum(sizes.values()))
    return text.confirm(f"remove {len(sizes)} {what}(s), {total}?")


def _story(facts: dict[str, Any], agreed: set[str]) -> str:
    lines = []
    for what in ("leftovers", "unused"):
        kept = "would remove" if what == "leftovers" else "unused:"
        for path, count in facts[what].items():
            failed = "cannot remove" if path in agreed else kept
            verb = "removed" if path in facts["removed"] else failed
            lines.append(f"{verb} {path}: {text.format_bytes(count)}")
    lines += [f"left {path}: {why}" for path, why in facts["left"].items()]
    if set(facts["unused"]) - set(facts["removed"]):
        lines.append(
            "unused: by no `student train` that this home's ledger knows, nor those of "
            "FEATCACHE_LEDGERS; other programs' reading is not noted; the same command with --yes "
            "removes them"
        )
    if not lines:
        return f"nothing to remove below {facts['home']}"
    return text.join_lines([*lines, f"{text.format_bytes(facts['freed'])} freed"])
