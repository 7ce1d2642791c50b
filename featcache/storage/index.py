"""The index of a part lets it be opened without a look at every shard: it is read here.

An index says what the records of all shards say together, and holds the digests of all keys in
ascending order. Records stay the truth. An index is used where it is *fresh*: its own time is that
of the folder `shards/`, which changes when a record is added, removed or replaced, and it names the
manifest that is there. What is stale or damaged is passed over, and the records are read. A record
is compared with the index when it is first read (`shard_records`).

Digests are read by blocks with pread, and not from mapped memory: a file that somebody cuts short,
or a network disk that fails, is an error here and no signal, and every block is compared with its
checksum each time.

n rows, s shards, b blocks, m digests that are sought.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import command_line
from featcache.rng import U64
from featcache.storage import json_file, manifest
from featcache.storage.files import files_of
from featcache.storage.index_file import (
    BLOCK,
    I64,
    NAME,
    DamagedIndexError,
    Facts,
    Layout,
    Table,
    header_bytes,
    parse_header,
    parse_table,
    row_dtype,
)
from featcache.storage.store import SHARDS

_LOG = logging.getLogger(__name__)
# A part of fewer shards opens in a second or two without an index, at half a millisecond a shard in
# memory and some milliseconds on a cold disk: none is written for it unless it is asked for, and
# nothing is said where it has none.
INDEXED_FROM = 256
_MOST_BYTES = 2**53  # of the files of a shard: the sum of all is then right in Python's integers


class ShardIndex:
    """Holds the table of an index that is fresh, and finds rows by digests of their keys. Safe in
    several threads, after a fork, and when the file is replaced: blocks are then those of the
    table, or an error."""

    def __init__(self, path: Path, facts: Facts, table: Table, layout: Layout) -> None:
        self.path, self.facts, self.table, self._layout = path, facts, table, layout
        self.starts: I64 = np.concatenate([[0], np.cumsum(table.shard_rows)]).astype(np.int64)

    @property
    def bytes(self) -> int:
        """The size of all files of all shards."""
        return sum(self.table.shard_bytes.tolist())

    @property
    def compressed_bytes(self) -> int:
        return sum(self.table.shard_compressed_bytes.tolist())

    @property
    def quarantined(self) -> int:
        """The number of pictures that could not be used."""
        return int(self.table.shard_quarantined.sum())

    def keys_digest(self, shard: int) -> str:
        return self.table.shard_keys_digest[shard].tobytes().hex()

    def find(self, wanted: U64) -> I64:
        """Return the row (m,) of each digest (m, 2), -1 where it is not here. Raises
        DamagedIndexError where a block that is read is not the one that was written."""
        rows = np.full(len(wanted), -1, np.int64)
        order = np.lexsort((wanted[:, 1], wanted[:, 0]))
        sought = wanted[order]
        blocks = _last_not_above(self.table.block_first, sought)
        with _opened(self.path) as fd:
            for low, high in _runs(blocks):
                if blocks[low] >= 0:
                    digests, numbers = self._block(fd, int(blocks[low]))
                    rows[order[low:high]] = _rows_of(digests, numbers, sought[low:high])
        return rows

    def _block(self, fd: int, block: int) -> tuple[U64, I64]:
        first = block * BLOCK
        count = min(BLOCK, self.facts.rows - first)
        dtype, at = row_dtype(self.facts.rows), self._layout.offsets
        digests = _pread(fd, count * 16, at["key_digest"] + first * 16)
        numbers = _pread(fd, count * dtype.itemsize, at["key_row"] + first * dtype.itemsize)
        if crc32c(numbers, crc32c(digests)) != self.table.block_crc32c[block]:
            raise DamagedIndexError("the checksum of a block of keys differs")
        pairs = np.frombuffer(digests, "<u8").reshape(count, 2)
        rows = np.frombuffer(numbers, dtype)
        if not _is_ascending(pairs) or (pairs[0] != self.table.block_first[block]).any():
            raise DamagedIndexError("its keys are not in order")
        if int(rows.max()) >= self.facts.rows:
            raise DamagedIndexError("it names rows that are not there")
        return pairs, rows.astype(np.int64)


def _last_not_above(firsts: U64, sought: U64) -> I64:
    """Return (m,) the number of the last of ascending digests (b, 2) that is not above each of
    those that are sought (m, 2); -1 where all are."""
    found = np.searchsorted(firsts[:, 0], sought[:, 0], side="right") - 1
    while True:  # few share their first word
        at = np.maximum(found, 0)
        same = firsts[at, 0] == sought[:, 0] if len(firsts) else np.zeros(len(sought), bool)
        above = (found >= 0) & same
        above[above] = firsts[at[above], 1] > sought[above, 1]
        if not above.any():
            return found.astype(np.int64)
        found = found - above


def _rows_of(digests: U64, numbers: I64, sought: U64) -> I64:
    """Return (m,) the rows of those that are sought among the ascending digests of one block."""
    at = np.searchsorted(digests[:, 0], sought[:, 0])
    while True:  # few share their first word
        here = np.minimum(at, len(digests) - 1)
        same = (at < len(digests)) & (digests[here, 0] == sought[:, 0])
        behind = same & (digests[here, 1] < sought[:, 1])
        if not behind.any():
            break
        at = at + behind
    found = same & (digests[here, 1] == sought[:, 1])
    return np.where(found, numbers[here], -1)


def _is_ascending(pairs: U64) -> bool:
    """Return whether digests (m, 2) ascend, and none is there twice."""
    first, second = pairs[:, 0], pairs[:, 1]
    above = first[1:] > first[:-1]
    above |= (first[1:] == first[:-1]) & (second[1:] > second[:-1])
    return bool(above.all())


def _runs(numbers: I64) -> Iterator[tuple[int, int]]:
    """Yield where runs of equal numbers begin and end."""
    edges = np.flatnonzero(np.diff(numbers)) + 1
    ends = [0, *edges.tolist(), len(numbers)]
    return ((low, high) for low, high in itertools.pairwise(ends) if low < high)


# ------------------------------------------------------------ opening


class Unused(NamedTuple):
    """Says why an index that is there cannot be used."""

    why: str
    is_damaged: bool = False


def open_index(part: Path, about: Mapping[str, Any]) -> ShardIndex | None:
    """Open the index of the part that has the manifest `about`; None where there is no fresh one.
    A note tells, once, of one that is there in vain."""
    found = look(part, about)
    if isinstance(found, Unused) and len(about["shards"]) >= INDEXED_FROM:
        note_unused(part, f"{part / NAME} is not used, {found.why}")
    return found if isinstance(found, ShardIndex) else None


def look(part: Path, about: Mapping[str, Any]) -> ShardIndex | Unused | None:
    """Open the index of a part, or say why it cannot be used; None where there is none."""
    if files_of(part.absolute()).may_be_far:  # no folder of an object store has a time
        return None
    path = part / NAME
    try:
        with _opened(path) as fd:
            if os.fstat(fd).st_mtime_ns != shards_time(part):
                return Unused("it is stale: shards changed since")
            return _parse(path, about, fd)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedIndexError as error:
        return Unused(f"it is damaged: {error}", is_damaged=True)
    except OSError as error:
        return Unused(f"it cannot be read: {error.strerror or error}")


def shards_time(part: Path) -> int:
    """Return when an entry of the folder of shards was last added, removed or replaced, in ns."""
    return (part / SHARDS).stat().st_mtime_ns


def manifest_digest(part: Path) -> str:
    """Digest the bytes of a part's manifest."""
    data = (part / manifest.NAME).read_bytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _parse(path: Path, about: Mapping[str, Any], fd: int) -> ShardIndex | Unused:
    size = os.fstat(fd).st_size
    length = header_bytes(_pread(fd, min(size, 8), 0))
    facts, checksum = parse_header(_pread(fd, 8 + length, 0))
    if (facts.cache, facts.manifest) != (about["id"], manifest_digest(path.parent)):
        return Unused(f"it is stale: {manifest.NAME} is another")
    layout = Layout(facts, length)
    if layout.total_bytes != size or facts.shards != len(about["shards"]):
        raise DamagedIndexError(f"it has {size} bytes, {layout.total_bytes} are needed")
    parts = {
        field.name: _pread(fd, layout.tensors[field.name].bytes, layout.offsets[field.name])
        for field in fields(Table)
    }
    table = parse_table(facts, checksum, parts)
    _check_table(facts, table, about)
    return ShardIndex(path, facts, table, layout)


def _check_table(facts: Facts, table: Table, about: Mapping[str, Any]) -> None:
    """Raise DamagedIndexError for numbers that no records could give: whoever wrote them."""
    counts = np.fromiter((shard["count"] for shard in about["shards"]), np.int64, facts.shards)
    rows, out = table.shard_rows, table.shard_quarantined
    if (rows < 0).any() or (rows > counts).any() or (counts - rows != out).any():
        raise DamagedIndexError("its shards have other rows than the manifest allows")
    if int(rows.sum()) != facts.rows:  # none is above its count, so that the sum is right
        raise DamagedIndexError("its rows are not those of its shards")
    sizes, compressed = table.shard_bytes, table.shard_compressed_bytes
    if (compressed < 0).any() or (compressed > sizes).any() or (sizes > _MOST_BYTES).any():
        raise DamagedIndexError("its shards have sizes that no files have")
    if not _is_ascending(table.block_first):
        raise DamagedIndexError("its keys are not in order")


def note_unused(part: Path, why: str) -> None:
    """Tell, once, that an index would save something."""
    command = command_line("featcache", "index", json_file.cache_of(part / NAME))
    _note_once(f"{why}: every record is read; run `{command}`")


@lru_cache(1024)
def _note_once(text: str) -> None:
    _LOG.warning("%s", text)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a regular file to read pieces of; a pipe is not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield fd
    finally:
        os.close(fd)


def _pread(fd: int, count: int, offset: int) -> bytes:
    """Read exactly so many bytes; DamagedIndexError where the file ends before."""
    parts: list[bytes] = []
    while count:
        data = os.pread(fd, count, offset)
        if not data:
            raise DamagedIndexError("it is cut short")
        parts.append(data)
        count, offset = count - len(data), offset + len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)
