"""The records of a part's shards are read and checked: all of them, or, where an index is there,
each when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UserError, command_line
from featcache.storage import commit, json_file
from featcache.storage.index import I64, ShardIndex
from featcache.storage.record import RecordCheck
from featcache.storage.store import record_path

_KEPT = 64  # records: one of 40 files is 30 kB in memory


class RecordReader:
    """Reads the records of the part that has the manifest `about`."""

    def __init__(self, part: Path, about: Mapping[str, Any]) -> None:
        self.part, self._store = part, about["identity"]["store"]
        self._check = RecordCheck(about)

    def read(self, shard: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Read the record of a shard and compare it with the manifest; returns the crc32c of its
        bytes too."""
        path = record_path(self.part, shard["name"])
        record, crc = json_file.read_json_crc(path)
        if why := self._check.problem(shard, record):
            raise self._error(f"{path} {why}")
        return record, crc

    def check_files(self, record: Mapping[str, Any]) -> None:
        """Raise UserError unless the files of a shard are there, as long as they are to be."""
        problems = commit.check_shard(self.part, record["shard"], self._store, record, deep=False)
        if problems:
            raise self._error(problems[0])

    def _error(self, what: str) -> UserError:
        verify = command_line("featcache", "verify", self.part)
        return UserError(f"cache file {what}; run `{verify}`")


class IndexedRecords(Sequence[dict[str, Any]]):
    """Reads the record of a shard when it is asked for. The first time all is checked that opening
    checks without an index, and the record is compared with the index; who reads a shard's rows
    asks for that by `check`. Raises UserError where the index lies."""

    def __init__(self, part: Path, about: Mapping[str, Any], index: ShardIndex) -> None:
        self._reader, self._index = RecordReader(part, about), index
        self._shards: Sequence[Mapping[str, Any]] = about["shards"]
        self._checked = np.zeros(len(self._shards), bool)
        self._kept = lru_cache(_KEPT)(self._read)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, shard: Any) -> Any:
        if isinstance(shard, slice):
            return [self[i] for i in range(len(self))[shard]]
        return self._kept(range(len(self))[shard])

    def check(self, shards: I64) -> None:
        """Read the records of those of the shards that nobody has read yet."""
        for shard in set(shards[~self._checked[shards]].tolist()):
            self[shard]

    def _read(self, shard: int) -> dict[str, Any]:
        about, index = self._shards[shard], self._index
        path = record_path(self._reader.part, about["name"])
        is_checked = bool(self._checked[shard])  # then as it was, by its checksum
        record, crc = json_file.read_json_crc(path) if is_checked else self._reader.read(about)
        what = "other bytes" if crc != index.table.shard_record_crc32c[shard] else ""
        if what := what or _difference(index, shard, record):
            raise lying_error(index.path, f"{path} has {what}")
        if not is_checked:
            self._reader.check_files(record)
            self._checked[shard] = True
        return record


def lying_error(index: Path, what: str) -> UserError:
    """Return the error for an index that is fresh, and whose numbers are not those of the cache."""
    make = command_line("featcache", "index", json_file.cache_of(index))
    return UserError(f"index {index} does not agree with the cache: {what}; run `{make}`")


def stored_bytes(record: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size of all files of a shard, and of those of them that are compressed."""
    files = record["files"].values()
    compressed = (file["bytes"] for file in files if "compression" in file)
    return sum(file["bytes"] for file in files), sum(compressed)


def _difference(index: ShardIndex, shard: int, record: Mapping[str, Any]) -> str:
    """Say what a record has otherwise than the index; empty where nothing is."""
    table = index.table
    stored, compressed = stored_bytes(record)
    facts = {
        f"{record['rows']} rows": record["rows"] == table.shard_rows[shard],
        "others in quarantine": len(record["quarantined"]) == table.shard_quarantined[shard],
        f"files of {stored} bytes": stored == table.shard_bytes[shard],
        "other compressed files": compressed == table.shard_compressed_bytes[shard],
        "other keys": record["keys_digest"] == index.keys_digest(shard),
    }
    return next((what for what, agrees in facts.items() if not agrees), "")
