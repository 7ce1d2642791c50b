"""Batches as a pure function of (seed, step): pictures decoded and targets read by threads, some batches ahead.

An optimiser step takes one global batch of the epoch's permutation; micro-batch j of process r takes its slice, so the
same pictures make the same step for any number of processes and any accumulation. A rest smaller than a global batch is
left out of the epoch. n training pictures, B pictures a process and micro-batch, S pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache import images, joining, rng
from featcache.errors import UserError
from student.targets import Host, Targets

AHEAD = 3  # batches under way


@dataclass
class Loader:
    """`pictures` (n,) are the source's numbers of the training pictures, `digests` (n, 2) their keys'."""

    source: images.Source
    targets: Targets
    pictures: npt.NDArray[np.int64]
    digests: rng.U64
    seed: int
    batch_size: int  # per process and micro-batch
    accumulation: int = 1
    world: int = 1
    rank: int = 0
    workers: int = 2
    check_fraction: float = 1 / 16  # of the rendered views that are compared with their stored hash

    def __post_init__(self) -> None:
        n = len(self.pictures)
        if self.global_batch > n:
            raise UserError(
                f"one step takes {self.global_batch} pictures ({self.batch_size} x {self.accumulation} micro-batches x "
                f"{self.world} processes), the training set has {n}; give a smaller --batch-size"
            )
        self._order = lru_cache(2)(lambda epoch: rng.permutation(n, self.seed, epoch))

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        return len(self.pictures) // self.global_batch

    def rows(self, step: int, micro: int = 0) -> tuple[npt.NDArray[np.int64], int]:
        """Numbers (B,) of the training pictures of a micro-batch on this process, and the epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.global_batch + (micro * self.world + self.rank) * self.batch_size
        return self._order(epoch)[first : first + self.batch_size], epoch

    def iterate(self, first_step: int, last_step: int) -> Generator[Host, None, None]:
        """Micro-batches of the steps in [first_step, last_step), in order."""
        wanted = iter([(step, micro) for step in range(first_step, last_step) for micro in range(self.accumulation)])
        with ThreadPoolExecutor(self.workers) as decoders, ThreadPoolExecutor(AHEAD) as batches:
            waiting: deque[Future[Host]] = deque()
            try:
                while True:
                    while len(waiting) < AHEAD and (item := next(wanted, None)) is not None:
                        waiting.append(batches.submit(self.batch, *item, decoders))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
                decoders.shutdown(wait=False, cancel_futures=True)

    def batch(self, step: int, micro: int, decoders: ThreadPoolExecutor) -> Host:
        """One micro-batch: `pixels` (B, S, S, 3) uint8, the stored arrays, `view`, `at`, `digests`, `epoch`, `keys`."""
        at, epoch = self.rows(step, micro)
        digests = self.digests[at]
        view = self.targets.view(digests, epoch)
        checked = joining.sampled(digests, view, epoch, self.seed, self.check_fraction)
        host = self.targets.fetch(at, view)
        keys = [self.source.keys[self.pictures[i]] for i in at]
        futures = [
            decoders.submit(self._sample, host, i, int(at[i]), keys[i], int(view[i]), bool(checked[i]))
            for i in range(len(at))
            if checked[i] or "pixels" not in host
        ]
        rendered = [future.result() for future in futures]
        names = rendered[0] if "pixels" not in host else ()
        stacked = {name: np.stack([row[name] for row in rendered]) for name in names}
        return {**host, **stacked, "at": at, "view": view, "digests": digests, "epoch": epoch, "keys": keys}

    def _sample(self, host: Host, i: int, at: int, key: str, view: int, checked: bool) -> dict[str, Any]:
        """Render sample i, unless its pixels came with the targets, and compare them with the stored hash."""
        out = {"pixels": host["pixels"][i]} if "pixels" in host else self._render(host, i, at, key, view)
        if checked:
            self.targets.check(out["pixels"], at, view)
        return out

    def _render(self, host: Host, i: int, at: int, key: str, view: int) -> dict[str, Any]:
        try:
            picture = images.picture(self.source, int(self.pictures[at]))
        except (images.PictureError, OSError) as error:
            raise UserError(f"picture {key!r} cannot be used in training: {error}; mend it, or remove it") from error
        return self.targets.render(picture, host, i, key, self.digests[at], view)
