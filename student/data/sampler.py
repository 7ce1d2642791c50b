"""The sampler orders pictures, a pure function of (seed, epoch): rows at random, or blocks of
neighbours.

n training pictures, G pictures a step over all processes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from featcache import rng

I64 = npt.NDArray[np.int64]

BLOCK = 64  # neighbours in storage that stay together
# blocks that are shuffled together: a batch from one window opens 16 files where rows would open
# 1,024
WINDOW = 16


class SampleOrder:
    """Orders the pictures of every epoch, each once. With `positions` (n,) of the pictures in
    storage, blocks of 64 neighbours come in random order and rows are shuffled within windows of 16
    blocks, for disks on which opening a file is dear. Blocks begin elsewhere in each epoch, so that
    no two pictures are bound to each other."""

    def __init__(self, n: int, seed: int, positions: I64 | None = None) -> None:
        self.n, self.seed, self.positions = n, seed, positions
        self._of_epoch = lru_cache(2)(self._rows if positions is None else self._blocks)

    def step(self, epoch: int, first: int, count: int) -> I64:
        """Return indices (G,) of the pictures [first, first + count) of an epoch. Of blocks, those
        of a step are in storage order, so that each process has its own files."""
        rows = self._of_epoch(epoch)[first : first + count]
        if self.positions is None:
            return rows
        return rows[np.argsort(self.positions[rows], kind="stable")]

    def _rows(self, epoch: int) -> I64:
        return rng.permutation(self.n, self.seed, epoch)

    def _blocks(self, epoch: int) -> I64:
        assert self.positions is not None
        digest = rng.key_digests([f"blocks:{self.n}"])
        shift = int(
            rng.words(digest, rng.stream("shift", self.seed), 1, epoch=epoch)[0, 0]
            % np.uint64(BLOCK)
        )
        block = (np.arange(self.n) + shift) // BLOCK  # of the picture at each position
        turn = np.empty(int(block[-1]) + 1, np.int64)
        turn[
            np.argsort(
                rng.words(digest, rng.stream("blocks", self.seed), len(turn), epoch=epoch)[0],
                kind="stable",
            )
        ] = np.arange(len(turn))
        words = rng.words(digest, rng.stream("order", self.seed), self.n, epoch=epoch)[0]
        return np.argsort(self.positions, kind="stable")[np.lexsort((words, turn[block] // WINDOW))]
