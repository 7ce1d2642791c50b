"""`featcache push` copies a cache to an object store, with a card for those who find it there."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.commands.copy import carry_out
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath, ObjectPath
from featcache.errors import UserError
from featcache.maintenance import far_remove, share_card, transfer
from featcache.reading.cache import Cache
from featcache.storage.mount import mount_at
from featcache.storage.object_listing import CARD


@click.command(
    cls=Command,
    section=Section.KEEP,
    short_help="Copy a cache to an object store, with a card.",
    epilog="Examples:\n\n  featcache push caches/clip-b16-1a2b3c4d s3://bucket/clip-b16\n\n"
    "  featcache push caches/clip-b16-1a2b3c4d gs://bucket/clip-b16",
)
@click.argument("cache", type=LocalPath())
@click.argument("url", type=ObjectPath())
@option(
    "--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print the summary as JSON."
)
def command(cache: Path, url: Path, as_json: bool) -> None:
    """Copy CACHE, with all that was added to it, to URL: every file compared with its checksum, the
    record of each shard last. A README.md there says what it is, whose weights made it, and how it
    is read. If it is stopped or killed, the same command goes on where it was.
    """

    there = mount_at(url)
    if not far_remove.card_is_ours(there):
        raise UserError(
            f"push: {there.url.join(CARD)} was not written by featcache, and the card would be "
            "written over it; give another URL, or use `featcache copy`, which writes none"
        )

    def work(progress: transfer.TransferProgress) -> list[str]:
        left = transfer.copy(cache, url, progress=progress)
        with Cache(url) as opened:
            there.put(CARD, share_card.card(opened, str(there.url)).encode())
        return left

    carry_out("push", cache, url, as_json, work)
