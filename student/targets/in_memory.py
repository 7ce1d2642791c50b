"""The targets of a run are read once into memory that the processes of a machine share
(`--resident`).

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
    """The arrays of a run's targets, (V, n, ...) each, lie one after the other in one piece of
    memory."""

    def __init__(self, layout: buffers.Layout, views: int, n: int, memory: mmap.mmap) -> None:
        self.n, offset = n, 0
        self._threads: ThreadPoolExecutor | None = None
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        for name, (item, dtype) in layout.items():
            shape = (views, n, *item)
            self.arrays[name] = np.ndarray(shape, dtype, memory, offset)
            offset += _padded(shape, dtype)

    def fetch(
        self, indices: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> HostBatch:
        """Copy all arrays (B, ...) of training pictures `indices` (B,) in their views (B,), into
        the memory of `out`."""
        return {
            name: self.take(name, indices, view, None if out is None else out[name])
            for name in self.arrays
        }

    def take(
        self, name: str, indices: I64, view: I64, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Copy one array (B, ...); a large one is copied by several threads."""
        array = self.arrays[name].reshape(-1, *self.arrays[name].shape[2:])
        positions = view * self.n + indices
        if out is None:
            out = np.empty((len(positions), *array.shape[1:]), array.dtype)
        threads = _THREADS if out.nbytes > _LARGE else 1
        cuts = [len(positions) * i // threads for i in range(threads + 1)]
        others = [
            self._pool().submit(_take, array, positions, out, *cut) for cut in pairwise(cuts[1:])
        ]
        _take(array, positions, out, *cuts[:2])
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
    own_fd, memory = -1, None
    if acc.is_local_main_process:
        own_fd, memory = _allocate(size)
        _fill(targets, SharedRows(layout, views, n, memory))
    if acc.num_processes > 1:
        memory = _share(acc, own_fd, size, memory)
    if own_fd >= 0:
        os.close(own_fd)
    assert memory is not None
    targets.resident = SharedRows(layout, views, n, memory)
    return size


def _allocate(size: int) -> tuple[int, mmap.mmap]:
    """Memory that belongs to no file, and its file descriptor."""
    _check_room(size)
    descriptor = os.memfd_create("student-resident")
    os.ftruncate(descriptor, size)
    return descriptor, mmap.mmap(descriptor, size)


def _share(acc: Accelerator, own_fd: int, size: int, memory: mmap.mmap | None) -> mmap.mmap:
    """Map the memory that a process of this machine has loaded; a collective. Processes of a
    machine know each other by the boot id of its kernel."""
    boot = _BOOT.read_text()
    offers = gather_object([(boot, os.getpid(), own_fd)])
    pid, shared_fd = next((pid, fd) for where, pid, fd in offers if where == boot and fd >= 0)
    if memory is None:
        with Path(f"/proc/{pid}/fd/{shared_fd}").open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
    acc.wait_for_everyone()  # until all have opened it
    return memory


def _fill(targets: CachedTargets, rows: SharedRows) -> None:
    """Read all rows and views of the targets, _CHUNK bytes at a time."""
    item = sum(array[0, 0].nbytes for array in rows.arrays.values())
    step = max(_CHUNK // item, 1)
    for view in range(targets.cache.views):
        for low in range(0, rows.n, step):
            high = min(low + step, rows.n)
            out = {name: array[view, low:high] for name, array in rows.arrays.items()}
            targets.fetch(np.arange(low, high), np.full(high - low, view), out)


def _take(
    array: npt.NDArray[Any], positions: I64, out: npt.NDArray[Any], low: int, high: int
) -> None:
    np.take(array, positions[low:high], 0, out=out[low:high], mode="clip")


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
