"""`featcache rm`: whole caches, or additions, and nothing else.

The folder is renamed first, to a name that no command takes for a cache; a removal that was killed
is finished by `featcache gc`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from featcache.console import text
from featcache.errors import UsageError
from featcache.maintenance.remove import check, remove, size


@click.command(
    epilog="Examples:\n\n  featcache rm caches/clip-b16-1a2b3c4d\n\n"
    "  featcache rm caches/trial* --yes"
)
@click.argument(
    "caches", nargs=-1, required=True, metavar="CACHE...", type=click.Path(path_type=Path)
)
@click.option("--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print what was removed as JSON.")
def command(caches: tuple[Path, ...], yes: bool, as_json: bool) -> None:
    """Remove caches. A folder that is none, or that somebody writes into, is refused before
    anything is removed."""
    for each in caches:
        check(each)
    sizes = {str(cache): size(cache) for cache in caches}
    if not yes and not _agreed(sizes):
        click.echo("nothing removed", err=True)
        return
    for cache in sizes:
        remove(Path(cache))
    lines = [f"removed {cache}: {text.size(count)}" for cache, count in sizes.items()]
    lines.append(f"{text.size(sum(sizes.values()))} freed")
    text.facts_or_text({"removed": sizes, "freed": sum(sizes.values())}, as_json, "\n".join(lines))


def _agreed(sizes: dict[str, int]) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(
            "rm: there is no terminal to ask at; give --yes to remove without a question"
        )
    for cache, count in sizes.items():
        click.echo(f"{cache}: {text.size(count)}", err=True)
    return click.confirm(
        f"remove {len(sizes)} cache(s), {text.size(sum(sizes.values()))}?", err=True
    )
