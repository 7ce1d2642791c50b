"""Members of tars in an object store are read one by one, or in blocks that are fetched ahead where
they are read in their order."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

BLOCK_BYTES = 4 << 20
MOST_BLOCKS = 16  # in memory
_AHEAD = 4  # blocks that are asked for before they are read
_RECENT = 64  # reads that a next one may follow: as many as threads may be at once

Read = Callable[[str, int, int], bytes]  # tar, offset, bytes
Block = tuple[str, int]  # tar, number


class ReadAhead:
    """Reads by `read`, which raises what stops the work; safe in threads."""

    def __init__(self, read: Read, block_bytes: int = BLOCK_BYTES) -> None:
        self._read, self._block_bytes = read, block_bytes
        self._lock = threading.Lock()
        self._recent: deque[tuple[str, int]] = deque(maxlen=_RECENT)  # tar, end of what was read
        self._blocks: OrderedDict[Block, Future[bytes]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_AHEAD, "featcache-read-ahead")

    def read(self, tar: str, offset: int, size: int, tar_bytes: int) -> bytes:
        """Return bytes of a tar that has `tar_bytes`, from memory where they follow what was read
        a moment ago."""
        block = self._block_bytes
        first, last = offset // block, max(offset + size - 1, offset) // block
        with self._lock:
            follows = any(
                each == tar and -block < offset - end < block for each, end in self._recent
            )
            self._recent.append((tar, offset + size))
            if not follows or last - first >= _AHEAD:
                blocks = []
            else:
                blocks = [self._block(tar, n, tar_bytes) for n in range(first, last + 1)]
                for number in range(last + 1, last + _AHEAD):
                    if number * block < tar_bytes:
                        self._block(tar, number, tar_bytes)
        if not blocks:
            return self._read(tar, offset, size)
        data = b"".join(self._result(tar, first + i, each) for i, each in enumerate(blocks))
        start = offset - first * block
        return data[start : start + size]

    def _block(self, tar: str, number: int, tar_bytes: int) -> Future[bytes]:
        """Return a block that is here, or under way from now on; the lock is held."""
        key = (tar, number)
        if key not in self._blocks:
            start = number * self._block_bytes
            count = min(self._block_bytes, tar_bytes - start)
            self._blocks[key] = self._pool.submit(self._read, tar, start, count)
            while len(self._blocks) > MOST_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _result(self, tar: str, number: int, block: Future[bytes]) -> bytes:
        try:
            return block.result()
        except BaseException:
            with self._lock:  # whoever reads it again asks again
                self._blocks.pop((tar, number), None)
            raise
