"""`featcache info` tells what a cache is, what it holds, whom it can serve, and who used it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from featcache.catalog import extract_command, ledger, serves
from featcache.console.command import Command, Section
from featcache.console.distortion_table import loss_lines
from featcache.console.option import HelpGroup, option
from featcache.console.params import CachePath
from featcache.console.text import format_bytes, format_table, join_lines, print_facts
from featcache.errors import counted
from featcache.reading.cache import Cache
from featcache.storage import manifest, picture_lists


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="Show what a cache holds, and which recipes it serves.",
    epilog="Example:\n\n  featcache info caches/clip-b16-1a2b3c4d --json",
)
@click.argument("cache", type=CachePath())
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print everything as JSON.")
def command(cache: Path, as_json: bool) -> None:
    """Show identity, completeness, sizes and statistics of CACHE, the recipes it can serve and the
    runs that used it."""
    with Cache(cache) as opened:
        facts = describe(opened)
    print_facts(facts, as_json, text(opened, facts), indent=1)


def describe(cache: Cache) -> dict[str, Any]:
    """Return all facts as plain data."""
    found: dict[str, Any] = {}
    for teacher in cache.teachers:
        prefix = "" if teacher == cache.teachers[0] else f"{teacher}/"
        found |= {f"{prefix}{name}": facts for name, facts in cache.statistics_of(teacher).items()}
    arrays = {
        name: {
            "dtype": spec.dtype,
            "shape": [len(cache), *([cache.views] if spec.per_view else []), *spec.item],
            "statistics": found.get(name),
        }
        for name, spec in cache.arrays.items()
    }
    return {
        "id": cache.manifest["id"],
        "format": cache.manifest["format"],
        "compression": cache.manifest.get("compression", ""),
        "identity": cache.identity,
        "provenance": cache.manifest["provenance"],
        "weights": {name: _weights(cache.manifest_of(name)) for name in cache.teachers},
        "random_weights": manifest.is_random(cache.manifest),
        "complete": cache.complete,
        "shards": len(cache.manifest["shards"]),
        "shards_complete": len(cache.records),
        "rows": len(cache),
        "bytes": cache.bytes,
        "views": cache.views,
        "parts": cache.parts,
        "made_by": extract_command.for_cache(cache.manifest, cache.path),
        "unfinished": [each._asdict() for each in extract_command.unfinished(cache.path)],
        "arrays": arrays,
        "serves": serves.recipe_support(cache),
        "runs": ledger.runs_of(*picture_lists.ids(cache.identity)),
        "quarantined": cache.quarantined,
    }


def _weights(about: Mapping[str, Any]) -> dict[str, str]:
    """Return which weights a teacher had: a file with the part that was taken, a tag or what its
    name stands for, and their hash."""
    return {
        "weights": about["provenance"]["weights"],
        "hash": about["identity"]["teacher"].get("weight_hash", ""),
    }


def text(cache: Cache, facts: dict[str, Any]) -> str:
    identity, quarantined = facts["identity"], facts["quarantined"]
    lines = [
        manifest.title(cache.manifest, facts["rows"], facts["views"]),
        f"{facts['shards_complete']} of {counted(facts['shards'], 'shard')}, {facts['rows']} of "
        f"{counted(picture_lists.count(identity), 'picture')} stored, "
        f"{format_bytes(facts['bytes'])}, "
        f"{identity['store']} store, {_form(facts)}, codec {identity['codec']}, "
        f"tokens {_tokens(identity)}",
        *(
            f"weights of {name}: {about['weights']}, hash {about['hash'] or 'not recorded'}"
            for name, about in facts["weights"].items()
        ),
        "views: " + ", ".join(f"{key} {value}" for key, value in identity["policy"].items()),
        *(f"added: {part}" for part in facts["parts"][1:]),
        *loss_lines(cache.path),
        *format_table(
            [("array", "dtype", "shape", "range", ""), *map(_row, facts["arrays"].items())]
        ).split("\n"),
        "serves: "
        + (
            ", ".join(name for name, why in facts["serves"].items() if not why) or "no known recipe"
        ),
        *(f"  not {name}: {why}" for name, why in facts["serves"].items() if why),
        *_runs(facts["runs"]),
        *(f"quarantined {row['key']!r}: {row['reason']}" for row in quarantined[:10]),
    ]
    if len(quarantined) > 10:
        lines.append(
            f"{len(quarantined)} in quarantine, all listed in {cache.path}/quarantine.json"
        )
    if facts["unfinished"]:
        return join_lines(
            [*lines, *(str(extract_command.Unfinished(**each)) for each in facts["unfinished"])]
        )
    more = "the same with more --views or --levels, and with --add, adds to it"
    if "parent" in identity:
        more = f"derived from {identity['parent']}: what it lacks is added there, and derived again"
    return join_lines([*lines, f"made by: {facts['made_by']}", more])


def _form(facts: dict[str, Any]) -> str:
    return f"format {facts['format']}" + (" (archive)" if facts["compression"] else "")


def _tokens(identity: dict[str, Any]) -> str:
    """Write how the tokens of a view lie, and how many of them.

    >>> _tokens({"tokens": "ranked", "keep": 58, "teacher": {"patches": 196}})
    'ranked, first 58 of 196 patches'
    """
    kept = (
        f", first {identity['keep']} of "
        f"{counted(identity['teacher']['patches'], 'patch', 'patches')}"
        if "keep" in identity
        else ""
    )
    return f"{identity['tokens']}{kept}"


def _row(item: tuple[str, dict[str, Any]]) -> tuple[str, str, str, str, str]:
    name, array = item
    found = array["statistics"]
    if not found:
        return name, array["dtype"], str(array["shape"]), "", ""
    notes = [f"{word} {found[word]:.4g}" for word in ("norm", "entropy") if word in found]
    if array["dtype"][1] == "f":
        notes.append(f"{found['non_finite']} not finite")
    return (
        name,
        array["dtype"],
        str(array["shape"]),
        f"{found['min']:.6g} to {found['max']:.6g}",
        ", ".join(notes),
    )


def _runs(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return ["runs: none noted"]
    return [
        f"runs: {len(runs)}, the last:",
        *(
            f"  {run['time']}  {run.get('recipe', run['command'])}  {run.get('run', '')}".rstrip()
            for run in runs[-5:]
        ),
    ]
