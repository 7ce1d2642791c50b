"""`featcache rm`: whole caches, or additions, and nothing else.

The folder is renamed first, to a name that no command takes for a cache; a removal that was killed is finished by
`featcache gc`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import click

from featcache.console import text as show
from featcache.errors import UsageError, UserError
from featcache.storage import lease, manifest
from featcache.storage.part import PARTS, added
from featcache.storage.store import SHARDS


@click.command(epilog="Examples:\n\n  featcache rm caches/clip-b16-1a2b3c4d\n\n  featcache rm caches/trial* --yes")
@click.argument("caches", nargs=-1, required=True, metavar="CACHE...", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print what was removed as JSON.")
def command(caches: tuple[Path, ...], yes: bool, as_json: bool) -> None:
    """Remove caches. A folder that is none, or that somebody writes into, is refused before anything is removed."""
    for each in caches:
        check(each)
    sizes = {str(cache): size(cache) for cache in caches}
    if not yes and not _agreed(sizes):
        click.echo("nothing removed", err=True)
        return
    for cache in sizes:
        remove(Path(cache))
    lines = [f"removed {cache}: {show.size(count)}" for cache, count in sizes.items()]
    lines.append(f"{show.size(sum(sizes.values()))} freed")
    show.facts_or_text({"removed": sizes, "freed": sum(sizes.values())}, as_json, "\n".join(lines))


def check(cache: Path) -> None:
    """Raise UserError for what must not be removed."""
    if cache.is_symlink():
        raise UserError(f"{str(cache)!r} is a link to {str(cache.resolve())!r}; give that folder")
    if not (cache / manifest.NAME).is_file():
        raise UserError(f"{str(cache)!r} holds no {manifest.NAME}: it is no cache, and is left as it is")
    if shards := busy(cache):
        raise UserError(
            f"{str(cache)!r} is being written: shard {shards[0].stem} is held; stop that process, or wait "
            "until it has ended"
        )


def busy(cache: Path) -> list[Path]:
    """Leases of shards that somebody works on, in the cache and what was added to it."""
    return [path for path in leases(cache) if not stale(path)]


def leases(cache: Path) -> list[Path]:
    return sorted(path for part in (cache, *added(cache)) for path in (part / SHARDS).glob("*.lease"))


def stale(path: Path) -> bool:
    """As `lease.held` tells, but in a cache that may be read-only too."""
    try:
        return not lease.held(path.parent.parent, path.stem)
    except OSError:
        return lease.is_stale(path, time.time())


def size(path: Path) -> int:
    """Bytes of all files of a folder, or of one file."""
    return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if not each.is_dir() or each.is_symlink())


def remove(cache: Path) -> None:
    """Rename, then remove. An addition is taken out of parts/ by the rename, where it would still be seen."""
    cache = cache.resolve()
    _check_writable(cache)
    place = cache.parent.parent if cache.parent.name == PARTS else cache.parent
    gone = place / f".{cache.name}.{manifest.owner()}.tmp"
    cache.rename(gone)
    manifest.sync_folder(place)
    try:
        shutil.rmtree(gone)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; what is left of {str(cache)!r} lies in {str(gone)!r}; allow removing "
            "it and remove that folder, or run `featcache gc`"
        ) from error


def _check_writable(cache: Path) -> None:
    """Before anything is renamed: may every folder lose what is in it?"""
    for folder in (
        cache.parent,
        cache,
        *(path for path in cache.rglob("*") if path.is_dir() and not path.is_symlink()),
    ):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{str(folder)!r}: permission denied, nothing removed; allow writing to it and run again")


def _agreed(sizes: dict[str, int]) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("rm: there is no terminal to ask at; give --yes to remove without a question")
    for cache, count in sizes.items():
        click.echo(f"{cache}: {show.size(count)}", err=True)
    return click.confirm(f"remove {len(sizes)} cache(s), {show.size(sum(sizes.values()))}?", err=True)
