"""Measure caches of many rows with an index and without: opening, `info`, `ls`, finding keys,
random batches, and how they grow with the rows.

    python -m benchmarks.bench_index --rows 100000,1000000,10000000 --work /data/index
    python -m benchmarks.bench_index --rows 10000 --work /tmp/index --json index.json

Rows are really written, by the store's own writer, 1,024 a shard: 10^7 rows take some ten minutes
and 3 GB on disk, once: what lies in --work is taken up, and is left there. Each thing is asked in a
new process, and every row that is read is compared. Without an index nothing is measured of caches
of more than --plain-rows.
"""

from __future__ import annotations

import json
import math
import os
import statistics as stats
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from benchmarks import command_options, describe, environment, markdown_table, save_json
from benchmarks.index_probe import FOUND
from benchmarks.many_rows import sizes, write_rows
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.console.text import say
from featcache.errors import UsageError
from featcache.storage import index_build
from featcache.storage.index_file import NAME

ASKED = ("open", "info", "ls", "find", "read")


def probe(cache: Path, what: str, reps: int) -> dict[str, Any]:
    """Ask one thing in new processes; return the medians."""
    code = [sys.executable, "-m", "benchmarks.index_probe", str(cache), what]
    variables = {**os.environ, "FEATCACHE_HOME": str(cache.parent)}
    found = [
        json.loads(subprocess.run(code, env=variables, check=True, stdout=subprocess.PIPE).stdout)
        for _ in range(1 if what in ("read", "order") else reps)
    ]
    return {
        name: stats.median(each[name] for each in found) if len(found) > 1 else value
        for name, value in found[0].items()
    }


def measure(work: Path, rows: int, reps: int, plain_rows: int) -> dict[str, Any]:
    """Write the cache of so many rows where it is not there, and ask it all."""
    cache = work / f"rows-{rows}" / "cache"  # alone in its home
    say(f"{rows} rows at {cache}")
    start = time.perf_counter()
    write_rows(cache, rows, say)
    results: dict[str, Any] = {"rows": rows, "write_s": time.perf_counter() - start}
    results |= dict(sizes(cache))
    (cache / NAME).unlink(missing_ok=True)
    if rows <= plain_rows:
        results["without"] = {what: probe(cache, what, reps) for what in ASKED}
    start = time.perf_counter()
    index_build.write(cache)
    results["index_s"] = time.perf_counter() - start
    results["index_bytes"] = (cache / NAME).stat().st_size
    results["with"] = {what: probe(cache, what, reps) for what in ASKED}
    assert results["with"]["open"]["indexed"], f"{cache}: its index was not used"
    results["order"] = probe(cache, "order", 1)
    return results


def _cells(asked: dict[str, Any]) -> list[str]:
    """Write seconds, and anonymous MB, of each thing that was asked."""
    read = asked["read"]
    return [
        *(f"{asked[what]['s']:.3f}" for what in ("open", "info", "ls", "find")),
        f"{read['ms'][0]:.0f} / {read['ms'][-1]:.0f}",
        f"{max(asked[what]['bytes'] for what in ('open', 'info', 'ls', 'find')) / 1e6:.0f}",
        " / ".join(f"{each / 1e6:.0f}" for each in read["after"]),
    ]


def table(results: list[dict[str, Any]]) -> str:
    head = (
        "rows",
        "index",
        "open s",
        "info s",
        "ls s",
        f"find {FOUND} keys s",
        "ms a batch of 256, first / last 100",
        "anonymous MB, most",
        "after 100 / 200 / 300 batches",
    )
    lines = [
        [f"{each['rows']:,}", has, *_cells(each[has])]
        for each in results
        for has in ("without", "with")
        if has in each
    ]
    return markdown_table(head, lines)


def slopes(results: list[dict[str, Any]], has: str) -> str:
    """Write the power of the rows by which seconds grow, between the sizes."""
    known = [each for each in results if has in each]
    return "; ".join(
        f"{one['rows']:,} to {other['rows']:,}: "
        + ", ".join(
            f"{what} {_slope(one, other, has, what):.2f}" for what in ("open", "info", "ls", "find")
        )
        for one, other in pairwise(known)
    )


def _slope(one: dict[str, Any], other: dict[str, Any], has: str, what: str) -> float:
    growth = other[has][what]["s"] / one[has][what]["s"]
    return math.log(growth) / math.log(other["rows"] / one["rows"])


def _row_counts(text: str) -> list[int]:
    counts = [int(each) for each in text.split(",") if each.isdecimal()]
    if not counts or len(counts) != len(text.split(",")) or min(counts) < 1:
        raise UsageError(f"--rows {text!r}: whole numbers with commas are allowed, such as 100000")
    return sorted(set(counts))


@click.command(cls=Command)
@option(
    "--rows",
    group=HelpGroup.INPUT,
    default="100000,1000000",
    show_default=True,
    help="Rows of each cache, with commas between.",
)
@option(
    "--work",
    group=HelpGroup.INPUT,
    type=command_options.WorkFolder(),
    required=True,
    help="The folder of the caches, which are kept.",
)
@command_options.number(
    "--plain-rows", HelpGroup.RUNNING, 1_000_000, "The most rows that are asked without an index."
)
@command_options.reps(5)
@command_options.json_file
def cli(rows: str, work: Path, plain_rows: int, reps: int, json_path: Path | None) -> None:
    """Open, list and read caches of many rows, with an index and without."""
    counts = _row_counts(rows)
    work.mkdir(parents=True, exist_ok=True)
    about = environment(work)
    results = []
    for count in counts:
        results.append(measure(work, count, reps, plain_rows))
        save_json(json_path, {"environment": about, "results": results})
    click.echo(describe(about))
    click.echo(table(results))
    for has in ("without", "with"):
        if powers := slopes(results, has):
            click.echo(f"seconds grow by this power of the rows, {has} an index: {powers}")
    for each in results:
        order = each["order"]
        click.echo(
            f"{each['rows']:,} rows: {each['files']:,} files, {each['disk_bytes'] / 1e9:.2f} GB on "
            f"disk; the index has {each['index_bytes'] / 1e6:.1f} MB and takes "
            f"{each['index_s']:.1f} s; the order of an epoch takes {order['s']:.2f} s, "
            f"{order['after'][-1] / 1e6:.0f} MB after three, {order['bytes'] / 1e6:.0f} at most"
        )


if __name__ == "__main__":
    entry(cli)
