"""`featcache ls`: the caches there are, from their manifests and records alone: no file of theirs is looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from featcache.catalog import home
from featcache.console import text as show
from featcache.errors import UserError
from featcache.storage import manifest
from featcache.storage.part import added
from featcache.storage.store import record_path


@click.command(epilog="Examples:\n\n  featcache ls\n\n  FEATCACHE_HOME=/data/caches featcache ls --json")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(as_json: bool) -> None:
    """List the caches below $FEATCACHE_HOME: what they hold, how much of it is there, and who used them last."""
    found = [describe(path) for path in caches()]
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        click.echo(text(found) if found else f"no caches below {str(home.home())!r}; FEATCACHE_HOME names the folder")


def caches() -> Iterator[Path]:
    """Folders below home that hold a manifest; one that `rm` renamed and did not finish is none."""
    yield from (path for path in home.caches() if not path.name.startswith("."))


def describe(path: Path) -> dict[str, Any]:
    """The facts of one cache as plain data; a damaged one is {path, damaged: the reason}."""
    try:
        about = manifest.read(path)
        records, total = _records(path, about)
        parts = [(manifest.read(part), _records(part, manifest.read(part))) for part in added(path)]
    except UserError as error:
        return {"path": str(path), "damaged": str(error)}
    identity, runs = about["identity"], home.runs_of(about["id"])
    every = [*records, *(record for _, (found, _) in parts for record in found)]
    return {
        "path": str(path),
        "id": about["id"],
        "teacher": identity["teacher"]["name"],
        "pictures": identity["pictures"]["count"],
        "views": _views(identity, [part["identity"] for part, _ in parts]),
        "levels": _levels(identity, [part["identity"] for part, _ in parts]),
        "codec": identity["codec"],
        "store": identity["store"],
        "tokens": identity["tokens"],
        "bytes": sum(file["bytes"] for record in every for file in record["files"].values()),
        "shards": total,
        "shards_complete": len(records),
        "parts": len(parts),
        "parts_complete": sum(len(found) == wanted for _, (found, wanted) in parts),
        "last_used": runs[-1]["time"] if runs else None,
        "random_weights": manifest.is_random(about),
    }


def _records(part: Path, about: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """(records of complete shards, shards there are to be)."""
    paths = [record_path(part, shard["name"]) for shard in about["shards"]]
    return [manifest.read_json(path) for path in paths if path.is_file()], len(paths)


def _own(identity: dict[str, Any], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [identity, *(part for part in parts if part["teacher"] == identity["teacher"])]


def _views(identity: dict[str, Any], parts: list[dict[str, Any]]) -> int:
    return max(each.get("first_view", 0) + int(each["views"]) for each in _own(identity, parts))


def _levels(identity: dict[str, Any], parts: list[dict[str, Any]]) -> list[int]:
    return sorted({level for each in _own(identity, parts) for level in each["levels"]})


def text(found: list[dict[str, Any]]) -> str:
    good = [facts for facts in found if "damaged" not in facts]
    head = ("path", "id", "teacher", "pictures", "levels", "stored as", "size", "complete", "last training")
    lines = [show.table([head, *map(_row, good)], right=(3, 6, 7))] if good else []
    lines += [
        f"{facts['path']}: RANDOM WEIGHTS: no meaning in these features" for facts in good if facts["random_weights"]
    ]
    lines += [f"{facts['path']}: damaged: {facts['damaged']}" for facts in found if "damaged" in facts]
    return "\n".join(lines)


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    lacking = facts["parts"] - facts["parts_complete"]
    return (
        facts["path"],
        facts["id"],
        facts["teacher"],
        f"{facts['pictures']} x {facts['views']}",
        ",".join(map(str, facts["levels"])),
        f"{facts['codec']} {facts['store']} {facts['tokens']}",
        show.size(facts["bytes"]),
        f"{_share(facts)}{' + unfinished addition' if lacking else ''}",
        facts["last_used"] or "never",
    )


def _share(facts: dict[str, Any]) -> str:
    """Rounded down: 100 % is for what is complete."""
    return f"{100 * facts['shards_complete'] // max(facts['shards'], 1)} %"
