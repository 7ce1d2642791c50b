"""Temporary files and leases name their writer, HOST-PID-NONCE, so that others can tell whether it
still runs.

Nothing is called a leftover of ours, and removed, whose name is not of this form.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from functools import lru_cache
from pathlib import Path

import psutil

SUFFIX = ".tmp"  # of a temporary name: ANYTHING.HOST-PID-NONCE.tmp
_WRITER = re.compile(r"[\w-]+\+[0-9a-f]+-[0-9]+-[0-9a-f]+x[0-9a-f]+", re.ASCII)
# another machine's unfinished work is taken for dead after a day without a change
_STALE_S = 24 * 3600.0


def writer_id() -> str:
    """Return a name for who writes a temporary file: HOST-PID-NONCE. The nonce begins with the
    process's start time, so that another process that gets the same number later is not taken for
    it."""
    return f"{_host()}-{os.getpid()}-{_own_start(os.getpid()):x}x{secrets.token_hex(4)}"


def is_writer(text: str) -> bool:
    """Return whether a text has the whole form HOST-PID-NONCE.

    >>> is_writer("node-7+0a1b2c3d4e5f-12-5x00ff00ff"), is_writer("mybackup")
    (True, False)
    """
    return _WRITER.fullmatch(text) is not None


def split_temporary(name: str) -> tuple[str, str] | None:
    """Split the name of a temporary file or folder into what it is to become and its writer; None
    where the name is none of ours.

    >>> split_temporary(".manifest.json.node-7+0a1b2c3d4e5f-12-5x00ff00ff.tmp")
    ('.manifest.json', 'node-7+0a1b2c3d4e5f-12-5x00ff00ff')
    >>> split_temporary(".mybackup.tmp")
    """
    what, dot, owner = name.removesuffix(SUFFIX).rpartition(".")
    return (what, owner) if name.endswith(SUFFIX) and dot and is_writer(owner) else None


def is_abandoned(leftover: Path) -> bool:
    """Return whether nobody works on a temporary file or folder any more."""
    owner = leftover.name.removesuffix(SUFFIX).rpartition(".")[2]
    if is_here(owner):
        return not is_alive(owner)
    try:
        newest = max(path.lstat().st_mtime for path in (leftover, *leftover.rglob("*")))
    except OSError:  # it is being written, or removed, right now
        return False
    return time.time() - newest > _STALE_S


def is_own(name: str) -> bool:
    """Return whether HOST-PID-NONCE is a name of this very process."""
    return name.rpartition("x")[0] == writer_id().rpartition("x")[0]


def is_here(owner: str) -> bool:
    """Return whether the writer HOST-PID-NONCE ran on this host."""
    return owner.rpartition("-")[0].rpartition("-")[0] == _host()


def is_alive(owner: str) -> bool:
    """Return whether the writer HOST-PID-NONCE may still run: another host's is taken to be
    alive, a zombie is not, nor is a process that began at another time."""
    if not is_here(owner):
        return True
    rest, _, nonce = owner.rpartition("-")
    try:
        started = _start_ticks(int(rest.rpartition("-")[2]))
    except (ValueError, psutil.NoSuchProcess):
        return False
    begun = nonce.partition("x")[0]  # 0 where the writer's system did not tell
    return started is None or begun in (f"{started:x}", "0")


@lru_cache(1)
def _host() -> str:
    """This machine since it was started, or this container of it: process numbers mean the same
    only within one.

    Many machines share one name (localhost, cloned images) and all have the same first namespace of
    processes. Work of the same machine before it was started again is of another host: which of
    two clones it was cannot be told, so that it is dead by age alone.
    """
    kernel = (_read("/proc/sys/kernel/random/boot_id"), _read("/etc/machine-id"), _pid_space())
    number = hashlib.blake2b("\n".join(kernel).encode(), digest_size=6).hexdigest()
    return f"{re.sub(r'[^a-zA-Z0-9-]', '_', socket.gethostname())}+{number}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:  # as on macOS
        return ""


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return ""


@lru_cache(1)  # every temporary file asks; the number of a fork is another key
def _own_start(pid: int) -> int:
    return _start_ticks(pid) or 0


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where the system does not tell.
    Raises NoSuchProcess where it has ended, as zombies have.

    psutil adds the time of boot to the kernel's ticks, and that time moves whenever the clock is
    set: the same process then has another `create_time`. The ticks never move, so they are what
    names hold, and they come back exactly once the time of boot is taken away again.
    """
    try:
        boot, process = psutil.boot_time(), psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            raise psutil.ZombieProcess(pid)
        created = process.create_time()
        if psutil.boot_time() != boot:  # the clock was set in this moment
            return _start_ticks(pid)
    except (psutil.AccessDenied, OSError, RuntimeError):  # /proc is hidden or lacks the boot time
        if _has_ended(pid):
            raise psutil.NoSuchProcess(pid) from None
        return None
    # elsewhere than on Linux both times are read from a clock that may be set
    return round((created - boot) * os.sysconf("SC_CLK_TCK")) if psutil.LINUX else None


def _has_ended(pid: int) -> bool:
    """Ask the kernel for the process alone: psutil's `pid_exists` looks for it in /proc."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # another user's
        pass
    return pid <= 0  # no process has such a number
