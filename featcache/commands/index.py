"""`featcache index` writes beside the records of a cache what they say together, so that a cache of
many rows opens at once."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.console import text
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import CachePath
from featcache.console.progress_bar import ProgressBar
from featcache.errors import counted
from featcache.storage.index import INDEXED_FROM


@click.command(
    cls=Command,
    section=Section.KEEP,
    short_help="Let a cache of many rows open at once.",
    epilog="Examples:\n\n  featcache index caches/clip-b16-1a2b3c4d\n\n"
    "  featcache index /mnt/lab/clip-b16 --json",
    help="Write CACHE/index.safetensors, and one of each addition: what the records of all shards "
    "say together, and the digests of all keys in order. A cache with an index is opened, listed "
    "and matched without a look at every shard; a shard is then checked when it is first read."
    f"\n\nExtracting, copying, converting and deriving write it for caches of {INDEXED_FROM} "
    "shards or more. An index that is older than the shards is not used, and this command makes it "
    "anew. Records stay the truth: an index may be removed at any time.",
)
@click.argument("cache", type=CachePath())
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print what was made as JSON."
)
def command(cache: Path, as_json: bool) -> None:
    from featcache.maintenance import index

    bar = ProgressBar("index", "shards")
    made, left = index.run(cache, bar)
    bar.close()
    lines = [
        f"{facts['path']}: {counted(facts['rows'], 'row')}, {counted(facts['shards'], 'shard')}, "
        f"{text.format_bytes(facts['bytes'])}"
        for facts in made
    ]
    facts = {"cache": str(cache), "indices": made, "unfinished": left}
    text.print_facts(facts, as_json, text.join_lines([*lines, *left]))
