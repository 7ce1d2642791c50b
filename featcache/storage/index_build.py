"""The index of a part is made from its records and the keys of its shards, and written.

Everything is compared on the way: the keys of a shard with its record, the record with the
manifest. The same shards give the same bytes. Memory: 40 bytes a row.

n rows, s shards.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from featcache import rng
from featcache.errors import UserError, command_line, short
from featcache.storage import json_file, manifest
from featcache.storage.files import files_of
from featcache.storage.index import INDEXED_FROM, ShardIndex, look, manifest_digest, shards_time
from featcache.storage.index_file import (
    BLOCK,
    I64,
    NAME,
    U32,
    Facts,
    Table,
    pack_header,
    row_dtype,
)
from featcache.storage.keys import Keys, read_shard_keys
from featcache.storage.own_folder import own_shards
from featcache.storage.record import quarantine_digest
from featcache.storage.shard_records import RecordReader, stored_bytes
from featcache.storage.statistics import totals
from featcache.storage.store import get_store, record_path

_LOG = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # shards that are done, of how many
# The clock that stamps folders ticks every 4 to 10 ms: a change within the same tick as the one
# before could not be seen.
_TICK_NS = 20_000_000


class ShardsChangedError(UserError):
    """Somebody writes to the part whose index is made."""


@dataclass(frozen=True)
class BuiltIndex:
    """Holds the content of an index: digests (n, 2) in row order, `order` (n,) that sorts them."""

    facts: Facts
    table: Table
    digests: rng.U64
    order: I64
    shards_time: int  # when the folder of shards was last changed, before it was looked at

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the file."""
        yield pack_header(self.facts, self.table)
        for rows in _blocks(self.order):
            yield self.digests[rows].astype("<u8").tobytes()
        table = self.table
        wide = (table.shard_rows, table.shard_quarantined, table.shard_bytes)
        yield from (each.tobytes() for each in (*wide, table.shard_compressed_bytes))
        yield table.block_first.tobytes()
        for rows in _blocks(self.order):
            yield rows.astype(row_dtype(self.facts.rows)).tobytes()
        narrow = (table.shard_record_crc32c, table.block_crc32c, table.shard_keys_digest)
        yield from (each.tobytes() for each in narrow)

    def is_written(self, path: Path) -> bool:
        """Return whether a file has these bytes, and no others."""
        with path.open("rb") as file:
            same = all(file.read(len(piece)) == piece for piece in self.pieces())
            return same and not file.read(1)


def build(part: Path, progress: Progress = lambda done, total: None) -> BuiltIndex:
    """Read the records and keys of all shards of a part that is complete. Raises UserError where
    one is missing or damaged, and ShardsChangedError where somebody writes to them."""
    about = manifest.read(part)
    before = _settled_time(part)
    records = _Records(about)
    reader, store = RecordReader(part, about), get_store(about["identity"]["store"])
    for done, shard in enumerate(about["shards"]):
        record, crc = reader.read(shard)
        reader.check_files(record)
        keys = Keys(*read_shard_keys(store, part, record))
        records.add(done, record, crc, _checked(part, record, keys))
        progress(done + 1, len(about["shards"]))
    if shards_time(part) != before:
        raise ShardsChangedError(
            f"cannot index {str(part)!r}: its shards changed while they were read; run the same "
            "command when nobody writes to it"
        )
    return records.built(part, before)


def _settled_time(part: Path) -> int:
    """Return when the folder of shards was last changed: so long ago that a change from now on has
    another time. Of a clock ahead of ours one tick is waited for."""
    stamp = shards_time(part)
    if time.time_ns() - stamp < _TICK_NS:
        time.sleep(_TICK_NS / 1e9)
        stamp = shards_time(part)
    return stamp


def _checked(part: Path, record: Mapping[str, Any], keys: Sequence[str]) -> Sequence[str]:
    """Return the keys of a shard; UserError where they are not those of its record."""
    if manifest.keys_digest(keys) != record["keys_digest"]:
        verify = command_line("featcache", "verify", part)
        raise UserError(
            f"cache file {record_path(part, record['shard'])}: its keys are not those of the "
            f"shard's files; run `{verify}`"
        )
    return keys


class _Records:
    """Gathers what the index says of each shard."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._about = about
        shards = len(about["shards"])
        self._rows, self._out = np.zeros(shards, np.int64), np.zeros(shards, np.int64)
        self._bytes, self._compressed = np.zeros(shards, np.int64), np.zeros(shards, np.int64)
        self._crcs = np.zeros(shards, np.uint32)
        self._keys_digests = np.zeros((shards, 16), np.uint8)
        self._digests: list[rng.U64] = [np.zeros((0, 2), np.uint64)]
        self._quarantined: list[dict[str, str]] = []
        self._statistics: dict[str, dict[str, Any]] = {}

    def add(self, shard: int, record: Mapping[str, Any], crc: int, keys: Sequence[str]) -> None:
        self._rows[shard], self._out[shard] = record["rows"], len(record["quarantined"])
        self._bytes[shard], self._compressed[shard] = stored_bytes(record)
        self._crcs[shard] = crc
        self._keys_digests[shard] = np.frombuffer(bytes.fromhex(record["keys_digest"]), np.uint8)
        self._digests.append(rng.key_digests(keys))
        self._quarantined += record["quarantined"]
        self._statistics = totals([record], self._statistics)

    def built(self, part: Path, before: int) -> BuiltIndex:
        digests = np.concatenate(self._digests)
        self._digests.clear()
        order = ascending_order(part, digests)
        first, crcs = block_facts(digests, order)
        table = Table(
            shard_rows=self._rows,
            shard_quarantined=self._out,
            shard_bytes=self._bytes,
            shard_compressed_bytes=self._compressed,
            block_first=first,
            shard_record_crc32c=self._crcs,
            block_crc32c=crcs,
            shard_keys_digest=self._keys_digests,
        )
        facts = Facts(
            cache=self._about["id"],
            manifest=manifest_digest(part),
            rows=len(digests),
            shards=len(self._rows),
            quarantine=quarantine_digest(self._quarantined),
            statistics=self._statistics,
        )
        return BuiltIndex(facts, table, digests, order, before)


def ascending_order(part: Path, digests: rng.U64) -> I64:
    """Return the rows (n,) in the order of their digests. Raises UserError where two are the same:
    no row could then be found by its key."""
    order = np.argsort(digests[:, 0], kind="stable")
    first = digests[order, 0]
    if (first[1:] == first[:-1]).any():
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        twice = (digests[order[1:]] == digests[order[:-1]]).all(1)
        if twice.any():
            rows = sorted(int(row) for row in order[[twice.argmax(), twice.argmax() + 1]])
            raise UserError(
                f"cannot index {str(part)!r}: rows {rows[0]} and {rows[1]} have the same key; run "
                f"`{command_line('featcache', 'verify', part)}`"
            )
    return order


def block_facts(digests: rng.U64, order: I64) -> tuple[rng.U64, U32]:
    """Return the first digest (b, 2) and the checksum (b,) of each block."""
    dtype = row_dtype(len(digests))
    crcs = [
        crc32c(rows.astype(dtype).tobytes(), crc32c(digests[rows].astype("<u8").tobytes()))
        for rows in _blocks(order)
    ]
    return digests[order[::BLOCK]].reshape(-1, 2), np.array(crcs, np.uint32)


def _blocks(order: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (order[low : low + BLOCK] for low in range(0, len(order), BLOCK))


# ------------------------------------------------------------ writing


def write(part: Path, progress: Progress = lambda done, total: None) -> BuiltIndex:
    """Make the index of a part and write it. Raises UserError where that cannot be done."""
    path = index_path(part)
    built = build(part, progress)
    with json_file.replaced(path) as temporary:
        with temporary.open("xb") as file:
            for piece in built.pieces():
                file.write(piece)
        # its time is that of the shards as they were read: if they have changed since, it is stale
        os.utime(temporary, ns=(built.shards_time, built.shards_time))
    return built


def index_path(part: Path) -> Path:
    """Return where the index of a part lies. Raises UserError where none may be written."""
    own_shards(part)
    path = part / NAME
    if path.is_dir():
        raise UserError(
            f"{str(path)!r} is a folder where a file is to be, and none that featcache made; move "
            "it away and run the same command again"
        )
    if NAME in manifest.read(part)["files"]:  # of a teacher that is called so
        raise UserError(
            f"cannot index {str(part)!r}: {NAME} is a file of its teacher {short(NAME)}; it is "
            "read without an index"
        )
    return path


def is_complete(part: Path, about: Mapping[str, Any]) -> bool:
    """Return whether the record of every shard is there."""
    return all(record_path(part, shard["name"]).is_file() for shard in about["shards"])


def update(part: Path, *, least: int | None = None) -> bool:
    """Write the index of a part that is complete and has at least `least` shards, or whose index is
    there and stale; returns whether it was written. Nothing is done in an object store."""
    least = INDEXED_FROM if least is None else least
    if files_of(part.absolute()).may_be_far:
        return False
    about = manifest.read(part)
    is_wanted = len(about["shards"]) >= least or (part / NAME).is_file()
    if not is_wanted or NAME in about["files"] or isinstance(look(part, about), ShardIndex):
        return False
    if not is_complete(part, about):
        return False
    try:
        write(part)
    except ShardsChangedError:  # by another process, which writes it at its end
        return False
    except (OSError, UserError) as error:  # all rows are there, and are read without it
        _LOG.warning("no index was written: %s", error)
        return False
    return True
