"""The loader makes batches, a pure function of (seed, step): threads decode pictures and read
targets some batches ahead.

An optimiser step takes one global batch of the epoch's order; micro-batch j of process r takes its
slice, so the same pictures make the same step for any number of processes and any accumulation. A
rest smaller than a global batch is left out of the epoch. n training pictures, B samples a process
and micro-batch, R views of each of its B / R pictures.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError, UserError, counted
from featcache.pictures.source import PictureError, Source
from featcache.reading import pixel_check
from featcache.views import pixel_path
from student.data.read_ahead import FetchAhead, ReadAhead
from student.data.sampler import SampleOrder
from student.models import drop_path
from student.targets import buffers
from student.targets.contract import HostBatch, Targets

AHEAD = 3  # batches under way, beside the one that is being used
Memory = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Begun:
    """Holds a micro-batch, the memory it lies in, and the tasks still at work on its pictures."""

    host: HostBatch
    memory: Memory
    samples: Sequence[Future[None]]

    def finish(self) -> HostBatch:
        for sample in self.samples:
            sample.result()
        return self.host


@dataclass(kw_only=True)
class Loader:
    """Makes the batches of one process. `pictures` (n,) are the source's indices of the training
    pictures, `digests` (n, 2) those of their keys."""

    source: Source
    targets: Targets
    pictures: npt.NDArray[np.int64]
    digests: rng.U64
    seed: int
    batch_size: int  # samples per process and micro-batch
    accumulation: int = 1
    world: int = 1
    rank: int = 0
    workers: int = 2
    check_fraction: float = 1 / 16  # of the rendered views that are compared with their stored hash
    repeats: int = 1  # views of a picture in one step; it is decoded once
    # (n,) of the pictures in storage: sampled by blocks; None: at random
    positions: npt.NDArray[np.int64] | None = None
    # draws masks, or what is random in them where they read what only the device will know
    masks: Callable[[HostBatch], Mapping[str, Tensor]] | None = None
    pin: bool = False  # page-locked memory, for a GPU
    fetch_ahead: FetchAhead | None = None  # of targets that lie far away

    def __post_init__(self) -> None:
        n = len(self.pictures)
        if self.batch_size % self.repeats:
            raise UsageError(
                f"--batch-size {self.batch_size} with --aug-repeats {self.repeats}: a batch holds "
                f"all views of its pictures; give a multiple of {self.repeats}"
            )
        if self.global_batch > n * self.repeats:
            raise UserError(
                "one step takes "
                f"{counted(self.global_batch // self.repeats, 'picture')} ({self._cut()}), the "
                f"training set has {n}; give a smaller --batch-size"
            )
        self._order = SampleOrder(n, self.seed, self.positions)
        self._moments = lru_cache(AHEAD + 1)(self._moments_of)
        self._ahead: ReadAhead | None = None

    def _cut(self) -> str:
        shown = f" / {counted(self.repeats, 'view')}" if self.repeats > 1 else ""
        return (
            f"{self.batch_size} x {self.accumulation} micro-batches x "
            f"{counted(self.world, 'process', 'processes')}{shown}"
        )

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        return len(self.pictures) // (self.global_batch // self.repeats)

    def rows(self, step: int, micro: int = 0) -> tuple[npt.NDArray[np.int64], int]:
        """Return indices (B,) of the training pictures of a micro-batch on this process, and the
        epoch."""
        at, epoch = self.step_rows(step)
        return at[self.positions_in_step(micro)], epoch

    def positions_in_step(self, micro: int) -> npt.NDArray[np.int64]:
        """Return the positions (B,) of a micro-batch's samples in the step's global batch."""
        first = (micro * self.world + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size)

    def step_rows(self, step: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return indices (global batch,) of the training pictures of a step over all processes, and
        the epoch."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        count = self.global_batch // self.repeats
        rows = self._order.step(epoch, step_in_epoch * count, count)
        return np.repeat(rows, self.repeats), epoch

    def _rounds(self, count: int, epoch: int) -> npt.NDArray[np.int64]:
        """Count how often each of `count` samples was shown before the epoch's own showing."""
        return epoch * self.repeats + np.arange(count) % self.repeats

    def _moments_of(self, step: int) -> npt.NDArray[np.float32] | None:
        """Return the moments of the whole batch of a step, the same on every process."""
        if self.targets.moments is None:
            return None
        at, epoch = self.step_rows(step)
        return self.targets.moments(
            at, self.targets.view(self.digests[at], self._rounds(len(at), epoch))
        )

    def iterate(
        self, first_step: int, last_step: int, drop_rates: Sequence[float] = ()
    ) -> Generator[HostBatch, None, None]:
        """Yield the micro-batches of the steps in [first_step, last_step), in order, with the drop
        path of branches that have these rates. A batch is good until the next one is asked for:
        then its memory is filled again."""
        wanted = (
            (step, micro)
            for step in range(first_step, last_step)
            for micro in range(self.accumulation)
        )
        # One thread begins batches, in order, and reads with those of the cache: several would be
        # in the decoders' way. Where nothing is decoded another plans the next batch meanwhile.
        beginners = 2 if self.targets.is_io_bound else 1
        with (
            ThreadPoolExecutor(self.workers) as decoders,
            ThreadPoolExecutor(beginners) as beginner,
            contextlib.ExitStack() as stack,
        ):
            if self.fetch_ahead is not None:
                ahead = ReadAhead(self._own_samples, self.fetch_ahead)
                self._ahead = stack.enter_context(ahead.running(first_step, last_step))
            free: deque[Memory | None] = deque([None] * (AHEAD + 1))
            waiting: deque[Future[_Begun]] = deque()
            try:
                while True:
                    while len(waiting) < AHEAD and (item := next(wanted, None)) is not None:
                        waiting.append(
                            beginner.submit(
                                self._begin, *item, decoders, free.popleft(), drop_rates
                            )
                        )
                    if not waiting:
                        return
                    begun = waiting.popleft().result()
                    yield begun.finish()
                    free.append(begun.memory)
            finally:
                for future in waiting:
                    future.cancel()
                decoders.shutdown(wait=False, cancel_futures=True)

    def batch(self, step: int, micro: int, decoders: ThreadPoolExecutor) -> HostBatch:
        """Make one micro-batch in memory of its own: `pixels` (B, S, S, 3) uint8, the stored
        arrays, `view`, `round` (how often each picture was shown before), `at`, `digests`, `epoch`,
        `keys`, and `drawn` by name."""
        return self._begin(step, micro, decoders, None).finish()

    def _begin(
        self,
        step: int,
        micro: int,
        decoders: ThreadPoolExecutor,
        memory: Memory | None,
        drop_rates: Sequence[float] = (),
    ) -> _Begun:
        """Begin a micro-batch: its targets and masks are there, its pictures are under way."""
        if self._ahead is not None:
            self._ahead.arrive(step)
        if memory is None:
            memory = buffers.allocate(self.targets.layout(), self.batch_size, self.pin)
        at, epoch = self.rows(step, micro)
        digests = self.digests[at]
        rounds = self._rounds(len(at), epoch)
        view = self.targets.view(digests, rounds)
        host: HostBatch = memory | self.targets.fetch(at, view, memory)
        host |= {"at": at, "view": view, "round": rounds, "digests": digests, "epoch": epoch}
        host["step"] = step
        if (moments := self._moments(step)) is not None:
            host |= self._pinned({"moments": torch.from_numpy(moments.copy())})
        host["keys"] = [self.source.keys[self.pictures[i]] for i in at]
        checked = pixel_check.sample_views(digests, view, rounds, self.seed, self.check_fraction)
        hashes = self._hashes(at, view, checked)
        starts = range(0, len(at), self.repeats)  # of the views of each picture
        # nothing to render: one thread looks at those that are checked
        if self.targets.stored_pixels:
            work = [[i for i in starts if checked[i : i + self.repeats].any()]]
        else:
            work = [[i] for i in starts]
        futures = [decoders.submit(self._samples, host, some, hashes) for some in work if some]
        host["drawn"] = self._pinned(self._draw(host, step, micro, drop_rates))
        return _Begun(host, memory, futures)

    def _own_samples(self, step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the training pictures (m,) of a step on this process, and their views."""
        parts = []
        for micro in range(self.accumulation):
            at, epoch = self.rows(step, micro)
            parts.append((at, self.targets.view(self.digests[at], self._rounds(len(at), epoch))))
        return np.concatenate([at for at, _ in parts]), np.concatenate([view for _, view in parts])

    def _draw(
        self, host: HostBatch, step: int, micro: int, drop_rates: Sequence[float]
    ) -> dict[str, Tensor]:
        """Draw all that is random in a batch beside its views."""
        drawn = {name: torch.from_numpy(each) for name, each in self.targets.draw(host).items()}
        if self.masks is not None:
            drawn |= self.masks(host)
        if drop_rates:
            kept = drop_path.draw(drop_rates, self.seed, step, self.positions_in_step(micro))
            drawn[drop_path.ENTRY] = torch.from_numpy(kept)
        return drawn

    def _pinned(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: x.pin_memory() for name, x in tensors.items()} if self.pin else tensors

    def _hashes(
        self, at: npt.NDArray[np.int64], view: npt.NDArray[np.int64], checked: npt.NDArray[np.bool_]
    ) -> dict[int, int]:
        """Return the stored hashes of the samples that are checked, by their position in the
        batch."""
        rows = np.flatnonzero(checked)
        stored = self.targets.pixel_hashes(at[rows], view[rows]) if len(rows) else None
        return {} if stored is None else dict(zip(rows.tolist(), stored.tolist(), strict=True))

    def _samples(self, host: HostBatch, starts: Sequence[int], hashes: Mapping[int, int]) -> None:
        for start in starts:
            self._views(host, range(start, start + self.repeats), hashes)

    def _views(self, host: HostBatch, samples: range, hashes: Mapping[int, int]) -> None:
        """Render the views of one picture into the batch, unless their pixels came with the
        targets, and compare them with the stored hashes."""
        at = int(host["at"][samples[0]])
        if not self.targets.stored_pixels:
            key = host["keys"][samples[0]]
            try:
                picture = pixel_path.decode_picture(self.source, int(self.pictures[at]))
            except (PictureError, OSError) as error:
                raise UserError(
                    f"picture {key!r} cannot be used in training: {error}; fix it, or remove it"
                ) from error
            for i in samples:
                rendered = self.targets.render(
                    picture, host, i, key, self.digests[at], int(host["view"][i])
                )
                for name, pixels in rendered.items():
                    host[name][i] = pixels
        for i in samples:
            if i in hashes:
                self.targets.check_pixels(host["pixels"][i], at, int(host["view"][i]), hashes[i])
