"""This process's share of the machine is looked up: processor cores, memory, open files and shared
memory, as affinity, the control group and resource limits allow."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from featcache.runtime.numbers import is_whole

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
SHARED_MEMORY = Path("/dev/shm")


def allowed_cores() -> int:
    """Return the cores that this process's affinity allows."""
    return len(os.sched_getaffinity(0))


def core_quota() -> float | None:
    """Return the cores' worth of time that the control group and those above it allow; None where
    they set no limit."""
    found = []
    for folder in _groups("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            numbers = [number for name in names for number in _numbers(folder / name)]
            if len(numbers) == 2 and numbers[1]:  # an unlimited quota is "max", or -1
                found.append(numbers[0] / numbers[1])
    return min(found, default=None)


def memory_limit() -> int | None:
    """Return the bytes that the control group and those above it allow; None where they set no
    limit."""
    names = ("memory.max", "memory.limit_in_bytes")
    files = [folder / name for folder in _groups("memory") for name in names]
    return min((number for file in files for number in _numbers(file)), default=None)


def _groups(controller: str) -> Iterator[Path]:
    """List the folders of this process's control group and of those above it, of both versions."""
    try:
        lines = MEMBERSHIP.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = CGROUP / controller if controllers else CGROUP
        # a group outside this container's view begins with /..; its own root is seen all the same
        inside = base if ".." in path.split("/") else base / path.strip("/")
        yield from (each for each in (inside, *inside.parents) if each.is_relative_to(base))


def _numbers(path: Path) -> list[int]:
    """Return the whole numbers in a small file; none where it cannot be read."""
    try:
        words = path.read_text(errors="replace").split()
    except OSError:
        return []
    return [int(word) for word in words if is_whole(word)]  # v1's "no limit" has 19 digits


def file_limits() -> tuple[int, int]:
    """Return how many files this process may hold open now, and at most; -1 is any number."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def shared_memory() -> tuple[int, int] | None:
    """Return (bytes, free bytes) of shared memory; None where there is none."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return None
    return usage.total, usage.free
