"""The keys of rows lie in one block of bytes and are found by digest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import UsageError, UserError, command_line, counted
from featcache.storage.files import files_of
from featcache.storage.store import ShardKeys, folder_path

I64 = npt.NDArray[np.int64]


def read_shard_keys(store: ModuleType, cache: Path, record: Mapping[str, Any]) -> ShardKeys:
    """Read the keys of a shard's rows. Raises UserError where they are not as many, or no text."""
    files_of(cache).bring(key_paths(store, cache, record))
    blob, offsets = store.keys(cache, record["shard"], record)
    if (
        len(offsets) != record["rows"] + 1
        or offsets[0] != 0
        or offsets[-1] != len(blob)
        or (np.diff(offsets) < 0).any()
        or not _is_text(blob, offsets)
    ):
        raise UserError(
            f"cache file {folder_path(cache, record['shard'], store.NAME)}: its keys are not text "
            f"of {counted(record['rows'], 'row')}; run "
            f"`{command_line('featcache', 'verify', cache)}`"
        )
    return ShardKeys(blob, offsets)


def key_paths(store: ModuleType, cache: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the paths of the files that hold the keys of a shard."""
    folder = folder_path(cache, record["shard"], store.NAME)
    return [f"{folder}/{name}" for name in store.key_files(record)]


def _is_text(blob: npt.NDArray[np.uint8], offsets: I64) -> bool:
    """Whether the whole is UTF-8, and no key begins within a character."""
    try:
        blob.tobytes().decode()
    except UnicodeDecodeError:
        return False
    starts = blob[offsets[offsets < len(blob)]]
    return not (starts & 0xC0 == 0x80).any()


class Keys(Sequence[str]):
    """Holds the keys of all rows as one block of bytes and its offsets: no Python object per
    row."""

    def __init__(self, blob: npt.NDArray[np.uint8], offsets: I64) -> None:
        self._blob, self._offsets = blob, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return self._blob[self._offsets[row] : self._offsets[row + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def digests(self) -> rng.U64:
        """(n, 2) key digests in row order."""
        return rng.key_digests(self)

    @cached_property
    def _sorted(self) -> I64:
        return np.lexsort((self.digests[:, 1], self.digests[:, 0]))

    def digests_of(self, rows: I64) -> rng.U64:
        """Return the digests (m, 2) of the keys of rows (m,)."""
        return rng.key_digests(self[row] for row in rows.tolist())

    def find(self, keys: Sequence[str]) -> I64:
        """Return the row (m,) of each key, -1 where it is not here."""
        return self.find_digests(rng.key_digests(check_sought(keys)))

    def find_digests(self, wanted: rng.U64) -> I64:
        """Return the row (m,) of each digest of a key (m, 2), -1 where it is not here."""
        if not len(self) or not len(wanted):
            return np.full(len(wanted), -1, np.int64)
        pairs = np.ascontiguousarray(self.digests[self._sorted]).view([("a", "u8"), ("b", "u8")])[
            :, 0
        ]
        sought = np.ascontiguousarray(wanted).view(pairs.dtype)[:, 0]
        at = np.minimum(np.searchsorted(pairs, sought), len(self) - 1)
        return np.where(pairs[at] == sought, self._sorted[at], -1)


def check_sought(keys: Sequence[str]) -> list[str]:
    """Return the keys that `find` is to find. Raises UsageError where they are no list of texts."""
    if isinstance(keys, str):
        raise UsageError(
            f"keys.find: a list of keys is needed, {keys!r} is one string; give [{keys!r}]"
        )
    keys = list(keys) if isinstance(keys, Iterable) else [keys]
    if not all(isinstance(key, str) for key in keys):
        raise UsageError(
            f"keys.find: a list of keys is needed, which are text; {keys!r:.80} is given"
        )
    return keys
