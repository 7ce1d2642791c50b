"""A row that differed from its checksum is explained: the file at fault is found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featcache.errors import UserError, command_line
from featcache.storage import commit
from featcache.storage.part import Part


def row_error(
    cache: Path, parts: Sequence[Part], path: str, row: int, key: str, view: int
) -> UserError:
    """Name the file at fault, that of the row or that of its checksum: `path` is where a row was
    read that differed."""
    shard = int(np.searchsorted(parts[0].starts, row, side="right") - 1)
    record = parts[0].names[shard]
    problems = [
        problem
        for part in parts
        for problem in commit.check_shard(
            part.path, record, part.identity["store"], part.records[shard], deep=True
        )
    ]
    if problems:  # others may be damaged as well
        problem = min(
            problems, key=lambda text: (not text.startswith(f"{path}:"), "_crc/" not in text)
        )
        return UserError(
            f"cache file {problem} (seen at row {row}, {key!r}, view {view}); "
            f"run `{command_line('featcache', 'repair', cache)}`"
        )
    return UserError(
        f"cache file {path}: row {row} ({key!r}), view {view} differed from its checksum, but "
        f"shard {record} is sound on disk: memory or transport may be at fault; run again, and "
        "`featcache verify` it"
    )
