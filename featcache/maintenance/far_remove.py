"""Caches in an object store are removed, and what dead writers left there, and nothing else.

A lease is renewed every 15 seconds; one that is half an hour old is of nobody who is alive. Ages
are by the store's own clock, of an object that is written to read it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from featcache.errors import UserError, counted
from featcache.objects.client import Facts
from featcache.storage import belongings, manifest
from featcache.storage.mount import mount_at
from featcache.storage.mounted import Mount
from featcache.storage.object_listing import CARD, CARD_START
from featcache.storage.object_names import is_of_shard, is_record, lease_of, record_of
from featcache.storage.owner import writer_id
from featcache.storage.store import SHARDS

DEAD_S = 30 * 60.0


def check_removable(cache: Path) -> None:
    """Raise UserError for what must not be removed."""
    there = mount_at(cache)
    if manifest.NAME not in there.objects:
        raise UserError(
            f"{str(cache)!r} holds no {manifest.NAME}: it is no cache, and is left as it is"
        )
    strangers = [*there.others, *_foreign(there), *([] if card_is_ours(there) else [CARD])]
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise UserError(
            f"{str(cache)!r} holds what featcache did not write: "
            f"{', '.join(map(repr, strangers[:3]))}{more}; nothing is removed; move that away "
            "and run the same command again"
        )
    now = there.store_time() if there.leases else 0.0
    held = [name for name, facts in there.leases.items() if now - facts.modified < DEAD_S]
    if held:
        raise UserError(
            f"{str(cache)!r} is being written: {counted(len(held), 'shard is', 'shards are')} "
            f"held, the first is {held[0]!r}; stop that, or wait half an hour after it has ended"
        )


def card_is_ours(there: Mount) -> bool:
    """Return whether `featcache push` wrote the README.md beside a cache, or there is none."""
    return there.card is None or there.read_start(CARD, len(CARD_START)) == CARD_START.encode()


def _foreign(there: Mount) -> list[str]:
    """Return the names of what is none of the cache's own, as in a folder of these names."""
    with tempfile.TemporaryDirectory() as temporary:
        shape = Path(temporary)
        for name in (*there.objects, *there.leases):
            path = shape / name
            if not _is_below(name):
                return [name]
            path.parent.mkdir(parents=True, exist_ok=True)
            here = there.folder / name
            is_manifest = name.rpartition("/")[2] in (manifest.NAME, manifest.COPY)
            path.write_bytes(here.read_bytes() if is_manifest and here.is_file() else b"")
        return [path.relative_to(shape).as_posix() for path in belongings.foreign(shape)]


def _is_below(name: str) -> bool:
    """Return whether a name that passed as a cache's leads below the folder it is joined to."""
    return all(part not in ("", ".", "..") for part in name.split("/"))


def stored_bytes(cache: Path) -> int:
    """Sum the bytes of all objects of a cache."""
    there = mount_at(cache)
    return sum(facts.bytes for facts in (*there.objects.values(), *there.leases.values()))


def remove_cache(cache: Path) -> None:
    """Remove a cache that is still removable: records first, so that nobody takes a shard for
    complete, and the manifest last, so that what was killed is done by the same command."""
    there = mount_at(cache)
    there.refresh()
    check_removable(cache)
    records = [name for name in there.objects if is_record(name)]
    last = [f"{SHARDS}/{manifest.COPY}", manifest.NAME]
    apart = {*records, *last}
    rest = [name for name in there.objects if name not in apart]
    card = [CARD] if there.card is not None else []
    for names in (records, [*rest, *there.leases, *card], *([name] for name in last)):
        there.remove(names)
    shutil.rmtree(there.folder, ignore_errors=True)
    shutil.rmtree(there.kept.folder, ignore_errors=True)


def leftovers(cache: Path) -> dict[str, Facts]:
    """Return what dead writers left in a cache, by names of objects: leases, and files of shards
    that have neither a record nor a lease."""
    there = mount_at(cache)
    maybe = {
        name: facts
        for name, facts in there.objects.items()
        if is_of_shard(name) and record_of(name) not in there.objects
    }
    if not maybe and not there.leases:
        return {}
    before = there.store_time() - DEAD_S
    held = {record_of(name) for name, facts in there.leases.items() if facts.modified > before}
    return {
        name: facts
        for name, facts in {**there.leases, **maybe}.items()
        if facts.modified <= before and record_of(name) not in held
    }


def remove_leftovers(cache: Path, names: Iterable[str]) -> None:
    """Remove leftovers that are still leftovers, shard by shard under its lease: since they were
    listed, another process may have taken one up."""
    there = mount_at(cache)
    there.refresh()
    now = leftovers(cache)
    by_shard: dict[str, dict[str, Facts]] = {}
    for name in set(names) & now.keys():
        by_shard.setdefault(record_of(name), {})[name] = now[name]
    for record, found in by_shard.items():
        _remove_of_shard(there, record, found)


def _remove_of_shard(there: Mount, record: str, found: Mapping[str, Facts]) -> None:
    name = lease_of(record)
    lease = (
        there.lease_table.take_from(there.object_name(name), found[name].tag, writer_id())
        if name in found
        else there.lease_table.acquire(there.object_name(name), writer_id())
    )
    if lease is None:  # somebody has it
        return
    try:
        if there.exists(record):
            return
        there.remove([each for each in found if each != name])
    finally:
        lease.release()
        there.leases.pop(name, None)
