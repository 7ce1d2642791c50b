"""`featcache copy` copies a cache, or a part of it, to another disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from featcache.catalog.account import account
from featcache.console import text as show
from featcache.console.command import Command, Section
from featcache.console.distortion_table import loss_lines
from featcache.console.option import HelpGroup, option
from featcache.console.params import COUNT, CachePath
from featcache.console.progress_bar import ProgressBar, WaitingNote
from featcache.errors import UsageError, counted
from featcache.maintenance import transfer
from featcache.reading.cache import Cache
from featcache.runtime.numbers import is_whole
from featcache.storage import manifest
from featcache.storage.files import address

# what a part of a cache is chosen by, here and in other commands
FIRST_VIEWS = option(
    "--views", group=HelpGroup.STORAGE, type=COUNT, help="Only the first N views. [default: all]"
)
SOME_LEVELS = option(
    "--levels",
    group=HelpGroup.STORAGE,
    help="Only these: last:N, a list such as 8,10,12, or all. [default: those stored]",
)


@click.command(
    cls=Command,
    section=Section.MAKE,
    short_help="Copy a cache, or a part of it, to another disk.",
    epilog="Examples:\n\n  featcache copy caches/clip-b16-1a2b3c4d /local/clip-b16\n\n"
    "  featcache copy caches/clip-b16-1a2b3c4d /local/small --views 1 --levels last:5\n\n"
    "  featcache copy caches/clip-b16-1a2b3c4d /local/tenth --shards 0:125\n\n"
    "  featcache copy caches/clip-b16-1a2b3c4d /cold/clip-b16 --compress",
)
@click.argument("cache", type=CachePath())
@click.argument("dest", type=CachePath())
@FIRST_VIEWS
@SOME_LEVELS
@option(
    "--shards",
    group=HelpGroup.STORAGE,
    help="A:B: only shards A to B - 1, counted from 0. [default: all]",
)
@option(
    "--compress",
    group=HelpGroup.STORAGE,
    is_flag=True,
    help="Write an archive: smaller, and slow to read. A copy of it without this is plain again.",
)
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the summary as JSON."
)
def command(
    cache: Path,
    dest: Path,
    views: int | None,
    levels: str | None,
    shards: str | None,
    compress: bool,
    as_json: bool,
) -> None:
    """Copy CACHE to DEST, every file compared with its checksum. If it is stopped
    or killed, the same command goes on where it was.

    With --views or --levels, additions to CACHE are merged: DEST is one flat cache of its own
    teacher.
    """
    span = None if shards is None else _span(cache, shards)
    chosen = None if levels is None else parse_levels_of(cache, levels)
    carry_out(
        "copy",
        cache,
        dest,
        as_json,
        lambda progress: transfer.copy(
            cache,
            dest,
            views=views,
            levels=chosen,
            shards=span,
            compress=compress,
            progress=progress,
        ),
    )


def parse_levels_of(cache: Path, text: str) -> tuple[int, ...]:
    """Parse levels as `extract` does."""
    from featcache.extraction.options import parse_levels

    return parse_levels(text, manifest.read(cache)["identity"]["teacher"]["depth"])


def _span(cache: Path, text: str) -> tuple[int, int]:
    """Parse 'A:B', where either may be left out, -> numbers of shards."""
    low, colon, high = text.partition(":")
    if not colon or not all(part == "" or is_whole(part) for part in (low, high)):
        raise UsageError(
            f"--shards {text!r}: A:B is needed, shards A to B - 1 counted from 0, such as 0:100"
        )
    return int(low or 0), int(high or len(manifest.read(cache)["shards"]))


def carry_out(
    what: str,
    source: Path,
    dest: Path,
    as_json: bool,
    work: Callable[[transfer.TransferProgress], list[str]],
) -> None:
    """Run a transfer with a progress bar, and tell what is there now."""
    bar = ProgressBar(what, "MB")
    progress = transfer.TransferProgress()
    progress.report = lambda now: bar(now.done // 10**6, now.total // 10**6)
    progress.waiting = WaitingNote()
    # no teacher runs, and what a device does of it is not measured
    with account(what, cache=dest, source=address(source), device_s=None) as line:
        try:
            left = work(progress)
        finally:
            bar.close()
        line["from_id"] = manifest.read(source)["id"]
    with Cache(dest) as cache:
        summary = {
            "cache": str(dest),
            "id": cache.manifest["id"],
            "store": cache.identity["store"],
            "format": cache.manifest["format"],
            "compression": cache.manifest.get("compression", ""),
            "rows": len(cache),
            "views": cache.views,
            "levels": cache.levels,
            "bytes": cache.bytes,
            "compressed_bytes": cache.compressed_bytes,
            "complete": cache.complete,
            "parts": cache.parts,
            "new_shards": progress.shards,
            "bytes_per_s": round(progress.rate),
            "left_out": left,
            "distortion": cache.manifest["provenance"].get("distortion", {}),
        }
    show.print_facts(summary, as_json, _story(summary))


def _form(summary: dict[str, Any]) -> str:
    """Write the format, and how much smaller an archive's rows are than before.

    >>> _form({"format": 4, "compression": "blosc", "compressed_bytes": (93, 100)})
    ', format 4 (archive, 0.93 of the bytes of rows)'
    """
    files, rows = summary["compressed_bytes"]
    share = f" (archive, {files / max(rows, 1):.2f} of the bytes of rows)"
    return f", format {summary['format']}{share if summary['compression'] else ''}"


def _story(summary: dict[str, Any]) -> str:
    levels = ",".join(map(str, summary["levels"]))
    lines = [
        f"{summary['cache']}: {counted(summary['rows'], 'picture')} x "
        f"{counted(summary['views'], 'view')}, levels "
        f"{levels}, {summary['store']} store{_form(summary)}, "
        f"{show.format_bytes(summary['bytes'])}, id {summary['id']}",
        f"{counted(summary['new_shards'], 'shard')} written, "
        f"{show.format_bytes(summary['bytes_per_s'])}/s"
        if summary["new_shards"]
        else "was complete already; nothing to do",
        *(f"added: {part}" for part in summary["parts"][1:]),
        *(f"left out: {part}" for part in summary["left_out"]),
        *loss_lines(Path(summary["cache"])),
    ]
    return show.join_lines(lines)
