"""`featcache ls` lists the caches there are from their manifests and records alone: no file of
theirs is looked at."""

from __future__ import annotations

import time
from typing import Any

import click

from featcache.catalog import far_caches, home, kept_features, ledger
from featcache.catalog.listing import describe
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import ObjectPlace
from featcache.console.text import echo, format_bytes, format_json, format_table, join_lines
from featcache.errors import UsageError, UserError
from featcache.objects.url import ObjectUrl


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="List the caches that there are, and what they cost.",
    epilog="Examples:\n\n  featcache ls\n\n  FEATCACHE_HOME=/data/caches featcache ls --json\n\n"
    "  featcache ls --costs\n\n  featcache ls s3://bucket/caches",
)
@click.argument("url", type=ObjectPlace(), required=False)
@option(
    "--costs",
    group=HelpGroup.REPORT,
    is_flag=True,
    help="Show in place of the list what extractions, runs and evaluations cost, by the run "
    "ledger.",
)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print everything as JSON.")
def command(url: ObjectUrl | None, costs: bool, as_json: bool) -> None:
    """List the caches below $FEATCACHE_HOME: what they hold, how much of it is there, and who used
    them last; then the features that evaluations kept. With URL, s3://, gs:// or az://, list the
    cache there, or those one level below."""
    if url is not None:
        _list_far(url, costs, as_json)
        return
    if costs:
        _print_costs(as_json)
        return
    last_uses = ledger.last_uses()
    found = [describe(path, last_uses) for path in home.caches()]
    kept = [kept_features.describe(path) for path in kept_features.items()]
    if as_json:
        echo(format_json([*found, *({"kind": "features", **facts} for facts in kept)], indent=1))
    elif not found and not kept:
        echo(f"no caches below {str(home.home())!r}; FEATCACHE_HOME names the folder")
    else:
        echo("\n\n".join(part(facts) for part, facts in ((text, found), (_kept, kept)) if facts))


def _list_far(url: ObjectUrl, costs: bool, as_json: bool) -> None:
    if costs:
        raise UsageError("--costs is of $FEATCACHE_HOME's ledger: leave out the URL, or --costs")
    last_uses = ledger.last_uses()
    damaged: list[dict[str, Any]] = []

    def failed(place: str, error: UserError) -> None:
        damaged.append({"path": place, "damaged": str(error)})

    found = [describe(path, last_uses) for path in far_caches.caches(url, failed)]
    found += damaged
    if as_json:
        echo(format_json(found, indent=1))
    else:
        echo(text(found) if found else f"no caches at {url}, nor one level below")


def _print_costs(as_json: bool) -> None:
    from featcache.catalog.costs import read
    from featcache.console import costs_table

    found = read()
    if as_json:
        echo(format_json(costs_table.as_json(found), indent=1))
    elif not found.total.lines and not found.passed_over:
        echo(f"no run ledger below {str(home.home())!r}; FEATCACHE_HOME names the folder")
    else:
        echo(costs_table.text(found))


def _kept(found: list[dict[str, Any]]) -> str:
    """Return the table of kept features."""
    rows = [
        (
            facts["path"],
            facts["encoder"],
            facts["pictures"],
            f"{facts['what']} {' x '.join(map(str, facts['shape']))}",
            facts["crop"],
            format_bytes(facts["bytes"]),
            time.strftime("%Y-%m-%d", time.gmtime(facts["last_used"])),
        )
        for facts in found
        if "damaged" not in facts
    ]
    head = ("kept features", "encoder", "pictures", "what", "crop", "size", "last evaluation")
    table = format_table([head, *rows], right=(5,)) if rows else ""
    lines = [
        f"{facts['path']}: damaged: {facts['damaged']}" for facts in found if "damaged" in facts
    ]
    return "\n".join(filter(None, [table, join_lines(lines)]))


def text(found: list[dict[str, Any]]) -> str:
    good = [facts for facts in found if "damaged" not in facts]
    head = (
        "path",
        "id",
        "teacher",
        "pictures",
        "levels",
        "stored as",
        "size",
        "complete",
        "last training",
    )
    table = format_table([head, *map(_row, good)], right=(3, 6, 7)) if good else ""
    lines = [
        f"{facts['path']}: RANDOM WEIGHTS: no meaning in these features"
        for facts in good
        if facts["random_weights"]
    ]
    lines += [
        f"{facts['path']}: damaged: {facts['damaged']}" for facts in found if "damaged" in facts
    ]
    return "\n".join(filter(None, [table, join_lines(lines)]))


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    lacking = facts["parts"] - facts["parts_complete"]
    return (
        facts["path"],
        facts["id"],
        facts["teacher"],
        f"{facts['pictures']} x {facts['views']}",
        ",".join(map(str, facts["levels"])),
        f"{facts['codec']} {facts['store']} {facts['tokens']}"
        + (" archive" if facts["compression"] else ""),
        format_bytes(facts["bytes"]),
        f"{_share(facts)}{' + unfinished addition' if lacking else ''}",
        facts["last_used"] or "never",
    )


def _share(facts: dict[str, Any]) -> str:
    """Rounded down: 100 % is for what is complete."""
    return f"{100 * facts['shards_complete'] // max(facts['shards'], 1)} %"
