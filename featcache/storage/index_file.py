"""The index of a part is a safetensors file beside its manifest; this is the layout of its bytes.

    key_digest              (n, 2)  u8  digests of the keys of all rows, ascending by both words
    shard_rows              (s,)    i8  as the records of the shards say
    shard_quarantined       (s,)    i8
    shard_bytes             (s,)    i8  of all files of a shard
    shard_compressed_bytes  (s,)    i8  of those of them that are compressed
    block_first             (b, 2)  u8  the first digest of each block of `BLOCK`
    key_row                 (n,)    u4  the row of each digest; u8 where 4 bytes do not hold it
    shard_record_crc32c     (s,)    u4  of the bytes of the record
    block_crc32c            (b,)    u4  of a block's digests, then of its rows
    shard_keys_digest       (s, 16) u1

All but `key_digest` and `key_row` is the *table*: it is read, and checked, when a part is opened.
Digests and rows are read block by block, and each block is checked as it is read. The header
follows from the metadata and from n and s, byte for byte, and holds no time: the same shards give
the same file.

n rows, s shards, b blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.rng import U64
from featcache.storage import json_file, schema

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
U8 = npt.NDArray[np.uint8]

NAME = "index.safetensors"
VERSION = "1"
BLOCK = 1024  # digests: one that is sought costs 20 KB, and the table has 20 bytes a block
LARGEST_HEADER = 1 << 20  # bytes; of 256 arrays' statistics it has 40 kB
_LENGTH_BYTES = 8
_DTYPES = {"U64": "<u8", "I64": "<i8", "U32": "<u4", "U8": "|u1"}
_COUNT = re.compile(r"[0-9]{1,16}")


class DamagedIndexError(Exception):
    """The bytes of an index are not those that were written, or never were an index."""


@dataclass(frozen=True)
class Table:
    """Holds what the index says of shards and of blocks."""

    shard_rows: I64
    shard_quarantined: I64
    shard_bytes: I64
    shard_compressed_bytes: I64
    block_first: U64
    shard_record_crc32c: U32
    block_crc32c: U32
    shard_keys_digest: U8

    def bytes(self) -> bytes:
        return b"".join(getattr(self, field.name).tobytes() for field in fields(self))


@dataclass(frozen=True)
class Facts:
    """Says which part an index is of, and what all its records say together."""

    cache: str  # the id of the manifest
    manifest: str  # BLAKE2b-128 of the bytes of manifest.json
    rows: int
    shards: int
    quarantine: str  # digest of the list of quarantined pictures
    statistics: Mapping[str, Mapping[str, Any]]  # see `statistics.totals`

    def metadata(self) -> dict[str, str]:
        return {
            "featcache_index": VERSION,
            "cache": self.cache,
            "manifest": self.manifest,
            "rows": str(self.rows),
            "shards": str(self.shards),
            "quarantine": self.quarantine,
            "statistics": json_file.canonical(self.statistics).decode(),
        }


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize


def row_dtype(rows: int) -> np.dtype[Any]:
    """Return the type of `key_row`."""
    return np.dtype(_DTYPES[_row_dtype(rows)])


def _row_dtype(rows: int) -> str:
    return "U32" if rows <= 1 << 32 else "U64"


def block_count(rows: int) -> int:
    return -(-rows // BLOCK)


def _tensors(rows: int, shards: int) -> dict[str, _Tensor]:
    """Return all tensors in the order of their bytes: those of wide numbers first, so that each
    begins where its numbers may."""
    blocks = block_count(rows)
    wide = ("shard_rows", "shard_quarantined", "shard_bytes", "shard_compressed_bytes")
    return {
        "key_digest": _Tensor("U64", (rows, 2)),
        **{name: _Tensor("I64", (shards,)) for name in wide},
        "block_first": _Tensor("U64", (blocks, 2)),
        "key_row": _Tensor(_row_dtype(rows), (rows,)),
        "shard_record_crc32c": _Tensor("U32", (shards,)),
        "block_crc32c": _Tensor("U32", (blocks,)),
        "shard_keys_digest": _Tensor("U8", (shards, 16)),
    }


class Layout:
    """Says where the bytes of an index lie, by the header's length."""

    def __init__(self, facts: Facts, header_bytes: int) -> None:
        self.tensors = _tensors(facts.rows, facts.shards)
        self.offsets, end = {}, _LENGTH_BYTES + header_bytes
        for name, tensor in self.tensors.items():
            self.offsets[name] = end
            end += tensor.bytes
        self.total_bytes = end


def pack_header(facts: Facts, table: Table) -> bytes:
    """Return the bytes before the tensors. The checksum in the metadata is of the other metadata
    and of the table."""
    metadata = facts.metadata()
    metadata[json_file.CHECKSUM] = _checksum(metadata, table)
    return _header(facts, metadata)


def _checksum(metadata: Mapping[str, str], table: Table) -> str:
    whole = json_file.canonical(metadata) + table.bytes()
    return hashlib.blake2b(whole, digest_size=16).hexdigest()


def _header(facts: Facts, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in _tensors(facts.rows, facts.shards).items():
        offsets = [end, end := end + tensor.bytes]
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def header_bytes(begin: bytes) -> int:
    """Return the length of the header, from the first bytes of a file."""
    count = int.from_bytes(begin[:_LENGTH_BYTES], "little")
    if len(begin) < _LENGTH_BYTES or not 2 <= count <= LARGEST_HEADER:
        raise DamagedIndexError("it is no safetensors file of ours")
    return count


def parse_header(header: bytes) -> tuple[Facts, str]:
    """Return the facts and the checksum of a header, with its length in front. Raises
    DamagedIndexError for one that this version would not write."""
    try:
        metadata = json.loads(header[_LENGTH_BYTES:])["__metadata__"]
        version = metadata["featcache_index"]
        if version != VERSION:
            raise DamagedIndexError(f"it is of version {version!r:.40}, this one knows {VERSION}")
        facts = Facts(
            cache=metadata["cache"],
            manifest=metadata["manifest"],
            rows=_count(metadata["rows"]),
            shards=_count(metadata["shards"]),
            quarantine=metadata["quarantine"],
            statistics=json.loads(metadata["statistics"]),
        )
        checksum = str(metadata[json_file.CHECKSUM])
        whole = _header(facts, {**facts.metadata(), json_file.CHECKSUM: checksum})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedIndexError("its header is none that featcache writes") from error
    if whole != header:
        raise DamagedIndexError("its header is none that featcache writes")
    if why := schema.schema_problem(schema.IndexFacts, {"statistics": facts.statistics}):
        raise DamagedIndexError(why)
    return facts, checksum


def _count(text: str) -> int:
    if not _COUNT.fullmatch(text):
        raise ValueError(text)
    return int(text)


def parse_table(facts: Facts, checksum: str, parts: Mapping[str, bytes]) -> Table:
    """Return the table, from the bytes of its tensors. Raises DamagedIndexError where they are not
    those that were written."""
    tensors = _tensors(facts.rows, facts.shards)
    table = Table(
        **{
            field.name: np.frombuffer(
                parts[field.name], _DTYPES[tensors[field.name].dtype]
            ).reshape(tensors[field.name].shape)
            for field in fields(Table)
        }
    )
    if _checksum(facts.metadata(), table) != checksum:
        raise DamagedIndexError("its checksum differs")
    return table
