"""The keys of a part with an index are read shard by shard, and found by the index: opening reads
none of them.

n rows, m that are asked for.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import numpy as np

from featcache import rng
from featcache.storage.index import ShardIndex
from featcache.storage.index_file import DamagedIndexError
from featcache.storage.keys import I64, Keys, check_sought
from featcache.storage.shard_records import lying_error

_LOG = logging.getLogger(__name__)
_KEPT = 64  # shards, of 1,024 rows some 60 kB each
_AT_ONCE = 1 << 20  # keys that are sought together: every block is then read once for so many
_SAMPLED = 8  # of the rows that are found, whose keys are compared


class IndexedKeys(Sequence[str]):
    """Holds the keys of all rows as `Keys` does, and none of them in memory but those of the shards
    that were asked for last. `read` gives the keys of a shard."""

    def __init__(
        self, index: ShardIndex, read: Callable[[int], Keys], read_all: Callable[[], Keys]
    ) -> None:
        self._index, self._read_all = index, read_all
        self._starts: list[int] = index.starts.tolist()
        self._shard = lru_cache(_KEPT)(read)
        self._whole: Keys | None = None  # where the index turned out to be damaged

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(len(self))[row]]
        row = range(len(self))[row]
        shard = bisect.bisect_right(self._starts, row) - 1
        return self._shard(shard)[row - self._starts[shard]]

    def __iter__(self) -> Iterator[str]:
        for shard in range(len(self._starts) - 1):
            yield from self._shard(shard)

    @property
    def digests(self) -> rng.U64:
        """(n, 2) key digests in row order, made anew each time: 16 bytes a row."""
        return rng.key_digests(self)

    def digests_of(self, rows: I64) -> rng.U64:
        """Return the digests (m, 2) of the keys of rows (m,), in whatever order: each shard is read
        once."""
        out = np.empty((len(rows), 2), np.uint64)
        order = np.argsort(rows, kind="stable")
        edges = np.searchsorted(rows[order], self._index.starts)
        for shard, (low, high) in enumerate(pairwise(edges)):
            if low < high:
                keys, here = self._shard(shard), order[low:high]
                numbers = (rows[here] - self._starts[shard]).tolist()
                out[here] = rng.key_digests(keys[i] for i in numbers)
        return out

    def find(self, keys: Sequence[str]) -> I64:
        """Return the row (m,) of each key, -1 where it is not here."""
        wanted = iter(check_sought(keys))
        found = [np.zeros(0, np.int64)]
        while len(digests := rng.key_digests(islice(wanted, _AT_ONCE))):
            found.append(self._find(digests))
        return np.concatenate(found)

    def _find(self, digests: rng.U64) -> I64:
        if self._whole is None:
            try:
                rows = self._index.find(digests)
            except (DamagedIndexError, OSError) as error:
                _LOG.warning("index %s: %s: all keys are read", self._index.path, error)
                self._whole = self._read_all()
            else:
                self._compare(digests, rows)
                return rows
        return self._whole.find_digests(digests)

    def _compare(self, digests: rng.U64, rows: I64) -> None:
        """Raise UserError where the keys of some rows that were found are not those that were
        sought."""
        there = np.flatnonzero(rows >= 0)
        at = there[:: max(len(there) // _SAMPLED, 1)]
        if (self.digests_of(rows[at]) != digests[at]).any():
            raise lying_error(self._index.path, "it gives rows of other keys than were sought")
