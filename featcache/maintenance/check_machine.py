"""`featcache doctor` looks at the machine: cores, memory, GPUs, disks and limits."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from featcache.maintenance.finding import BROKEN, NOTE, OK, Finding, error_text, gigabytes
from featcache.runtime import machine, signals

DRIVER = Path("/dev/nvidiactl")  # there where NVIDIA's driver is loaded
_FULL = 64 << 20  # bytes free; less holds no shard
_LITTLE = 5 << 30
_FEW_FILES = 1024
_LITTLE_SHARED = 1 << 30  # docker gives 64 MiB
_GPU_S = 3.0  # a context takes some tenths of a second


def cores() -> list[Finding]:
    """Tell how many cores this process may use."""
    allowed, quota = machine.allowed_cores(), machine.core_quota()
    facts: dict[str, Any] = {"cores": os.cpu_count(), "affinity": allowed, "cgroup": quota}
    told = f"{allowed} of {os.cpu_count()} by affinity"
    if quota is None or quota >= allowed:
        return [Finding("cores", told, facts=facts)]
    advice = f"give --workers {max(int(quota), 1)} or so: more only wait for one another"
    return [Finding("cores", f"{told}, time of {quota:.3g} by cgroup", NOTE, advice, facts)]


def memory() -> list[Finding]:
    """Tell the memory there is, and what the control group allows of it."""
    import psutil

    there, limit = psutil.virtual_memory(), machine.memory_limit()
    facts = {"total": there.total, "available": there.available, "cgroup": limit}
    told = f"{gigabytes(there.total)}, {gigabytes(there.available)} available"
    if limit is not None and limit < there.total:
        told += f", {gigabytes(limit)} allowed by cgroup"
    return [Finding("memory", told, facts=facts)]


def gpus() -> list[Finding]:
    """Import torch, and tell the GPUs it finds; a small product is computed on each."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            import torch

            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:  # whatever a broken installation makes of it
        if signals.was_signalled():
            raise
        advice = "install torch again, whole, for this machine's driver"
        return [Finding("torch works", error_text(error), BROKEN, advice)]
    if not count:
        return [_no_gpu(torch.version.cuda, [str(each.message) for each in told])]
    end = time.monotonic() + _GPU_S
    return [_gpu(torch, index, time.monotonic() < end) for index in range(count)]


def _no_gpu(built_for: str | None, told: list[str]) -> Finding:
    """Say that there is none, and why, where a driver says that there ought to be one."""
    facts = {"driver": DRIVER.exists(), "torch_cuda": built_for}
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding("GPUs", f"none: CUDA_VISIBLE_DEVICES={hidden!r} hides them", facts=facts)
    if not facts["driver"]:
        return Finding("GPUs", "none: work is done on the CPU", facts=facts)
    if built_for is None:
        advice = "install a torch built for CUDA"
        return Finding("GPUs", "none: this torch is built without CUDA", NOTE, advice, facts)
    reason = told[0].splitlines()[0][:300] if told and told[0] else "torch finds none"
    advice = f"look at `nvidia-smi`; torch is built for CUDA {built_for}, the driver must allow it"
    return Finding("GPUs", f"none, though there is a driver: {reason}", NOTE, advice, facts)


def _gpu(torch: Any, index: int, tried: bool) -> Finding:
    what, device = f"GPU {index}", f"cuda:{index}"
    try:
        about = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            good = not tried or _computes(torch, device)
    except Exception as error:  # torch has a kind of its own for each
        advice = f"look at `nvidia-smi`, or hide it (CUDA_VISIBLE_DEVICES without {index})"
        return Finding(what, error_text(error), BROKEN, advice)
    facts = {
        "name": about.name,
        "memory": about.total_memory,
        "capability": [about.major, about.minor],
        "bf16": bf16,
        "computes": good if tried else None,
    }
    told = f"{about.name}, {gigabytes(about.total_memory)}, capability {about.major}.{about.minor}"
    told += f", bf16 {'yes' if bf16 else 'no'}"
    if not good:
        return Finding(what, f"{told}: wrong products", BROKEN, "take it out of use", facts)
    return Finding(what, told, facts=facts)


def _computes(torch: Any, device: str) -> bool:
    ones = torch.ones(64, 64, device=device)
    return float((ones @ ones).sum().item()) == 64.0**3


def disks() -> list[Finding]:
    """Tell what is free where temporary files and runs are written."""
    return [_temporary(), _current()]


def disk(what: str, folder: Path) -> Finding:
    """Tell what is free on the disk of a folder, or of where it would be made."""
    there = nearest(folder)
    try:
        usage, inodes = shutil.disk_usage(there), os.statvfs(there)
    except OSError as error:
        return Finding(what, error_text(error), BROKEN, "mount this disk, or name another folder")
    free = usage.free
    facts = {"path": str(there), "free": free}
    told = f"{gigabytes(free)} free at {str(there)!r}"
    if not usage.total:  # as of /proc, which is no disk
        return Finding(what, f"{str(there)!r} is on no disk", facts=facts)
    if free < _FULL:
        return Finding(what, told, BROKEN, "free some room, or name a folder elsewhere", facts)
    if inodes.f_files and not inodes.f_favail:
        advice = "remove small files: the disk may hold no more of them"
        return Finding(what, f"no inode free at {str(there)!r}", BROKEN, advice, facts)
    if free < _LITTLE:
        advice = "count a cache first: `featcache extract ... --dry-run`"
        return Finding(what, told, NOTE, advice, facts)
    return Finding(what, told, facts=facts)


def nearest(folder: Path) -> Path:
    """Return a folder, or the nearest above it that exists, in which it would be made."""
    folder = folder.absolute()
    return next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)


def _temporary() -> Finding:
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:  # it looks in several places, and lists them
        advice = "set TMPDIR to a folder that can be written"
        return Finding("disk of the temp folder", error_text(error), BROKEN, advice)
    return disk("disk of the temp folder", Path(folder))


def _current() -> Finding:
    what = "disk of this folder"
    try:
        folder = Path.cwd()
    except OSError:
        return Finding(what, "this folder is no longer there", BROKEN, "cd to another")
    found = disk(what, folder)
    if found.state == OK and not os.access(folder, os.W_OK):
        advice = "runs go to ./runs: give --out elsewhere, or cd to another folder"
        return Finding(what, f"{str(folder)!r} cannot be written", NOTE, advice, found.facts)
    return found


def limits() -> list[Finding]:
    """Tell how many files may be open, and how large shared memory is."""
    return [_open_files(), _shared_memory()]


def _open_files() -> Finding:
    soft, hard = machine.file_limits()
    facts = {"soft": soft, "hard": hard}
    told = f"{_count(soft)}, at most {_count(hard)}"
    if 0 <= hard < _FEW_FILES:
        advice = f"raise the limit (`ulimit -Hn`) to {_FEW_FILES} or more: reads wait for files"
        return Finding("open files", told, NOTE, advice, facts)
    return Finding("open files", told, facts=facts)


def _count(limit: int) -> str:
    return "any number" if limit < 0 else str(limit)


def _shared_memory() -> Finding:
    usage = machine.shared_memory()
    if usage is None:
        told, advice = f"none at {machine.SHARED_MEMORY}", "mount a tmpfs there"
        return Finding("shared memory", told, NOTE, advice)
    facts = {"total": usage[0], "free": usage[1]}
    told = f"{gigabytes(usage[1])} of {gigabytes(usage[0])} free"
    if usage[1] < _LITTLE_SHARED:
        advice = "a DataLoader's workers may fail (docker run --shm-size=8g)"
        return Finding("shared memory", told, NOTE, advice, facts)
    return Finding("shared memory", told, facts=facts)
