"""`featcache rm` removes whole caches, additions, or kept features, and nothing else.

The folder is renamed first, to a name that no command takes for a cache; a removal that was killed
is finished by `featcache gc`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from featcache.console import text
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import CachePath
from featcache.errors import UsageError
from featcache.maintenance import far_remove, remove_features
from featcache.maintenance.remove import check_removable, folder_bytes, remove_cache
from featcache.storage.files import files_of


@click.command(
    cls=Command,
    section=Section.KEEP,
    short_help="Remove caches, or features that evaluations kept.",
    epilog="Examples:\n\n  featcache rm caches/clip-b16-1a2b3c4d\n\n"
    "  featcache rm caches/trial* --yes\n\n  featcache rm s3://bucket/clip-b16 --yes",
)
@click.argument("caches", nargs=-1, required=True, metavar="CACHE...", type=CachePath())
@option(
    "--yes",
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="Do not ask. Needed where there is no terminal.",
)
@option(
    "--json",
    "as_json",
    group=HelpGroup.REPORT,
    is_flag=True,
    help="Print what was removed as JSON.",
)
def command(caches: tuple[Path, ...], yes: bool, as_json: bool) -> None:
    """Remove caches, here or in an object store, or features that evaluations kept. What is none of
    them, or what somebody writes into, is refused before anything is removed."""
    for each in caches:
        if _is_far(each):
            far_remove.check_removable(each)
        elif remove_features.is_kept(each):
            remove_features.check_removable(each)
        else:
            check_removable(each)
    sizes = {
        str(cache): far_remove.stored_bytes(cache) if _is_far(cache) else folder_bytes(cache)
        for cache in caches
    }
    if not yes and not _agreed(sizes):
        text.echo("nothing removed", err=True)
        return
    for cache in map(Path, sizes):
        if _is_far(cache):
            far_remove.remove_cache(cache)
        elif remove_features.is_kept(cache):
            remove_features.remove(cache)
        else:
            remove_cache(cache)
    lines = [f"removed {cache}: {text.format_bytes(count)}" for cache, count in sizes.items()]
    lines.append(f"{text.format_bytes(sum(sizes.values()))} freed")
    text.print_facts(
        {"removed": sizes, "freed": sum(sizes.values())}, as_json, text.join_lines(lines)
    )


def _is_far(cache: Path) -> bool:
    return files_of(cache).may_be_far


def _agreed(sizes: dict[str, int]) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(
            "rm: there is no terminal to ask at; give --yes to remove without a question"
        )
    for cache, count in sizes.items():
        text.echo(f"{cache}: {text.format_bytes(count)}", err=True)
    return text.confirm(f"remove {len(sizes)} folder(s), {text.format_bytes(sum(sizes.values()))}?")
