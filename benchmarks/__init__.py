"""Each benchmark is a program: `python -m benchmarks.bench_read`, `python -m
benchmarks.bench_write`.

They share what is below: the facts of the machine that every number needs beside it, Markdown
tables, and control of the page cache, which decides what a read measures.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from featcache.console.text import format_table

LIBRARIES = (
    "featcache",
    "numpy",
    "fastcrc",
    "torch",
    "timm",
    "transformers",
    "zarr",
    "zarrs",
    "tensorstore",
    "webdataset",
    "h5py",
    "safetensors",
)
_READ_BYTES = 8 << 20


# ------------------------------------------------------------ hardware and versions


def environment(folder: Path) -> dict[str, Any]:
    """Return hardware, versions and commit: without them a measured number means nothing."""
    return {"hardware": _hardware(folder), "versions": _versions(), "commit": _commit()}


def _hardware(folder: Path) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    models = [
        line.partition(":")[2].strip()
        for line in info.splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "filesystem": _filesystem(folder),
        "load": os.getloadavg()[0],
    }


def _filesystem(folder: Path) -> str:
    """Type and device of the longest mount point above a folder."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    device, _, kind = max(above, key=lambda mount: len(mount[1]), default=("?", "/", "?"))
    return f"{kind} on {device}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit, and `+changes` where files differ from it."""
    here = Path(__file__).parent
    try:
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain"])
        head, changes = (
            subprocess.run(
                command, cwd=here, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+changes" if changes else "")


def describe(about: dict[str, Any]) -> str:
    """Format an environment as one line for people."""
    hardware, versions = about["hardware"], about["versions"]
    return (
        f"{hardware['cores']} cores of {hardware['cpu']}, {hardware['memory_bytes'] / 2**30:.0f} "
        f"GiB, Linux {hardware['kernel']}, {hardware['filesystem']}, load {hardware['load']:.1f}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; commit "
        f"{about['commit']}"
    )


# ------------------------------------------------------------ tables


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table; the first column to the left, numbers to the right."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    return format_table(lines, right=range(1, len(lines[0])), markdown=True)


def save_json(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


# ------------------------------------------------------------ the page cache


def files_of(path: Path) -> list[Path]:
    """Return every file at or below `path`."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def sync(path: Path) -> None:
    """Write out what is dirty: it could not leave the cache, and writing it later would disturb a
    measurement."""
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def warm(path: Path) -> float:
    """Read everything once; return the share that then is in the page cache."""
    memory = bytearray(_READ_BYTES)
    for file in files_of(path):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(memory):
                pass
    return resident_share(path)


def drop(path: Path) -> float:
    """Ask for the pages of all files to leave the page cache; return the share that stayed."""
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return resident_share(path)


def resident_share(path: Path) -> float:
    """Return the share of all bytes below `path` whose pages are in memory, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    inside = pages = 0
    for file in files_of(path):
        size = file.stat().st_size
        if not size:
            continue
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as memory,
        ):
            bytes_ = np.frombuffer(memory, np.uint8)
            states = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            if libc.mincore(bytes_.ctypes.data, size, states.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore")
            del bytes_  # a mapping that something still points into cannot be closed
        inside, pages = inside + int((states & 1).sum()), pages + len(states)
    return inside / max(pages, 1)
