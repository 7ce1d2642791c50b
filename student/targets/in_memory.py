"""`--resident`: what a run reads of its cache, once, into memory that the processes of a machine
share.

Each row is checked as it is loaded, and no longer afterwards. The memory belongs to no file: it is
gone with the last process, however that ends. n training pictures, V views, B batch.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from accelerate import Accelerator
from accelerate.utils import gather_object

from featcache.errors import UserError
from student.targets import buffers
from student.targets.cached import CachedTargets
from student.targets.contract import I64, HostBatch

_CHUNK = 1 << 26  # bytes of a read while loading
_ALIGN = 64
_LARGE = 1 << 20  # bytes; less is copied by the caller alone
_THREADS = min(4, len(os.sched_getaffinity(0)))
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class SharedRows:
    """The arrays of a run's targets, (V, n, ...) each, laid out one after the other in one piece of
    memory."""

    def __init__(self, layout: buffers.Layout, views: int, n: int, memory: mmap.mmap) -> None:
        self.n, at = n, 0
        self._threads: ThreadPoolExecutor | None = None
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        for name, (item, dtype) in layout.items():
            shape = (views, n, *item)
            self.arrays[name] = np.ndarray(shape, dtype, memory, at)
            at += _padded(shape, dtype)

    def fetch(
        self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Rows (B, ...) of training pictures `at` in their views, in the memory of `out`."""
        return {
            name: self.take(name, at, view, None if out is None else out[name])
            for name in self.arrays
        }

    def take(
        self, name: str, at: I64, view: I64, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Those of one array; a large one is copied by several threads."""
        array = self.arrays[name].reshape(-1, *self.arrays[name].shape[2:])
        places = view * self.n + at
        if out is None:
            out = np.empty((len(places), *array.shape[1:]), array.dtype)
        threads = _THREADS if out.nbytes > _LARGE else 1
        cuts = [len(places) * i // threads for i in range(threads + 1)]
        others = [
            self._pool().submit(_take, array, places, out, *cut) for cut in pairwise(cuts[1:])
        ]
        _take(array, places, out, *cuts[:2])
        for other in others:
            other.result()
        return out

    def _pool(self) -> ThreadPoolExecutor:
        self._threads = self._threads or ThreadPoolExecutor(
            max(_THREADS - 1, 1), "student-resident"
        )
        return self._threads


def load(targets: CachedTargets, acc: Accelerator) -> int:
    """Let `targets` answer from memory from now on; the first process of each machine loads it.
    Returns the bytes."""
    layout = targets.stored_layout()
    n, views = len(targets.rows), targets.cache.views
    size = sum(_padded((views, n, *item), dtype) for item, dtype in layout.values())
    memory = None
    mine = -1
    if acc.is_local_main_process:
        _check_room(size)
        mine = os.memfd_create("student-resident")
        os.ftruncate(mine, size)
        memory = mmap.mmap(mine, size)
        _fill(targets, SharedRows(layout, views, n, memory))
    if acc.num_processes > 1:
        boot = _BOOT.read_text()
        offers = gather_object([(boot, os.getpid(), mine)])
        pid, theirs = next((pid, fd) for where, pid, fd in offers if where == boot and fd >= 0)
        if memory is None:
            with Path(f"/proc/{pid}/fd/{theirs}").open("r+b") as file:
                memory = mmap.mmap(file.fileno(), size)
        acc.wait_for_everyone()  # until all have opened it
    if mine >= 0:
        os.close(mine)
    assert memory is not None
    targets.resident = SharedRows(layout, views, n, memory)
    return size


def _fill(targets: CachedTargets, rows: SharedRows) -> None:
    item = sum(array[0, 0].nbytes for array in rows.arrays.values())
    step = max(_CHUNK // item, 1)
    for view in range(targets.cache.views):
        for low in range(0, rows.n, step):
            at = np.arange(low, min(low + step, rows.n))
            targets.fetch(
                at,
                np.full(len(at), view),
                {name: array[view, at[0] : at[-1] + 1] for name, array in rows.arrays.items()},
            )


def _take(array: npt.NDArray[Any], places: I64, out: npt.NDArray[Any], low: int, high: int) -> None:
    np.take(array, places[low:high], 0, out=out[low:high], mode="clip")


def _padded(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN


def _check_room(size: int) -> None:
    free = psutil.virtual_memory().available
    if _LIMIT.is_file() and (limit := _LIMIT.read_text().strip()).isdecimal():
        free = min(free, int(limit))
    if size > free:
        raise UserError(
            f"--resident: {size / 2**30:.1f} GiB of targets do not fit, at most {free / 2**30:.1f} "
            "GiB of memory are free; leave it out, or use a smaller codec, fewer views or levels"
        )
